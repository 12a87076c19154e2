"""Consistency training without a teacher, improved: iCT (arXiv:2310.14189) and ECT
(arXiv:2406.14548).

Both drop the averaged target network and weigh a pair of times by 1 / (t - r). iCT trains from
scratch on a grid that doubles; ECT tunes a pretrained diffusion network, letting r grow from the
data towards t. Networks here have no dropout, which both papers share between the two points.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxdistill.diffusion.times import LogNormalSNR, Uniform
from jaxdistill.methods.trajectory.consistency import DiscreteConsistency, GrowingGrid
from jaxdistill.objectives import consistency


@dataclasses.dataclass(frozen=True, kw_only=True)
class ICT(GrowingGrid):
    """Intervals double in number from s0 to s1, and are drawn by the lognormal mass in them."""

    s0: int = 10
    s1: int = 1280
    mean: float = -1.1  # of log(sigma / alpha)
    std: float = 2.0

    target = "student"
    count = staticmethod(consistency.ict_levels)

    def logits(self, levels):
        return jnp.log(
            consistency.ict_probs(jnp.exp(-self.process.lam(levels)), self.mean, self.std)
        )

    def weight(self, t, r):
        return 1 / (t - r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ECT(DiscreteConsistency):
    """r = t max(0, 1 - n(t) / q^(stage + 1)) grows with the stages; at r = 0 it is diffusion
    training.
    """

    times: Uniform = LogNormalSNR(mean=-1.1, std=2.0)
    stage_steps: int = 50_000  # steps between stages
    q: float = 2.0  # 256 for short tuning

    target = "student"

    def pair(self, ctx, n):
        t = self.times.draw(self.process, ctx.key("t"), n)
        return t, consistency.ect_time(t, ctx.step // self.stage_steps, self.q)

    def clean(self, r):
        """At r = 0 alone: above it the network is asked, below t_min too, where t may lie as well."""
        return r <= 0

    def weight(self, t, r):
        return 1 / (t - r)
