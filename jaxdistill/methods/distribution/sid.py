"""SiD - Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models
for One-Step Generation (arXiv:2404.04057).

The student's samples x0 are noised to x_t; its Fisher divergence from the teacher at every noise
level is the mean of |D_phi(x_t) - D_psi(x_t)|^2, D_phi the teacher and D_psi the denoiser of the
student's own samples. D_psi depends on the student, so that loss has a gradient that no network
gives; the identity E[D_psi - x0 | x_t] = 0 makes another loss with an equal value, and a difference
of both estimates the gradient well. The gradient flows through x0 and, by x_t, through both
denoisers; no data is needed:

    L1 = |D_phi - D_psi|^2                                                                 (1)
    L2 = (D_phi - D_psi) . (D_phi - x0)                                                    (2)
    L = scale (L2 - alpha L1) / sg[mean |x0 - D_phi|], summed over dimensions              (3)

alpha = 1/2 is half the exact gradient of the Fisher divergence; the paper's best is 1.2. The fake
score learns by denoising, as in Diff-Instruct.

Departures: the fake score's loss is a mean over dimensions, in the code a sum. Adam's steps are
equal where its eps (1e-8 there) is divided by the number of dimensions.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Ctx, Nets
from jaxdistill.diffusion.times import Karras, Uniform
from jaxdistill.methods.distribution.diff_instruct import EDMDiffInstruct
from jaxdistill.objectives import score


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiD(EDMDiffInstruct):
    # noise level of the student's input and the level it is told, in units of the data: the
    # paper's sigma_init
    student_times: tuple[float, ...] = (2.5,)
    # of the student's loss: sigma from .002 to 24.4; the code's tmax = 800 of 1000
    match_times: Uniform = Karras(high=0.8)
    alpha: float = 1.2  # of L1; the paper's 1.2, and 1 in its ablations
    scale: float = 100.0  # of the student's loss; the code's

    needs = {"x": Shaped[Spec, "B ..."]}  # only its shape is read

    def identity(self, x0: Array, real: Array, fake: Array) -> Array:
        """[B], from the sample and the two denoised ones [B ...]."""
        return score.sid_loss(x0, real, fake, self.alpha, self.scale)  # (3)

    def match(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, Array, Array]:
        """(loss, x_t, t)."""
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        real = self.real(net, xt, t, ctx).x0
        fake = self.fake(net, xt, t, ctx).x0
        return jnp.mean(self.identity(x0, real, fake)), xt, t
