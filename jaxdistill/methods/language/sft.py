"""Supervised fine-tuning: next-token cross-entropy on the data's own text. It trains teachers, and it is the baseline
that distillation has to beat.

Tokens that `mask` marks as targets count alike, over the whole batch.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxdistill.core.types import Ctx, Method, Nets, Out, Turn
from jaxdistill.models.lm import context, targets
from jaxdistill.objectives.divergence import cross_entropy, masked_sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(Method):
    inits = {"student": None}
    frozen = ()
    ema = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        labels, mask = targets(ctx.batch)
        logits = net.student(ctx.batch["tokens"], **context(ctx.batch))
        total, count = masked_sum(cross_entropy(logits, labels), mask)
        right, _ = masked_sum((logits.argmax(-1) == labels).astype(jnp.float32), mask)
        return Out(total, {"accuracy": right}, count=count)
