"""What methods on written text share: how they write, and the log-probabilities of what was written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Method, Refused
from jaxdistill.models.lm import context
from jaxdistill.objectives.divergence import chunked_cross_entropy, cross_entropy
from jaxdistill.samplers.text import respond


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing(Method):
    """Base of methods that write responses to the data's prompts."""

    sample_temperature: float = 1.0  # of the writing; 1 in the papers
    prompt_length: int = 0  # tokens that a row opens with, for data without "prompt"
    eos: tuple[int, ...] = ()  # tokens that end a response; (): the data's, where it has one; (-1,): none
    pad: int = 0  # what follows them
    chunk: int = 0  # vocabulary columns projected at a time, which saves memory and changes nothing else; 0: all

    greedy = True  # whether a sample_temperature of 0, the likeliest token at a time, means anything

    def __post_init__(self):
        least = self.sample_temperature
        if not (0 <= least < math.inf) or (least == 0 and not self.greedy):
            wanted = "a number of 0 or more" if self.greedy else f"a number above 0: {type(self).__name__} learns from samples"
            raise Refused(f"method.sample_temperature={least}: expected {wanted}")
        if self.prompt_length < 0 or self.chunk < 0:
            raise Refused(f"method.prompt_length={self.prompt_length}, method.chunk={self.chunk}: expected 0 or more")

    def write(self, net: Callable, ctx: Ctx, name: str, copies: int = 1, vocab: int = 0) -> Batch:
        """The batch with `net`'s responses (`samplers.text.respond`), drawn from the key called
        `name`, of ids below `vocab` (0: all)."""
        how = dict(temperature=self.sample_temperature, eos=self.eos, pad=self.pad, vocab=vocab)
        length = self.prompt_length
        return respond(net, ctx.batch, ctx.key(name), copies=copies, prompt_length=length, **how)

    def log_probs(self, net: Callable, batch: Batch) -> Array:
        """log q of tokens[:, 1:] given those before, [B T-1], at the temperature of the writing."""
        out = net(batch["tokens"], hidden_only=self.chunk > 0, **context(batch))[:, :-1] / self.sample_temperature
        labels = batch["tokens"][:, 1:]
        if self.chunk:
            return -chunked_cross_entropy(out, net(method="head"), labels, chunk=self.chunk)
        return -cross_entropy(out, labels)


def written(batch: Batch) -> Array:
    """Which of tokens[:, 1:] are a response's, bool [B T-1]."""
    return batch["mask"][:, 1:] > 0


def share(flags: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, count) of `flags` where `mask` holds: a metric that is averaged over tokens."""
    return jnp.sum(flags & mask).astype(jnp.float32), jnp.sum(mask).astype(jnp.float32)
