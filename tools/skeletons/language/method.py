"""My method (arXiv:2601.00000).

The idea in three sentences. As it stands, the student's next-token distribution is matched to the
teacher's at every target token of the data. Departures from the paper are stated here.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Int, Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Ctx, Method, Nets, Out
from jaxdistill.models.language.lm import context, same_vocabulary, targets
from jaxdistill.objectives.divergence import (
    Divergence,
    ForwardKL,
    masked_sum,
    token_divergence,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyMethod(Method):
    """Each field has its role, its unit and the paper's value."""

    # of the student's distribution from the teacher's
    divergence: Divergence = ForwardKL()
    # of both softmaxes
    temperature: float = 1.0

    needs = {"tokens": Int[Spec, "B T"], "mask": Shaped[Spec, "B T"]}
    inits = {"student": None}
    ema = ()

    def check(self, nets, data) -> None:
        same_vocabulary(self, nets)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        tokens = ctx.batch["tokens"]
        _, mask = targets(ctx.batch)
        teacher = net.teacher(tokens, **context(ctx.batch))
        student = net.student(tokens, **context(ctx.batch))
        # eq. 1
        each = token_divergence(
            self.divergence, teacher, student, temperature=self.temperature
        )
        total, count = masked_sum(each, mask)
        return Out(total, {"divergence": total}, count=count)
