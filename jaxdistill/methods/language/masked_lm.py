"""Masked-token prediction, as BERT is pretrained (arXiv:1810.04805, section 3.1): what an encoder
is before it is distilled.

Of the real tokens 15 % are to be guessed: 80 % of these are replaced by the mask token, 10 % by any
token, and 10 % stay.
Departure: one matrix (the role `head`, discarded) makes the guesses; BERT's next-sentence task is
left out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Ctx, Method, Nets, Out, Refused, Turn
from jaxdistill.objectives.divergence import cross_entropy, masked_sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(Method):
    """The student is an encoder (models/language/bert.py) of any kind; batches have tokens int [B
    T] and mask bool [B T].
    """

    mask_token: int
    vocab: int  # tokens that may stand in for another: 0 .. vocab - 1
    rate: float = 0.15
    masked: float = 0.8  # share of the chosen tokens that the mask token replaces
    random: float = 0.1  # share that any token replaces
    prefix: str = ""  # of the batch's fields, such as general_

    inits = {"student": None, "head": None}
    frozen = ()
    ema = ()

    def __post_init__(self):
        if (
            not 0 < self.rate <= 1
            or min(self.masked, self.random) < 0
            or self.masked + self.random > 1
        ):
            given = f"method.rate={self.rate}, masked={self.masked}, random={self.random}"
            raise Refused(f"{given}: expected shares, the last two at most 1 together")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student", "head"), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        tokens, real = (ctx.batch[self.prefix + name] for name in ("tokens", "mask"))
        shown, chosen = self.corrupt(tokens, real, ctx.key("mask"))
        states, _ = net.student(shown, None, real, (), (), method="encode")
        total, count = masked_sum(cross_entropy(net.head(states), tokens), chosen)
        return Out(total, {}, count=count)

    def corrupt(self, tokens: Array, real: Array, key: Array) -> tuple[Array, Array]:
        """(what the network is shown int [B T], which tokens it has to guess bool [B T])."""
        which, how, other = jax.random.split(key, 3)
        chosen = (jax.random.uniform(which, tokens.shape) < self.rate) & (real > 0)
        u = jax.random.uniform(how, tokens.shape)
        drawn = jax.random.randint(other, tokens.shape, 0, self.vocab, tokens.dtype)
        replaced = jnp.where(
            u < self.masked,
            self.mask_token,
            jnp.where(u < self.masked + self.random, drawn, tokens),
        )
        return jnp.where(chosen, replaced, tokens), chosen
