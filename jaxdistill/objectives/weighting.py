"""Weights of denoising losses. All but the last four multiply ||x0_hat - x0||^2, from alpha(t) and
sigma(t) of the process.

An error d of x0 is -(alpha / sigma) d in eps and (alpha' - alpha sigma' / sigma) d in the velocity,
so a loss on any target is a weighted loss on x0. 00-foundations, sections 2 and 3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array


def snr(alpha: Array, sigma: Array) -> Array:
    """(alpha / sigma)^2: the unit loss on eps."""
    return (alpha / sigma) ** 2


def velocity(alpha: Array, sigma: Array, d_alpha: Array, d_sigma: Array) -> Array:
    """(alpha' - alpha sigma' / sigma)^2: the unit loss on dx_t/dt, of `Process.coefs(t)`; 1 / t^2
    for rectified flow.
    """
    return (d_alpha - alpha * d_sigma / sigma) ** 2


def vp_velocity(alpha: Array, sigma: Array) -> Array:
    """SNR + 1 = 1 / sigma^2: the unit loss on alpha eps - sigma x0, variance preserving
    (arXiv:2202.00512).
    """
    return snr(alpha, sigma) + 1


def truncated_snr(alpha: Array, sigma: Array) -> Array:
    """max(SNR, 1) (progressive distillation, arXiv:2202.00512)."""
    return jnp.maximum(snr(alpha, sigma), 1.0)


def min_snr(alpha: Array, sigma: Array, gamma: float = 5.0) -> Array:
    """min(SNR, gamma) (arXiv:2303.09556)."""
    return jnp.minimum(snr(alpha, sigma), gamma)


def edm(sigma: Array, sigma_data: float = 0.5) -> Array:
    """(sigma^2 + sd^2) / (sigma sd)^2: the unit loss on EDM's network output (arXiv:2206.00364,
    table 1).
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def uncertainty(loss: Array, log_var: Array) -> Array:
    """e^-u L + u with a learnt u (EDM2, arXiv:2312.02696); best at u = log E[L], where it is 1 + u."""
    return jnp.exp(-log_var) * loss + log_var


def adaptive(loss: Array, c: float = 1e-2, p: float = 1.0) -> Array:
    """sg[1 / (L + c)^p], a weight for `loss` [B], summed over dimensions (MeanFlow,
    arXiv:2505.13447).
    """
    return 1 / (jax.lax.stop_gradient(loss) + c) ** p


def barron(loss: Array, alpha: float = 1.0, c: float = 1e-3) -> Array:
    """sg[(L / ((c^2 + 1e-8) |alpha - 2|) + 1)^(alpha / 2 - 1)] / c, a weight for mean squared
    errors L [B] (TwinFlow, arXiv:2512.05150, after Barron's robust loss, arXiv:1701.03077).

    For L >> c^2 and alpha = 1 the weighted loss has the gradient of 2 sqrt(L); for alpha = 2 the
    weight is 1 / c.
    """
    if alpha == 2:
        return jnp.full_like(loss, 1 / c)
    return (jax.lax.stop_gradient(loss) / (c**2 + 1e-8) / abs(alpha - 2) + 1) ** (alpha / 2 - 1) / c


def gap(t: Array, r: Array) -> Array:
    """1 + tan(72 degrees x (1 - (|t| - |r|))), of average velocities between flow times: 1 for the
    whole way, 4.08 at |r| = |t| (TwinFlow, arXiv:2512.05150).
    """
    return 1 + jnp.tan((1 - (jnp.abs(t) - jnp.abs(r))) * (jnp.pi / 2.5))
