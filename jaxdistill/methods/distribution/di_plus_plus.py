"""DI++ - Diff-Instruct++: Training One-step Text-to-image Generator Model to Align with Human
Preferences (arXiv:2410.18881).

Alignment as in reinforcement learning from human feedback: the one-step student climbs a reward
r(x0, c) of its own samples, and the integral KL divergence from the teacher's diffusion keeps it
near what the teacher makes. The divergence's gradient is Diff-Instruct's, the reward's is its own,
through the sample; no image data is needed:

    L = L_match - reward_weight E[r(x0, c)]                                                (1)

Guidance of the teacher (`guidance`) is, as the paper shows, a reward too: log p(c | x_t).

The frozen role `reward` is called with (x0, t = 0, cond), as a judge of noisy samples is with their
time; it must be differentiable in x0.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Ctx, Nets
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewarded:
    """A reward for the student of the method that it is mixed into; it comes before that method
    among a class's bases.
    """

    # of the mean reward in the student's loss, in units of that loss; uncertain: the paper's scale
    # depends on the reward and on the sum over dimensions
    reward_weight: float = 1.0

    frozen = ("teacher", "reward")

    def match(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, Array, Array]:
        """(loss, x_t, t)."""
        loss, xt, t = super().match(net, ctx, x0)
        clean = jnp.zeros(x0.shape[:1])
        reward = net.reward(x0, clean, ctx.batch.get("cond"))
        return loss - self.reward_weight * jnp.mean(reward), xt, t  # (1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DIPlusPlus(Rewarded, DiffInstruct):
    """Diff-Instruct with a reward."""

    needs = {"x": Shaped[Spec, "B ..."]}  # only its shape is read
