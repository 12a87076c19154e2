"""Distribution matching through two denoisers: phi of the real distribution (`real_x0`), psi of the
student's own (`fake_x0`).

With x_t = alpha x + sigma eps and x the student's sample, KL(student || real) at time t has the
gradient w_t (alpha / sigma)^2 (D_psi(x_t) - D_phi(x_t)) in x. DMD arXiv:2311.18828, Diff-Instruct
arXiv:2305.18455, SiD arXiv:2404.04057, SIM arXiv:2410.16794 and Uni-Instruct arXiv:2505.20755 weigh
or integrate it differently, the last with the weights of objectives/fdivergence.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from jaxdistill.core.types import Array
from jaxdistill.objectives.numerics import sum_per_sample


def gradient_surrogate(
    x: Shaped[Array, "B ..."], grad: Shaped[Array, "B ..."]
) -> Shaped[Array, ""]:
    """A scalar whose gradient in `x` is exactly grad / numel, and whose value is mean(grad^2) / 2.

    `grad` is under stop_gradient.
    """
    return jnp.mean(_surrogate(x, grad))


def summed_surrogate(
    x: Shaped[Array, "B ..."], grad: Shaped[Array, "B ..."]
) -> Shaped[Array, " B"]:
    """A number for each sample whose gradient in `x` is exactly `grad`: `gradient_surrogate` summed
    over dimensions.
    """
    return sum_per_sample(_surrogate(x, grad))


def inverse_distance(
    x0: Shaped[Array, "B ..."], real_x0: Shaped[Array, "B ..."]
) -> Shaped[Array, "B ..."]:
    """SiD's weight 1 / max(mean |x0 - D_phi|, 1e-5) of each sample, [B 1 ...].

    It is under stop_gradient.
    """
    return 1 / jnp.maximum(_distance(x0, real_x0), 1e-5)


def dmd_gradient(
    x0: Shaped[Array, "B ..."],
    real_x0: Shaped[Array, "B ..."],
    fake_x0: Shaped[Array, "B ..."],
    floor: float = 0.0,
) -> Shaped[Array, "B ..."]:
    """(D_psi - D_phi) / mean |x0 - D_phi|, the mean over each sample's dimensions (DMD, eq. 8).

    It is under stop_gradient. The normaliser is at least `floor`; where it is 0 the gradient is 0.
    """
    normaliser = jnp.maximum(_distance(x0, real_x0), floor)
    grad = jax.lax.stop_gradient(fake_x0 - real_x0) / normaliser
    return jnp.where(jnp.isfinite(grad), grad, 0.0)


def diff_instruct_gradient(
    real_x0: Shaped[Array, "B ..."],
    fake_x0: Shaped[Array, "B ..."],
    weight: float | Array = 1.0,
) -> Shaped[Array, "B ..."]:
    """weight (D_psi - D_phi), the gradient of the integral KL (Diff-Instruct).

    It is under stop_gradient. `weight`, [B 1 ...] or a scalar, is w_t (alpha_t / sigma_t)^2; 1
    stands for w_t = (sigma_t / alpha_t)^2.
    """
    return jax.lax.stop_gradient(weight * (fake_x0 - real_x0))


def kl_gradient(
    real_x0: Shaped[Array, "B ..."],
    fake_x0: Shaped[Array, "B ..."],
    alpha: float | Array,
    sigma: float | Array,
    ratio: float | Array = 1.0,
) -> Shaped[Array, "B ..."]:
    """alpha_{t|s} (s_psi - s_phi) = ratio alpha / sigma^2 (D_psi - D_phi), under stop_gradient.

    It is the gradient in x_s of KL(student || real) at time t, where x_t = ratio x_s + noise was
    made from a sample at s < t. For a clean sample the ratio is alpha_t.
    """
    return jax.lax.stop_gradient(ratio * alpha / sigma**2 * (fake_x0 - real_x0))


def sid_loss(
    x0: Shaped[Array, "B ..."],
    real_x0: Shaped[Array, "B ..."],
    fake_x0: Shaped[Array, "B ..."],
    alpha: float = 1.2,
    scale: float = 100.0,
) -> Shaped[Array, " B"]:
    """Score identity distillation (SiD), summed over dimensions.

    scale (D_phi - D_psi)((D_phi - x0) - alpha (D_phi - D_psi)) / sg[mean |x0 - D_phi|]. The
    gradient flows through x0 and through the inputs of both denoisers. For alpha > 1 the value is
    negative and does not measure progress; the size of the gradient does.
    """
    gap = real_x0 - fake_x0
    weight = scale * inverse_distance(x0, real_x0)
    return sum_per_sample(weight * gap * ((real_x0 - x0) - alpha * gap))


def sim_loss(
    x0: Shaped[Array, "B ..."],
    real_x0: Shaped[Array, "B ..."],
    fake_x0: Shaped[Array, "B ..."],
    c: float,
) -> Shaped[Array, " B"]:
    """Score implicit matching (SIM) under the pseudo-Huber distance of the denoisers.

    gap . (D_psi - x0) / sqrt(|gap|^2 + c^2) with gap = D_phi - D_psi. The gradient flows through x0
    and through the inputs of both denoisers, also in the quotient. For c -> inf, c times it is
    SiD's loss at alpha = 1 without its weight.
    """
    gap = real_x0 - fake_x0
    product = sum_per_sample(gap * (fake_x0 - x0))
    return product / jnp.sqrt(sum_per_sample(gap**2) + c**2)


def _surrogate(x: Array, grad: Array) -> Array:
    grad = jax.lax.stop_gradient(grad)
    return grad * (x - jax.lax.stop_gradient(x)) + 0.5 * grad**2


def _distance(x0: Array, real_x0: Array) -> Array:
    """Mean |x0 - D_phi| of each sample, [B 1 ...], under stop_gradient."""
    gap = jax.lax.stop_gradient(jnp.abs(x0 - real_x0))
    return jnp.mean(gap, axis=range(1, gap.ndim), keepdims=True)
