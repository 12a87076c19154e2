"""Modes with a texture: thin rings, and the exact denoiser of blurred rings without it."""

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
    """A mixture of rings in two dimensions.

    Each mode is a circle around its mean, with the mode's `std` as radius, blurred by a Gaussian.
    The Gaussian's standard deviation is `thickness` radii in the samples and `blur` radii in the
    exact denoiser; where both are equal, the denoiser is that of the samples' own distribution.
    """

    modes: Annotated[int, Range(1, 4096)] = 8
    std: Positive = 0.15  # mean radius; each mode's is within 25 % of it
    thickness: Positive = 0.08
    blur: Positive = 0.75  # from 0.71 on a blurred ring has no hole

    def __post_init__(self):
        super().__post_init__()
        if self.dim != 2:
            raise Refused(
                f"data.dim={self.dim}: expected 2, since rings lie in a plane"
            )

    def draw(self, rng, n):
        _, means, radii = self.components
        mode = self.drawn_modes(rng, n)
        angle = rng.uniform(0, 2 * np.pi, n)
        circle = np.stack([np.cos(angle), np.sin(angle)], 1)
        offset = circle + self.thickness * rng.standard_normal((n, 2))
        x = means[mode] + radii[mode, None] * offset
        return {"x": x.astype(np.float32), **self.conditions(mode)}

    def denoise(self, process, x, t, cond=None, **_):
        """Exact E[x0 | x_t] of the blurred rings.

        Given the mode, x_t - a m is a point on a circle of radius a rho plus N(0, v I); the
        posterior of its angle is a von Mises distribution.
        """
        weights, means, radii = self.components
        log_w = jnp.asarray(np.log(weights.astype(np.float64)), x.dtype)
        means = jnp.asarray(means, x.dtype)
        radii = jnp.asarray(radii, x.dtype)
        a, s, da, ds = process.coefs(expand(t, x))  # [B 1]
        own = (self.blur * radii) ** 2
        v = a**2 * own + s**2  # [B K]
        offset = x[:, None] - a[..., None] * means  # [B K 2]
        r = jnp.sqrt(jnp.sum(offset**2, -1) + 1e-20)
        kappa = a * radii * r / v
        # Bessel functions times exp(-kappa).
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
        velocity = da * x0 + ds * eps
        return Pred(x0, eps, velocity, velocity)
