"""Next-token prediction: cross-entropy on the data's own tokens, for teachers, and for students that distillation is held against.

The first term of every distillation below: predict token t + 1 from tokens 0 to t, over the tokens that the data marks
as targets.
"""

from __future__ import annotations

import dataclasses

import optax

from jaxdistill.core.types import Ctx, Method, Nets, Out, Turn
from jaxdistill.models.lm import context
from jaxdistill.objectives.divergence import masked_sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Method):
    """No hyper-parameters: batch["mask"] [B T] says which tokens are targets."""

    inits = {"student": None}
    frozen = ()
    ema = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        tokens = ctx.batch["tokens"]
        logits = net.student(tokens, **context(ctx.batch))[:, :-1]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        total, count = masked_sum(nll, ctx.batch["mask"][:, 1:] > 0)
        return Out(total, count=count)
