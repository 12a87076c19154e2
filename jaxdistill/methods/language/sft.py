"""Supervised fine-tuning: next-token cross-entropy on the data's own text. It trains teachers, and
it is the baseline that distillation has to beat.

Tokens that `mask` marks as targets count alike, over the whole batch.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Method, Nets, Out, Refused, Turn
from jaxdistill.models.language.lm import context, targets
from jaxdistill.objectives.divergence import chunked_likelihood, cross_entropy, masked_sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(Method):
    # vocabulary columns projected at a time, which saves memory and changes nothing else; 0: all
    chunk: int = 0

    inits = {"student": None}
    frozen = ()
    ema = ()

    def __post_init__(self):
        if self.chunk < 0:
            raise Refused(f"method.chunk={self.chunk}: expected 0 or more")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        each, likeliest, mask = self.each(net, ctx.batch)
        total, count = masked_sum(each, mask)
        right, _ = masked_sum(likeliest.astype(jnp.float32), mask)
        return Out(total, {"accuracy": right}, count=count)

    def each(self, net: Nets, batch: Batch) -> tuple[Array, Array, Array]:
        """Of the token after each: -log q, whether it is the likeliest, and whether it is a target,
        [B T] each.
        """
        labels, mask = targets(batch)
        out = net.student(
            batch["tokens"], **({"hidden_only": True} if self.chunk else {}), **context(batch)
        )
        if self.chunk:
            return *chunked_likelihood(
                out, net.student(method="head"), labels, chunk=self.chunk
            ), mask
        return cross_entropy(out, labels), out.argmax(-1) == labels, mask
