"""Score distillation sampling (arXiv:2209.14988): what a host of the Diff-Instruct family is
without its fake score.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.core.types import Array, Ctx, Nets, Turn
from jaxdistill.diffusion.process import Pred
from jaxdistill.diffusion.times import Uniform
from jaxdistill.objectives import score


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreDistillation:
    """The noise that was added stands for the fake score. It comes before the host among a class's
    bases.
    """

    # of the fake score, hence no fields of these; its guidance is one that they do not read
    critic_steps: int = dataclasses.field(default=1, init=False)
    fake_times: Uniform = dataclasses.field(default=Uniform(), init=False)
    fake_target: str = dataclasses.field(default="v", init=False)
    fake_dropout: float = dataclasses.field(default=0.0, init=False)

    inits = {"student": "teacher"}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.student_loss, gather=self.simulate),)

    def added(self, x0: Array, eps: Array, t: Array) -> Pred:
        """What a fake score that knew the sample would say."""
        v = self.process.velocity(x0, eps, t)
        return Pred(x0, eps, v, v)

    def match(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, Array, Array]:
        xt, t, eps = self.diffuse(x0, self.match_times, ctx, "match")
        gradient = self.direction(x0, self.real(net, xt, t, ctx), self.added(x0, eps, t), t)
        return score.gradient_surrogate(x0, gradient), xt, t
