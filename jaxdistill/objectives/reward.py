"""Verifiable rewards: what a response is worth, checked against the data's answer.

A reward is a callable dataclass, batch -> (score float32 [B], failed float32 [B]), of a batch as
`samplers.text.respond` makes it: tokens and mask [B T] of the response, answer and answer_mask [B
T] of the data's own. `failed` is 1 where the sample could not be judged; its score is then 0.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxdistill.core.types import Array, Batch, Refused
from jaxdistill.objectives import verifiers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
    """1 where the response is the answer, token by token, its end included; else 0."""

    def __call__(self, batch: Batch) -> tuple[Array, Array]:
        wanted, here = _hits(batch)
        score = jnp.all(wanted == here, -1).astype(jnp.float32)
        return score, jnp.zeros_like(score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """The share of the answer's tokens that the response has in their places; a dense reward."""

    def __call__(self, batch: Batch) -> tuple[Array, Array]:
        wanted, here = _hits(batch)
        score = jnp.sum(wanted & here, -1) / jnp.maximum(jnp.sum(wanted, -1), 1)
        return score, jnp.zeros_like(score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtLeast(Share):
    """1 where that share is `least` or more, else 0: right enough."""

    least: float = 0.5

    def __call__(self, batch: Batch) -> tuple[Array, Array]:
        score, failed = super().__call__(batch)
        return (score >= self.least).astype(jnp.float32), failed


def _hits(batch: Batch) -> tuple[Array, Array]:
    """(where the answer has a token, where the response has that token or, beyond the answer, one
    too many), bool [B T].
    """
    wanted = batch["answer_mask"] > 0
    written = batch["mask"] > 0
    return wanted, written & (~wanted | (batch["tokens"] == batch["answer"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """A Python function on the host: function(prompt, response, answer) -> float or bool, in
    processes of its own.

    With a `tokenizer` its arguments are texts, else lists of token ids. A sample on which it
    raises, crashes, returns no finite number or takes longer than `timeout` has failed: score 0,
    counted and logged, and training goes on. Raises Refused where there is no such function, or
    where its file cannot be imported within `start` seconds.
    """

    function: str = (
        "objectives.verifiers:last_number"  # "package.file:function", below jaxdistill or anywhere
    )
    tokenizer: str = "byte"  # byte | a folder | "": the function gets token ids
    timeout: float = 5.0  # seconds a sample
    workers: int = 4  # processes
    start: float = (
        verifiers.START
    )  # seconds that the import of the function's file may take, tried before anything runs

    def __post_init__(self):
        if not 0 < self.timeout < np.inf or not 0 < self.start < np.inf or self.workers < 1:
            fields = f"timeout={self.timeout}, start={self.start}, workers={self.workers}"
            raise Refused(f"reward: {fields}: expected seconds above 0 and at least 1 worker")
        try:
            verifiers.check(self.function, self.start)
        except Exception as error:  # whatever the file's import raises
            said = " ".join(str(error).split())
            raise Refused(
                f"reward.function={self.function!r}: {said}; expected 'package.file:function'"
            ) from error

    @functools.cached_property
    def pool(self) -> verifiers.Pool:
        return verifiers.Pool(self.function, self.timeout, self.workers, self.start)

    @functools.cached_property
    def decode(self):
        """list of ids -> what the function gets."""
        return (
            verifiers.find("data.tokenizers:load_tokenizer")(self.tokenizer).decode
            if self.tokenizer
            else list
        )

    def __call__(self, batch: Batch) -> tuple[Array, Array]:
        names = ("tokens", "mask", "segments", "answer", "answer_mask")
        one = jax.ShapeDtypeStruct(batch["tokens"].shape[:1], jnp.float32)
        return jax.pure_callback(self.judge, (one, one), *(batch[name] for name in names))

    def judge(self, tokens, mask, segments, answer, answer_mask) -> tuple[np.ndarray, np.ndarray]:
        """The same on the host; arrays [B T], segments 0 on padding."""
        tokens, written, real, answer, wanted = map(
            np.asarray, (tokens, mask, segments, answer, answer_mask)
        )
        prompt = (real > 0) & ~(np.cumsum(written > 0, -1) > 0)
        pick = lambda rows, where: [
            self.decode([int(t) for t in row[keep]]) for row, keep in zip(rows, where > 0)
        ]
        samples = list(zip(pick(tokens, prompt), pick(tokens, written), pick(answer, wanted)))
        found = [
            v if isinstance(v, str) or np.isfinite(v) else f"returned {v}"
            for v in self.pool.score(samples)
        ]
        wrong = [v for v in found if isinstance(v, str)]
        if wrong:
            logging.warning(
                "%s failed on %d of %d samples; the first: %s",
                self.function,
                len(wrong),
                len(found),
                wrong[0],
            )
        failed = np.array([isinstance(v, str) for v in found])
        return np.float32([0.0 if bad else v for v, bad in zip(found, failed)]), np.float32(failed)
