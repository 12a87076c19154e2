"""Consistency training without a teacher, improved: iCT (arXiv:2310.14189) and ECT
(arXiv:2406.14548).

Both use the network itself in place of an averaged target network, and weigh a pair of times by
1 / (t - r). iCT trains from scratch on a grid that doubles; ECT tunes a pretrained diffusion
network, and r grows from 0 towards t. Networks here have no dropout, which both papers share
between the two points.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxdistill.diffusion.times import LogNormalSNR, Uniform
from jaxdistill.methods.trajectory.consistency import (
    DiscreteConsistency,
    GrowingGrid,
)
from jaxdistill.objectives import consistency


@dataclasses.dataclass(frozen=True, kw_only=True)
class ICT(GrowingGrid):
    """Intervals double in number from s0 to s1, and are drawn by their mass under a lognormal
    distribution.
    """

    # intervals at the start
    s0: int = 10
    # intervals at the end
    s1: int = 1280
    # mean and standard deviation of log(sigma / alpha)
    mean: float = -1.1
    std: float = 2.0

    target_network = "student"
    count = staticmethod(consistency.ict_levels)

    def logits(self, levels):
        sigma = jnp.exp(-self.process.lam(levels))
        return jnp.log(consistency.ict_probs(sigma, self.mean, self.std))

    def weight(self, t, r):
        return 1 / (t - r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ECT(DiscreteConsistency):
    """r = t max(0, 1 - n(t) / q^(stage + 1)) grows with the stages; at r = 0 it is diffusion
    training.
    """

    # distribution of t
    times: Uniform = LogNormalSNR(mean=-1.1, std=2.0)
    # steps between stages
    stage_steps: int = 50_000
    # base of the ratio r / t; 256 for short tuning
    q: float = 2.0

    target_network = "student"

    def pair(self, ctx, n):
        t = self.times.draw(self.process, ctx.key("t"), n)
        return t, consistency.ect_time(t, ctx.step // self.stage_steps, self.q)

    def is_boundary(self, r):
        """At r = 0 alone; above it the network is run, also below t_min, where t may lie too."""
        return r <= 0

    def weight(self, t, r):
        return 1 / (t - r)
