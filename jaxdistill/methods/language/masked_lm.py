"""Masked-token prediction, as BERT is pretrained (arXiv:1810.04805, section 3.1).

It trains the encoders that are then distilled. Of the real tokens 15 % are to be predicted: 80 % of
these are replaced by the mask token, 10 % by a random token, and 10 % stay.

Departures: one matrix, the role `head`, makes the predictions and is discarded; BERT's
next-sentence task is left out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, Key, Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Ctx, Method, Nets, Out, Refused, Turn
from jaxdistill.objectives.divergence import cross_entropy, masked_sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(Method):
    """The student is an encoder of any kind (models/language/bert.py)."""

    # id of the mask token
    mask_token: int
    # a random token has an id below it
    vocab: int
    # share of the real tokens that are to be predicted; the paper's 0.15
    rate: float = 0.15
    # of these, the share that the mask token replaces; the paper's 0.8
    masked: float = 0.8
    # of these, the share that a random token replaces; the paper's 0.1
    random: float = 0.1
    # in front of the names "tokens" and "mask" in a batch, such as general_
    prefix: str = ""

    inits = {"student": None, "head": None}
    frozen = ()
    ema = ()

    def __post_init__(self):
        replaced = self.masked + self.random
        if (
            not 0 < self.rate <= 1
            or min(self.masked, self.random) < 0
            or replaced > 1
        ):
            given = f"method.rate={self.rate}, masked={self.masked}, random={self.random}"
            raise Refused(
                f"{given}: expected shares, the last two at most 1 together"
            )

    @property
    def needs(self):
        return {
            f"{self.prefix}tokens": Int[Spec, "B T"],
            f"{self.prefix}mask": Shaped[Spec, "B T"],
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student", "head"), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        tokens = ctx.batch[f"{self.prefix}tokens"]
        mask = ctx.batch[f"{self.prefix}mask"]
        corrupted, predicted = self.corrupt(tokens, mask, ctx.key("mask"))
        hidden = net.student(corrupted, mask=mask, method="encode")
        total, count = masked_sum(
            cross_entropy(net.head(hidden), tokens), predicted
        )
        return Out(total, {}, count=count)

    def corrupt(
        self,
        tokens: Int[Array, "B T"],
        mask: Shaped[Array, "B T"],
        key: Key[Array, ""],
    ) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """(tokens that the network reads, which of them are to be predicted)."""
        which, how, other = jax.random.split(key, 3)
        predicted = (jax.random.uniform(which, tokens.shape) < self.rate) & (
            mask > 0
        )
        u = jax.random.uniform(how, tokens.shape)
        drawn = jax.random.randint(other, tokens.shape, 0, self.vocab, tokens.dtype)
        replaced = jnp.where(u < self.masked + self.random, drawn, tokens)
        replaced = jnp.where(u < self.masked, self.mask_token, replaced)
        return jnp.where(predicted, replaced, tokens), predicted
