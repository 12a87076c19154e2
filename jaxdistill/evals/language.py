"""Figures of language models from arrays and strings; models and data are the caller's."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxdistill.core.types import Array, Refused
from jaxdistill.objectives.divergence import masked_sum, token_divergence


def perplexity(nll: float, count: float) -> float:
    """exp(nll / count), `nll` the sum of -log q over `count` tokens, in nats."""
    return float(np.exp(nll / count))


def token_kl(
    teacher: Array, student: Array, mask: Array, kind: str = "forward_kl"
) -> tuple[Array, Array]:
    """(sum, count) over tokens of the divergence from logits [B T V] where `mask` [B T] holds; KL(p
    || q) by default.

    On held-out text and on the student's own roll-outs its difference is the exposure gap.
    """
    return masked_sum(token_divergence(kind, teacher, student), mask)


def top1_agreement(teacher: Array, student: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, count) of tokens whose most likely prediction is the same, from logits [B T V] where
    `mask` [B T] holds.
    """
    return masked_sum(
        (jnp.argmax(teacher, -1) == jnp.argmax(student, -1)).astype(jnp.float32), mask
    )


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions equal to their reference, white space aside (runs count as one, ends not
    at all).
    """
    pairs = _pairs(predictions, references)
    return float(np.mean([a.split() == b.split() for a, b in pairs]))


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the longest common subsequence of words in lower case (Lin, 2004); 0 for a pair
    with nothing in common.
    """

    def f1(a: list[str], b: list[str]) -> float:
        row = [0] * (len(b) + 1)
        for word in a:
            diagonal = 0
            for j, other in enumerate(b, 1):
                diagonal, row[j] = (
                    row[j],
                    diagonal + 1 if word == other else max(row[j], row[j - 1]),
                )
        return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0

    return float(
        np.mean(
            [f1(a.lower().split(), b.lower().split()) for a, b in _pairs(predictions, references)]
        )
    )


def _pairs(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    if not predictions or len(predictions) != len(references):
        raise Refused(
            f"{len(predictions)} predictions for {len(references)} references: expected one for each, and at least one"
        )
    return list(zip(predictions, references))
