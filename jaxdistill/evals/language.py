"""Metrics of language models, computed from arrays and strings."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from jaxdistill.core.types import Array, Refused
from jaxdistill.objectives.divergence import (
    Divergence,
    ForwardKL,
    masked_sum,
    token_divergence,
)

Number = float | np.floating


def perplexity(nll: Number, count: Number) -> float:
    """exp(nll / count), where `nll` is the sum of -log q over `count` tokens, in nats."""
    return float(np.exp(nll / count))


def token_kl(
    teacher: Float[Array, "B T V"],
    student: Float[Array, "B T U"],
    mask: Shaped[Array, "B T"],
    divergence: Divergence = ForwardKL(),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of a divergence between the logits of two models over the tokens of a mask.

    Measured on held-out text and on the student's own continuations, the difference is the exposure
    gap.

    Args:
        divergence: of objectives.divergence.

    Returns:
        The sum, and the number of tokens.
    """
    return masked_sum(token_divergence(divergence, teacher, student), mask)


def top1_agreement(
    teacher: Float[Array, "B T V"],
    student: Float[Array, "B T U"],
    mask: Shaped[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many tokens of a mask have the same most likely prediction, by the logits of two models.

    Returns:
        Their number, and the number of tokens.
    """
    same = jnp.argmax(teacher, -1) == jnp.argmax(student, -1)
    return masked_sum(same.astype(jnp.float32), mask)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that are equal to their reference.

    Runs of white space count as one space; white space at the ends does not count.
    """
    pairs = _pairs(predictions, references)
    return float(np.mean([a.split() == b.split() for a, b in pairs]))


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the longest common subsequence of words in lower case.

    Source:
        Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004.
    """
    scores = []
    for prediction, reference in _pairs(predictions, references):
        a = prediction.lower().split()
        b = reference.lower().split()
        common = _longest_common(a, b)
        scores.append(2 * common / (len(a) + len(b)) if common else 0.0)
    return float(np.mean(scores))


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    # of the words of `a` so far and the first j words of `b`
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            before = lengths[j]
            lengths[j] = (
                diagonal + 1 if word == other else max(before, lengths[j - 1])
            )
            diagonal = before
    return lengths[-1]


def _pairs(
    predictions: Sequence[str], references: Sequence[str]
) -> list[tuple[str, str]]:
    """Predictions with their references. Raises Refused unless there is one for each."""
    if not predictions or len(predictions) != len(references):
        raise Refused(
            f"{len(predictions)} predictions for {len(references)} references: "
            "expected one for each, and at least one"
        )
    return list(zip(predictions, references))
