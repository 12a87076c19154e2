"""RLAD - Reinforcement-aware knowledge distillation (arXiv:2602.22495).

A KL to the teacher beside a reward pulls the student whether or not that helps. Here the teacher
enters GRPO's ratio instead (trust-region ratio distillation, TRRD): what the student is compared to
is a geometric mixture of the policy that wrote and the teacher, so that the advantage keeps the
direction and the teacher only moves the centre of the clipping.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.core.fields import Limit
from jaxdistill.core.types import Array, Batch, Refused, lookup
from jaxdistill.methods.language.grpo import GRPO
from jaxdistill.objectives import policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLAD(GRPO):
    """alpha = 1 is GRPO, alpha = 0 compares to the teacher alone, as the equations and the ablation
    have it (a sentence of the paper says the reverse). How the clamp differentiates, the
    reference's weight and `updates` are not in the paper.
    """

    alpha: float = 0.5  # exponent of the old policy in the mixture; the teacher's is 1 - alpha
    limit: Limit = 1.0  # of |log q / p|, nats; inf: no clamp, which is unstable
    # literal: no gradient through log q / p outside the limit | straight_through: as if inside
    clamp: str = "literal"
    updates: int = 4  # with 1 the old policy's part of the ratio is inert
    clip_high: float = 0.28
    kl_weight: float = 0.0  # of the KL to a reference policy

    def __post_init__(self):
        super().__post_init__()
        lookup(policy.CLAMPS, self.clamp, "method.clamp")
        if not 0 <= self.alpha <= 1:
            raise Refused(f"method.alpha={self.alpha}: expected 0 to 1")

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("teacher", *super().frozen)

    def log_ratio(self, log_q: Array, batch: Batch) -> Array:
        """alpha log q / old + (1 - alpha) clamp(log q / p): the anchor old^alpha p^(1 - alpha) is
        not renormalised.
        """
        to_teacher = policy.CLAMPS[self.clamp](log_q - batch["log_teacher"], self.limit)
        return self.alpha * super().log_ratio(log_q, batch) + (1 - self.alpha) * to_teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDRL(GRPO):
    """The baseline (arXiv:2506.02208): GRPO whose KL is to the teacher, on the same roll-outs."""

    kl_weight: float = 2e-3  # beta; a default of this library
    kl_kind: str = "k2"  # whose gradient is that of the reverse KL
    updates: int = 4
    clip_high: float = 0.28

    anchor = "teacher"

    def __post_init__(self):
        super().__post_init__()
        if not self.kl_weight:
            raise Refused("method.kl_weight=0: KDRL without its teacher is GRPO")
