"""Distribution matching through two denoisers: phi of the real law (`real_x0`), psi of the
student's own (`fake_x0`).

With x_t = alpha x + sigma eps and x the student's sample, KL(student || real) at time t has the
gradient w_t (alpha / sigma)^2 (D_psi(x_t) - D_phi(x_t)) in x. DMD arXiv:2311.18828, Diff-Instruct
arXiv:2305.18455, SiD arXiv:2404.04057, SIM arXiv:2410.16794 and Uni-Instruct arXiv:2505.20755 weigh
or integrate it differently, the last with the weights of objectives/fdivergence.py. 00-foundations,
section 8.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array


def gradient_surrogate(x: Array, grad: Array) -> Array:
    """A scalar whose gradient in `x` is exactly grad / numel; its value is mean(grad^2) / 2. `grad`
    is under stop_gradient.
    """
    return jnp.mean(_pull(x, grad))


def summed_surrogate(x: Array, grad: Array) -> Array:
    """The same for each sample, summed over dimensions: [B ...] -> [B], with gradient exactly
    `grad` in `x`.
    """
    return jnp.sum(_pull(x, grad), axis=range(1, x.ndim))


def _pull(x: Array, grad: Array) -> Array:
    grad = jax.lax.stop_gradient(grad)
    return grad * (x - jax.lax.stop_gradient(x)) + 0.5 * grad**2


def inverse_distance(x0: Array, real_x0: Array) -> Array:
    """1 / max(mean |x0 - D_phi|, 1e-5) per sample, [B 1 ...], under stop_gradient (SiD's weight)."""
    return 1 / jnp.maximum(_distance(x0, real_x0), 1e-5)


def _distance(x0: Array, real_x0: Array) -> Array:
    """Mean |x0 - D_phi| per sample, [B 1 ...], under stop_gradient."""
    gap = jax.lax.stop_gradient(jnp.abs(x0 - real_x0))
    return jnp.mean(gap, axis=range(1, gap.ndim), keepdims=True)


def dmd_gradient(x0: Array, real_x0: Array, fake_x0: Array, floor: float = 0.0) -> Array:
    """(D_psi - D_phi) / mean|x0 - D_phi|, the mean over each sample's dimensions (DMD, eq. 8); all
    [B ...].

    Under stop_gradient. The normaliser is at least `floor`; where it is 0 the gradient is 0.
    """
    grad = jax.lax.stop_gradient(fake_x0 - real_x0) / jnp.maximum(_distance(x0, real_x0), floor)
    return jnp.where(jnp.isfinite(grad), grad, 0.0)


def diff_instruct_gradient(real_x0: Array, fake_x0: Array, weight: Array | float = 1.0) -> Array:
    """weight (D_psi - D_phi), the integral KL's gradient (Diff-Instruct); all [B ...], `weight` [B
    1 ...] or scalar.

    `weight` is w_t (alpha_t / sigma_t)^2; 1 is w_t = (sigma_t / alpha_t)^2. Under stop_gradient.
    """
    return jax.lax.stop_gradient(weight * (fake_x0 - real_x0))


def kl_gradient(
    real_x0: Array, fake_x0: Array, alpha: Array, sigma: Array, ratio: Array | float = 1.0
) -> Array:
    """alpha_{t|s} (s_psi - s_phi) = ratio alpha / sigma^2 (D_psi - D_phi): the gradient in x_s of
    KL(student || real) at time t.

    x_t = ratio x_s + noise was made from a sample at s < t (ratio alpha_t where that is clean).
    Under stop_gradient.
    """
    return jax.lax.stop_gradient(ratio * alpha / sigma**2 * (fake_x0 - real_x0))


def sid_loss(
    x0: Array, real_x0: Array, fake_x0: Array, alpha: float = 1.2, scale: float = 100.0
) -> Array:
    """Score identity distillation (SiD), summed over dimensions: [B ...] -> [B].

    scale (D_phi - D_psi)((D_phi - x0) - alpha (D_phi - D_psi)) / sg[mean|x0 - D_phi|]. The gradient
    flows through x0 and both denoisers' inputs. The value turns negative for alpha > 1 and measures
    nothing: watch the gradient.
    """
    gap = real_x0 - fake_x0
    weight = scale * inverse_distance(x0, real_x0)
    return jnp.sum(weight * gap * ((real_x0 - x0) - alpha * gap), axis=range(1, x0.ndim))


def sim_loss(x0: Array, real_x0: Array, fake_x0: Array, c: float) -> Array:
    """Score implicit matching (SIM) under the pseudo-Huber distance sqrt(|.|^2 + c^2) - c of
    denoisers: [B ...] -> [B].

    gap . (D_psi - x0) / sqrt(|gap|^2 + c^2) with gap = D_phi - D_psi, summed over dimensions; the
    gradient flows through x0 and both denoisers' inputs, the quotient included. For c -> inf, c
    times it is SiD's at alpha = 1 without its weight.
    """
    gap = real_x0 - fake_x0
    dims = range(1, x0.ndim)
    return jnp.sum(gap * (fake_x0 - x0), dims) / jnp.sqrt(jnp.sum(gap**2, dims) + c**2)
