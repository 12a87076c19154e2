"""GKD - On-Policy Distillation of Language Models (arXiv:2306.13649).

A student that is only shown given text meets its own mistakes for the first time when it writes.
Here a share of the batches is the student's own continuation of the prompts, on which the teacher's
next-token laws are matched under a generalised Jensen-Shannon divergence. No gradient flows through
the sampling.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxdistill.core.types import Batch, Ctx, Nets, Out, Refused, Turn
from jaxdistill.methods.language._rollout import Writing
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import common_vocabulary
from jaxdistill.objectives.schedule import Schedule, bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class GKD(KD, Writing):
    """`hard_weight` is of the batches that the data wrote: on the student's own text, which has no
    label but itself, the loss is the divergence alone.
    """

    kind: str = "jsd"
    beta: float | Schedule = (
        # of the JSD: towards 0 forward KL, towards 1 reverse KL; the paper's 0.1, 0.5, 0.9, best by
        # task
        0.5
    )
    on_policy: float = (
        0.5  # lambda: share of batches that the student writes itself; the paper's 0, 0.5, 1
    )

    unused = {"params": "method.beta is the JSD's"}

    def __post_init__(self):
        KD.__post_init__(self)
        Writing.__post_init__(self)
        if not 0 <= self.on_policy <= 1:
            raise Refused(f"method.on_policy={self.on_policy}: expected 0 to 1")
        if not 0 <= bounds(self.beta)[0] <= bounds(self.beta)[1] <= 1:
            raise Refused(f"method.beta={self.beta}: expected 0 to 1")
        if self.on_policy == 1 and self.hard_weight != 0:
            raise Refused(
                f"method.hard_weight={self.hard_weight}: expected 0 where method.on_policy=1, for no batch has the data's tokens"
            )

    @property
    def options(self):
        return {"beta": self.beta}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(("student",), self.own_loss, when=self.writes, gather=self.rollout),
            Turn(("student",), self.loss, when=lambda step: not self.writes(step)),
        )

    def own_loss(self, net: Nets, ctx: Ctx) -> Out:
        """The divergence alone, on what the student wrote."""
        return (dataclasses.replace(self, hard_weight=0.0) if self.hard_weight else self).loss(
            net, ctx
        )

    def writes(self, step: int) -> bool:
        """Whether the student writes the batch of this step: a fixed pseudo-random draw, the same
        in every run.
        """
        return np.random.default_rng(step).random() < self.on_policy

    def rollout(self, net: Nets, ctx: Ctx) -> Batch:
        """Algorithm 1, y ~ p_student(. | x): its continuations, in the places where the data has
        the responses.
        """
        return self.write(net.student, ctx, "write", vocab=common_vocabulary(net))
