"""What methods on written text share: how they write, and the log-probabilities of what was
written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Method, Refused
from jaxdistill.models.language.lm import context
from jaxdistill.objectives.divergence import chunked_cross_entropy, cross_entropy
from jaxdistill.samplers.text import respond


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing(Method):
    """Base of methods that write responses to the data's prompts."""

    sample_temperature: float = 1.0  # of the writing; 1 in the papers
    prompt_length: int = 0  # tokens that a row opens with, for data without "prompt"
    eos: tuple[
        int, ...
    ] = ()  # tokens that end a response; (): the data's, where it has one; (-1,): none
    pad: int = 0  # what follows them
    # vocabulary columns projected at a time, which saves memory and changes nothing else; 0: all
    chunk: int = 0

    greedy = (
        True  # whether a sample_temperature of 0, the likeliest token at a time, means anything
    )

    def __post_init__(self):
        least = self.sample_temperature
        if not (0 <= least < math.inf) or (least == 0 and not self.greedy):
            wanted = (
                "a number of 0 or more"
                if self.greedy
                else f"a number above 0: {type(self).__name__} learns from samples"
            )
            raise Refused(f"method.sample_temperature={least}: expected {wanted}")
        if self.prompt_length < 0 or self.chunk < 0:
            raise Refused(
                f"method.prompt_length={self.prompt_length}, method.chunk={self.chunk}: expected 0 or more"
            )

    def write(self, net: Callable, ctx: Ctx, name: str, copies: int = 1, vocab: int = 0) -> Batch:
        """The batch with `net`'s responses (`samplers.text.respond`), drawn from the key called
        `name`, of ids below `vocab` (0: all)."""
        how = dict(temperature=self.sample_temperature, eos=self.eos, pad=self.pad, vocab=vocab)
        length = self.prompt_length
        return respond(net, ctx.batch, ctx.key(name), copies=copies, prompt_length=length, **how)

    def log_probs(self, net: Callable, batch: Batch) -> Array:
        """log q of tokens[:, 1:] given those before, [B T-1], at the temperature of the writing."""
        out = (
            net(batch["tokens"], hidden_only=self.chunk > 0, **context(batch))[:, :-1]
            / self.sample_temperature
        )
        labels = batch["tokens"][:, 1:]
        if self.chunk:
            return -chunked_cross_entropy(out, net(method="head"), labels, chunk=self.chunk)
        return -cross_entropy(out, labels)


def written(batch: Batch) -> Array:
    """Which of tokens[:, 1:] are a response's, bool [B T-1]."""
    return batch["mask"][:, 1:] > 0


def solved_first(batch: Batch, prompt_length: int = 0) -> Batch:
    """Rows of 2 T tokens from `batch` with rows of T: the problem with the data's own solution,
    then the problem and the response.

    The solution is what `answer_mask` marks of `answer` (`samplers.text.respond`), or `mask` of the
    tokens where nothing has been written. tokens, segments and positions int32, mask float32 [B
    2T], prompt int32 and prompt_mask bool [B T+P] are as in `data.text:PaddedJson`, padding on the
    left: the last T columns belong to those of `batch`, from the prompt's last token on. A row
    without a solution has nothing before its problem.
    """
    tokens = batch["tokens"]
    answer = batch.get("answer", batch["tokens"])
    width = batch["prompt"].shape[1] if "prompt" in batch else prompt_length
    asked = (
        batch["prompt_mask"].astype(bool)
        if "prompt_mask" in batch
        else jnp.ones((len(tokens), width), bool)
    )
    told = batch.get("answer_mask", batch["mask"])[:, width:] > 0
    seen = jnp.concatenate([asked & told.any(1, keepdims=True), told, asked], 1)
    text = jnp.concatenate([tokens[:, :width], answer[:, width:], tokens[:, :width]], 1)
    order = jnp.argsort(seen, axis=1, stable=True)  # padding first
    prompt, seen = (jnp.take_along_axis(x, order, 1) for x in (text, seen))
    written = (
        batch["segments"][:, width:] > 0 if "segments" in batch else jnp.ones(told.shape, bool)
    )
    valid = jnp.concatenate([seen, written], 1)
    new = {
        "tokens": jnp.concatenate([prompt, tokens[:, width:]], 1),
        "segments": valid.astype(jnp.int32),
    }
    new |= {"mask": jnp.concatenate([jnp.zeros_like(batch["mask"]), batch["mask"]], 1)}
    new |= {"positions": jnp.maximum(jnp.cumsum(valid, 1, dtype=jnp.int32) - 1, 0)}
    return {**batch, **new, "prompt": prompt, "prompt_mask": seen}


def share(flags: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, count) of `flags` where `mask` holds: a metric that is averaged over tokens."""
    return jnp.sum(flags & mask).astype(jnp.float32), jnp.sum(mask).astype(jnp.float32)
