"""What methods on generated text share: how responses are sampled, and their log-probabilities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxdistill.core.types import Array, Batch, Ctx, Method, Refused
from jaxdistill.methods.language._fields import TEXT
from jaxdistill.models.language.lm import context
from jaxdistill.objectives.divergence import chunked_cross_entropy, cross_entropy
from jaxdistill.samplers.text import respond


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing(Method):
    """Base of methods on responses that a network writes to the data's prompts."""

    # temperature at which responses are sampled; 0: greedily; 1 in the papers
    sample_temperature: float = 1.0
    # number of tokens at the start of a sequence that are its prompt, for data without "prompt"
    prompt_length: int = 0
    # tokens that end a response; (): the data's end token where it has one; (-1,): none
    eos: tuple[int, ...] = ()
    # token that fills a sequence after the end of its response
    pad: int = 0
    # columns of the vocabulary that are projected at a time, which only saves memory; 0: all
    chunk: int = 0

    needs = TEXT
    # whether a method can learn from greedy responses, sample_temperature 0
    greedy = True

    def __post_init__(self):
        temperature = self.sample_temperature
        if not 0 <= temperature < math.inf or (
            temperature == 0 and not self.greedy
        ):
            expected = "a number of 0 or more"
            if not self.greedy:
                expected = (
                    f"a number above 0: {type(self).__name__} learns from samples"
                )
            raise Refused(
                f"method.sample_temperature={temperature}: expected {expected}"
            )
        if self.prompt_length < 0 or self.chunk < 0:
            given = f"method.prompt_length={self.prompt_length}, method.chunk={self.chunk}"
            raise Refused(f"{given}: expected 0 or more")

    def write(
        self, net: Callable, ctx: Ctx, name: str, copies: int = 1, vocab: int = 0
    ) -> Batch:
        """The batch with responses of `net` in the places of the data's (`samplers.text.respond`).

        Args:
          name: of the random key.
          copies: responses to each prompt.
          vocab: only token ids below it are sampled; 0: all.
        """
        return respond(
            net,
            ctx.batch,
            ctx.key(name),
            copies=copies,
            prompt_length=self.prompt_length,
            temperature=self.sample_temperature,
            eos=self.eos,
            pad=self.pad,
            vocab=vocab,
        )

    def log_probs(self, net: Callable, batch: Batch) -> Float[Array, "B _"]:
        """log q of tokens[:, 1:] given those before, [B T-1], at the sampling's temperature."""
        out = net(batch["tokens"], hidden_only=self.chunk > 0, **context(batch))
        out = out[:, :-1] / self.sample_temperature
        labels = batch["tokens"][:, 1:]
        if self.chunk:
            return -chunked_cross_entropy(
                out, net(method="unembedding"), labels, chunk=self.chunk
            )
        return -cross_entropy(out, labels)


def response_mask(batch: Batch) -> Bool[Array, "B _"]:
    """Which of tokens[:, 1:] belong to a response, [B T-1]."""
    return batch["mask"][:, 1:] > 0


def share_of_tokens(
    flags: Bool[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum, count) of `flags` at the tokens of `mask`: a metric that is averaged over tokens."""
    return jnp.sum(flags & mask).astype(jnp.float32), jnp.sum(mask).astype(
        jnp.float32
    )
