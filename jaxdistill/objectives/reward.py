"""Verifiable rewards: the value of a response, checked against the data's answer.

A reward is a callable dataclass, batch -> (score, failed), float32 of each sample. The batch is
that of `samplers.text.respond`: tokens and mask [B T] of the response, answer and answer_mask [B T]
of the data's own. `failed` is 1 where a sample could not be judged; its score is then 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float32, Shaped

from jaxdistill.core.tokenizer import decoder
from jaxdistill.core.types import Array, Batch, Refused
from jaxdistill.objectives import verifiers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
    """1 where the response equals the answer token by token, its end included; else 0."""

    def __call__(
        self, batch: Batch
    ) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
        wanted, right = _right_tokens(batch)
        score = jnp.all(wanted == right, -1).astype(jnp.float32)
        return score, jnp.zeros_like(score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """The share of the answer's tokens that the response has in the same places."""

    def __call__(
        self, batch: Batch
    ) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
        wanted, right = _right_tokens(batch)
        score = jnp.sum(wanted & right, -1) / jnp.maximum(jnp.sum(wanted, -1), 1)
        return score, jnp.zeros_like(score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtLeast(Share):
    """1 where `Share` is `least` or more, else 0."""

    least: float = 0.5

    def __call__(self, batch):
        score, failed = super().__call__(batch)
        return (score >= self.least).astype(jnp.float32), failed


def _right_tokens(batch: Batch) -> tuple[Array, Array]:
    """Where the answer has a token; and where the response has that token or, beyond the answer,
    one too many; bool [B T].
    """
    wanted = batch["answer_mask"] > 0
    written = batch["mask"] > 0
    return wanted, written & (~wanted | (batch["tokens"] == batch["answer"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """The value of a Python function on the host, function(prompt, response, answer) -> float or
    bool, which is called in processes of its own.

    With a `tokenizer` its arguments are texts, else lists of token ids. Where it raises, crashes,
    returns no finite number or takes longer than `timeout`, the sample has failed: its score is 0,
    the failure is counted and logged, and training continues.

    Raises:
      Refused: where there is no such function, or its file cannot be imported within `start`
        seconds.
    """

    # "package.file:function", below jaxdistill or in any package; only the processes import it
    function: str = "objectives.verifiers:last_number"
    tokenizer: str = "byte"  # byte | a folder | "": the function gets token ids
    timeout: float = 5.0  # seconds for a sample
    workers: int = 4  # processes
    # seconds for the import of the function's file, which is tried before training starts
    start: float = verifiers.START

    def __post_init__(self):
        if (
            not 0 < self.timeout < np.inf
            or not 0 < self.start < np.inf
            or self.workers < 1
        ):
            fields = f"timeout={self.timeout}, start={self.start}, workers={self.workers}"
            raise Refused(
                f"reward: {fields}: expected seconds above 0 and at least 1 worker"
            )
        try:
            verifiers.check(self.function, self.start)
        except Exception as error:  # any exception that the import raises
            reason = " ".join(str(error).split())
            given = f"reward.function={self.function!r}"
            raise Refused(
                f"{given}: {reason}; expected 'package.file:function'"
            ) from error

    @functools.cached_property
    def pool(self) -> verifiers.Pool:
        """The processes."""
        return verifiers.Pool(self.function, self.timeout, self.workers, self.start)

    @functools.cached_property
    def decode(self) -> Callable[[list[int]], Any]:
        """From token ids to an argument of the function."""
        return decoder(self.tokenizer) if self.tokenizer else list

    def __call__(
        self, batch: Batch
    ) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
        names = ("tokens", "mask", "segments", "answer", "answer_mask")
        result = jax.ShapeDtypeStruct(batch["tokens"].shape[:1], jnp.float32)
        arrays = [batch[name] for name in names]
        return jax.pure_callback(self.judge, (result, result), *arrays)

    def judge(
        self,
        tokens: Shaped[Array, "B T"],
        mask: Shaped[Array, "B T"],
        segments: Shaped[Array, "B T"],
        answer: Shaped[Array, "B T"],
        answer_mask: Shaped[Array, "B T"],
    ) -> tuple[Float32[np.ndarray, " B"], Float32[np.ndarray, " B"]]:
        """(score, failed) of arrays on the host; segments are 0 on padding."""
        written = np.asarray(mask) > 0
        before_response = np.cumsum(written, -1) == 0
        prompts = self._decoded(
            tokens, (np.asarray(segments) > 0) & before_response
        )
        responses = self._decoded(tokens, written)
        answers = self._decoded(answer, np.asarray(answer_mask) > 0)
        values = self.pool.score(list(zip(prompts, responses, answers)))
        score = np.zeros(len(values), np.float32)
        failed = np.zeros(len(values), np.float32)
        reasons = []
        for i, value in enumerate(values):
            if isinstance(value, float) and np.isfinite(value):
                score[i] = value
            else:
                failed[i] = 1.0
                reasons.append(
                    value if isinstance(value, str) else f"returned {value}"
                )
        if reasons:
            message = "%s failed on %d of %d samples; the first: %s"
            logging.warning(
                message, self.function, len(reasons), len(values), reasons[0]
            )
        return score, failed

    def _decoded(self, tokens: Array, where: np.ndarray) -> Sequence[Any]:
        """The tokens of each sample at the places `where` [B T], decoded."""
        samples = zip(np.asarray(tokens), where)
        return [
            self.decode([int(token) for token in row[kept]])
            for row, kept in samples
        ]
