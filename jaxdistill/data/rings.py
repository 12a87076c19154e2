"""Modes with a texture: thin rings, and the exact denoiser of the same rings blurred, which has
lost it.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.fields import Positive, Range
from jaxdistill.core.types import Refused
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.process import Pred, expand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rings(Mixture):
    """Each mode is a circle around its mean, its radius the mode's `std`, blurred by a Gaussian: by
    `thickness` radii in the samples, by `blur` radii in the exact denoiser. With equal numbers that
    is the denoiser of the samples' own law.

    Raises Refused in other than two dimensions.
    """

    modes: Annotated[int, Range(1, 4096)] = 8
    std: Positive = 0.15  # mean radius; each mode's is within 25 % of it
    thickness: float = 0.08
    blur: float = 0.75  # from 0.71 on a blurred ring has no hole

    def __post_init__(self):
        super().__post_init__()
        if self.dim != 2 or min(self.thickness, self.blur) <= 0:
            raise Refused(
                f"data: dim={self.dim}, thickness={self.thickness}, blur={self.blur}: expected 2 and numbers above 0"
            )

    def draw(self, rng, n):
        weights, means, radii = self.components
        mode = rng.choice(
            self.modes, n, p=weights / weights.sum(dtype=np.float64).astype(np.float64)
        )
        angle = rng.uniform(0, 2 * np.pi, n)
        offset = np.stack([np.cos(angle), np.sin(angle)], 1) + self.thickness * rng.standard_normal(
            (n, 2)
        )
        x = means[mode] + radii[mode, None] * offset
        return {"x": x.astype(np.float32), **self.conditions(mode)}

    def denoise(self, process, x, t, cond=None, **_):
        """Exact E[x0 | x_t] of the blurred rings: x_t - a m is a von Mises-weighted circle of
        radius a rho plus N(0, v I).
        """
        log_w, means, radii = (
            jnp.asarray(a, x.dtype)
            for a in (np.log(self.components[0].astype(np.float64)), *self.components[1:])
        )
        a, s, da, ds = process.coefs(expand(t, x))  # [B 1]
        own = (self.blur * radii) ** 2
        v = a**2 * own + s**2  # [B K]
        offset = x[:, None] - a[..., None] * means  # [B K 2]
        r = jnp.sqrt(jnp.sum(offset**2, -1) + 1e-20)
        kappa = a * radii * r / v
        # times exp(-kappa)
        i0 = jax.scipy.special.i0e(kappa)
        i1 = jax.scipy.special.i1e(kappa)
        logits = log_w - jnp.log(v) - (r - a * radii) ** 2 / (2 * v) + jnp.log(i0)
        if cond is not None:
            logits = jnp.where(self.hidden(cond), -jnp.inf, logits)
        w = jax.nn.softmax(logits)[..., None]
        on_circle = (radii * i1 / (i0 * r))[..., None] * offset  # E[rho u]
        rest = (offset - a[..., None] * on_circle) / v[..., None]
        x0 = jnp.sum(w * (means + on_circle + (a * own)[..., None] * rest), 1)
        eps = jnp.sum(w * s[..., None] * rest, 1)
        vel = da * x0 + ds * eps
        return Pred(x0, eps, vel, vel)
