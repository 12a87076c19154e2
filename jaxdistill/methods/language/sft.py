"""Supervised fine-tuning: cross-entropy of the next token on the data's own text.

It trains teachers, and it is the baseline that distillation has to beat. All target tokens of a
batch have the same weight.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxdistill.core.types import Array, Batch, Ctx, Method, Nets, Out, Refused
from jaxdistill.methods.language._fields import TEXT
from jaxdistill.models.language.lm import context, targets
from jaxdistill.objectives.divergence import (
    chunked_likelihood,
    cross_entropy,
    masked_sum,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(Method):
    """The student learns the data's target tokens."""

    # columns of the vocabulary that are projected at a time, which only saves memory; 0: all
    chunk: int = 0

    needs = TEXT
    inits = {"student": None}
    frozen = ()
    ema = ()

    def __post_init__(self):
        if self.chunk < 0:
            raise Refused(f"method.chunk={self.chunk}: expected 0 or more")

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        nll, likeliest, mask = self.token_losses(net, ctx.batch)
        total, count = masked_sum(nll, mask)
        right, _ = masked_sum(likeliest.astype(jnp.float32), mask)
        return Out(total, {"accuracy": right}, count=count)

    def token_losses(
        self, net: Nets, batch: Batch
    ) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]:
        """Of the token after each: -log q, whether it is the likeliest, whether it is a target."""
        labels, mask = targets(batch)
        if self.chunk:
            hidden = net.student(
                batch["tokens"], hidden_only=True, **context(batch)
            )
            head = net.student(method="unembedding")
            nll, likeliest = chunked_likelihood(
                hidden, head, labels, chunk=self.chunk
            )
            return nll, likeliest, mask
        logits = net.student(batch["tokens"], **context(batch))
        return cross_entropy(logits, labels), logits.argmax(-1) == labels, mask
