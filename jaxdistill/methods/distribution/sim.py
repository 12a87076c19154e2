"""SIM - One-Step Diffusion Distillation through Score Implicit Matching (arXiv:2410.16794).

Any distance between the scores of student and teacher, averaged over noised samples whose
distribution is held fixed, has a gradient in the student that can be computed: with y = D_phi -
D_psi, the difference of the teacher's and the student's denoisers at x_t, it is that of the mean of

    L = scale d'(y) . (D_psi - x0)                                                         (1)

d' the derivative of the distance; the gradient flows through x0 and, by x_t, through both
denoisers, d' included. The paper takes the pseudo-Huber distance d(y) = sqrt(|y|^2 + c^2) - c,
whose derivative is y over a norm: noise levels pull alike, without SiD's weight. The squared
distance gives SiD at alpha = 1. No data is needed.

Departures: distances are those of denoisers, in the paper of scores; the two differ by a factor
that depends on the noise level alone.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.core.types import Array
from jaxdistill.methods.distribution.sid import SiD
from jaxdistill.objectives import score


@dataclasses.dataclass(frozen=True, kw_only=True)
class SIM(SiD):
    # SiD's, no field here
    alpha: float = dataclasses.field(default=1.0, init=False)
    # c / sqrt(number of dimensions), in units of the data. Uncertain: the paper's is not known
    huber: float = 1e-2

    def identity(self, x0: Array, real: Array, fake: Array) -> Array:
        c = self.huber * (x0[0].size ** 0.5)
        return self.scale * score.sim_loss(x0, real, fake, c)  # (1)
