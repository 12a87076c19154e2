"""RLAD - Reinforcement-aware knowledge distillation (arXiv:2602.22495).

A KL to the teacher beside a reward draws the student to the teacher whether or not that improves
the reward. Here the teacher enters GRPO's ratio instead (trust-region ratio distillation, TRRD):
the student is compared with a geometric mixture of the policy that sampled and the teacher. The
advantage keeps its direction, and the teacher only moves the centre of the clipping.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.core.fields import Limit
from jaxdistill.core.types import Refused, lookup
from jaxdistill.methods.language.grpo import GRPO
from jaxdistill.objectives import policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLAD(GRPO):
    """alpha = 1 is GRPO, and alpha = 0 compares with the teacher alone, as the equations and the
    ablation have it; a sentence of the paper says the reverse.

    The paper does not say how the clamp differentiates, nor the reference's weight and `updates`.
    """

    # exponent of the old policy in the mixture; the teacher's is 1 - alpha
    alpha: float = 0.5
    # |log q / p| is clamped to it, nats; inf: no clamp, which is unstable
    limit: Limit = 1.0
    # gradient beyond the limit: literal (none) | straight_through (as if inside)
    clamp: str = "literal"
    # updates of the student before it becomes `old` again; with 1 the old policy has no influence
    updates: int = 4
    # the ratio is clipped to 1 + clip_high
    clip_high: float = 0.28
    # weight of the KL to a reference policy
    kl_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        lookup(policy.CLAMPS, self.clamp, "method.clamp")
        if not 0 <= self.alpha <= 1:
            raise Refused(f"method.alpha={self.alpha}: expected 0 to 1")

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("teacher", *super().frozen)

    def log_ratio(self, log_q, batch):
        """alpha log q / old + (1 - alpha) clamp(log q / p).

        The mixture old^alpha p^(1 - alpha) is not normalised.
        """
        clamp = policy.CLAMPS[self.clamp]
        to_teacher = clamp(log_q - batch["log_teacher"], self.limit)
        return (
            self.alpha * super().log_ratio(log_q, batch)
            + (1 - self.alpha) * to_teacher
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDRL(GRPO):
    """The baseline (arXiv:2506.02208): GRPO whose KL is to the teacher, on the same roll-outs."""

    # beta, weight of the KL to the teacher; a default of this library
    kl_weight: float = 2e-3
    # estimator of the KL; the gradient of k2 is that of the reverse KL
    kl_kind: str = "k2"
    # updates of the student before it becomes `old` again
    updates: int = 4
    # the ratio is clipped to 1 + clip_high
    clip_high: float = 0.28

    anchor = "teacher"

    def __post_init__(self):
        super().__post_init__()
        if not self.kl_weight:
            raise Refused("method.kl_weight=0: KDRL without its teacher is GRPO")
