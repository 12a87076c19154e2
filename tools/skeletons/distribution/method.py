"""My method (arXiv:2601.00000).

The idea in three sentences. As it stands, it is Diff-Instruct with a weight of its own: a variant
subclasses and overrides one piece. Departures from the paper are stated here.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxdistill.core.types import Array
from jaxdistill.diffusion.process import Pred, expand
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.objectives import score


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyMethod(DiffInstruct):
    # of the noise level in the gradient's weight; each field with its role, its unit and the
    # paper's value
    power: float = 0.0

    def direction(self, x0: Array, real: Pred, fake: Pred, t: Array) -> Array:
        weight = (
            self.process.alpha_sigma(expand(t, x0))[1] ** self.power
            if self.power
            else jnp.ones(())
        )
        return score.diff_instruct_gradient(real.x0, fake.x0, weight)  # eq. 1
