"""GKD - On-Policy Distillation of Language Models (arXiv:2306.13649).

A student that is only shown given text meets its own mistakes for the first time when it writes. Here a share of the
batches is the student's own continuation of the prompts, on which the teacher's next-token laws are matched under a
generalised Jensen-Shannon divergence. No gradient flows through the sampling.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxdistill.core.types import Batch, Ctx, Nets, Turn
from jaxdistill.methods.language._rollout import Writing
from jaxdistill.methods.language.kd import KD


@dataclasses.dataclass(frozen=True, kw_only=True)
class GKD(KD, Writing):
    kind: str = "jsd"
    beta: float = 0.5  # of the JSD: towards 0 forward KL, towards 1 reverse KL; the paper's 0.1, 0.5, 0.9, best by task
    on_policy: float = 0.5  # lambda: share of batches that the student writes itself; the paper's 0, 0.5, 1

    @property
    def options(self):
        return {"beta": self.beta}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(("student",), self.loss, when=self.writes, gather=self.rollout),
            Turn(("student",), self.loss, when=lambda step: not self.writes(step)),
        )

    def writes(self, step: int) -> bool:
        """Whether the student writes the batch of this step: a fixed pseudo-random draw, the same in every run."""
        return np.random.default_rng(step).random() < self.on_policy

    def rollout(self, net: Nets, ctx: Ctx) -> Batch:
        """Algorithm 1, y ~ p_student(. | x): its continuations, in the places where the data has the responses."""
        return self.write(net.student, ctx, "write")
