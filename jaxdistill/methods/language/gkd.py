"""GKD - On-Policy Distillation of Language Models (arXiv:2306.13649).

A student that was only trained on given text meets its own mistakes for the first time when it
generates. Here a share of the batches has the student's own responses to the prompts; on them the
student's next-token distributions are matched to the teacher's by a generalised Jensen-Shannon
divergence. No gradient flows through the sampling.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxdistill.core.types import Batch, Ctx, Nets, Out, Refused, Turn
from jaxdistill.methods.language._rollout import Writing
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import common_vocabulary
from jaxdistill.objectives.divergence import Divergence, JensenShannon


@dataclasses.dataclass(frozen=True, kw_only=True)
class GKD(KD, Writing):
    """`hard_weight` applies to batches of the data's own text.

    On the student's responses, which have no other label, the loss is the divergence alone.
    """

    # of the student's distribution from the teacher's; the paper's beta is 0.1, 0.5 or 0.9, and the
    # best one depends on the task
    divergence: Divergence = JensenShannon(beta=0.5)
    # lambda: share of batches with the student's own responses; the paper's 0, 0.5 and 1
    on_policy: float = 0.5

    def __post_init__(self):
        KD.__post_init__(self)
        Writing.__post_init__(self)
        if not 0 <= self.on_policy <= 1:
            raise Refused(f"method.on_policy={self.on_policy}: expected 0 to 1")
        if self.on_policy == 1 and self.hard_weight != 0:
            given = f"method.hard_weight={self.hard_weight}"
            reason = "no batch has the data's tokens"
            raise Refused(
                f"{given}: expected 0 where method.on_policy=1, for {reason}"
            )

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(
                ("student",),
                self.on_policy_loss,
                when=self.is_on_policy,
                gather=self.rollout,
            ),
            Turn(("student",), self.loss, when=self.is_off_policy),
        )

    def is_on_policy(self, step: int) -> bool:
        """Whether the batch of this step has the student's responses.

        The draw depends on the step alone, so that it is the same in every run.
        """
        return np.random.default_rng(step).random() < self.on_policy

    def is_off_policy(self, step: int) -> bool:
        return not self.is_on_policy(step)

    def on_policy_loss(self, net: Nets, ctx: Ctx) -> Out:
        """The divergence alone."""
        if not self.hard_weight:
            return self.loss(net, ctx)
        return dataclasses.replace(self, hard_weight=0.0).loss(net, ctx)

    def rollout(self, net: Nets, ctx: Ctx) -> Batch:
        """Algorithm 1: responses y ~ p_student(. | x) in the places of the data's."""
        return self.write(net.student, ctx, "write", vocab=common_vocabulary(net))
