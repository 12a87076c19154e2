"""Distribution matching through two denoisers: phi of the real law (`real_x0`), psi of the student's own (`fake_x0`).

With x_t = alpha x + sigma eps and x the student's sample, KL(student || real) at time t has the gradient
w_t (alpha / sigma)^2 (D_psi(x_t) - D_phi(x_t)) in x. DMD arXiv:2311.18828, Diff-Instruct arXiv:2305.18455, SiD
arXiv:2404.04057 and f-distill arXiv:2502.15681 weigh or integrate it differently. 00-foundations, section 8.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, lookup


def gradient_surrogate(x: Array, grad: Array) -> Array:
    """A scalar whose gradient in `x` is exactly grad / numel; its value is mean(grad^2) / 2. `grad` is under stop_gradient."""
    grad = jax.lax.stop_gradient(grad)
    return jnp.mean(grad * (x - jax.lax.stop_gradient(x)) + 0.5 * grad**2)


def _distance(x0: Array, real_x0: Array) -> Array:
    """Mean |x0 - D_phi| per sample, [B 1 ...], under stop_gradient."""
    gap = jax.lax.stop_gradient(jnp.abs(x0 - real_x0))
    return jnp.mean(gap, axis=range(1, gap.ndim), keepdims=True)


def dmd_gradient(x0: Array, real_x0: Array, fake_x0: Array, floor: float = 0.0) -> Array:
    """(D_psi - D_phi) / mean|x0 - D_phi|, the mean over each sample's dimensions (DMD, eq. 8); all [B ...].

    Under stop_gradient. The normaliser is at least `floor`; where it is 0 the gradient is 0.
    """
    grad = jax.lax.stop_gradient(fake_x0 - real_x0) / jnp.maximum(_distance(x0, real_x0), floor)
    return jnp.where(jnp.isfinite(grad), grad, 0.0)


def diff_instruct_gradient(real_x0: Array, fake_x0: Array, weight: Array | float = 1.0) -> Array:
    """weight (D_psi - D_phi), the integral KL's gradient (Diff-Instruct); all [B ...], `weight` [B 1 ...] or scalar.

    `weight` is w_t (alpha_t / sigma_t)^2; 1 is w_t = (sigma_t / alpha_t)^2. Under stop_gradient.
    """
    return jax.lax.stop_gradient(weight * (fake_x0 - real_x0))


def kl_gradient(real_x0: Array, fake_x0: Array, alpha: Array, sigma: Array, ratio: Array | float = 1.0) -> Array:
    """alpha_{t|s} (s_psi - s_phi) = ratio alpha / sigma^2 (D_psi - D_phi): the gradient in x_s of KL(student || real) at time t.

    x_t = ratio x_s + noise was made from a sample at s < t (ratio alpha_t where that is clean). Under stop_gradient.
    """
    return jax.lax.stop_gradient(ratio * alpha / sigma**2 * (fake_x0 - real_x0))


def sid_loss(x0: Array, real_x0: Array, fake_x0: Array, alpha: float = 1.2, scale: float = 100.0) -> Array:
    """Score identity distillation (SiD), summed over dimensions: [B ...] -> [B].

    scale (D_phi - D_psi)((D_phi - x0) - alpha (D_phi - D_psi)) / sg[mean|x0 - D_phi|]. The gradient flows through x0 and
    both denoisers' inputs. The value turns negative for alpha > 1 and measures nothing: watch the gradient.
    """
    gap = real_x0 - fake_x0
    weight = scale / jnp.maximum(_distance(x0, real_x0), 1e-5)
    return jnp.sum(weight * gap * ((real_x0 - x0) - alpha * gap), axis=range(1, x0.ndim))


F_WEIGHTS = {
    "reverse_kl": lambda r: jnp.ones_like(r),
    "forward_kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "hellinger": lambda r: jnp.sqrt(r),
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}  # h(r), r = p_real / p_fake: what an f-divergence multiplies the reverse KL's gradient by (f-distill, table 1)


def f_weight(kind: str, logit: Array) -> Array:
    """h(exp(logit)) over its batch mean, under stop_gradient; [B] -> [B].

    `logit` is a discriminator's estimate of log p_real - log p_fake, clipped to [-10, 10]. Raises Refused on an unknown kind.
    """
    h = lookup(F_WEIGHTS, kind, "divergence")(jnp.exp(jnp.clip(jax.lax.stop_gradient(logit), -10.0, 10.0)))
    return h / jnp.mean(h)
