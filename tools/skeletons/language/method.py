"""My method (arXiv:2601.00000).

The idea in three sentences. As it stands, every target token of the data draws the student's
next-token law to the teacher's. Departures from the paper are stated here.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.core.types import Ctx, Method, Nets, Out, Turn
from jaxdistill.models.language.lm import context, same_vocabulary, targets
from jaxdistill.objectives.divergence import masked_sum, token_divergence


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyMethod(Method):
    kind: str = "forward_kl"  # divergence, a key of objectives.divergence.KINDS
    temperature: float = (
        1.0  # of both softmaxes; each field with its role, its unit and the paper's value
    )

    inits = {"student": None}
    ema = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def check(self, nets, data) -> None:
        same_vocabulary(self, nets)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        _, mask = targets(ctx.batch)
        logits = lambda call: call(ctx.batch["tokens"], **context(ctx.batch))
        each = token_divergence(
            self.kind, logits(net.teacher), logits(net.student), temperature=self.temperature
        )  # eq. 1
        total, count = masked_sum(each, mask)
        return Out(total, {"divergence": total}, count=count)
