"""Weights of denoising losses.

Those that are functions of alpha and sigma multiply ||x0_hat - x0||^2. An error d of x0 is
-(alpha / sigma) d in eps and (alpha' - alpha sigma' / sigma) d in the velocity, so a loss on any
target is a weighted loss on x0. `uncertainty`, `adaptive`, `barron` and `gap` weigh any loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.types import Array


def snr(alpha: Float[Array, "*B"], sigma: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """(alpha / sigma)^2: the unit loss on eps."""
    return (alpha / sigma) ** 2


def velocity(
    alpha: Float[Array, "*B"],
    sigma: Float[Array, "*B"],
    d_alpha: Float[Array, "*B"],
    d_sigma: Float[Array, "*B"],
) -> Float[Array, "*B"]:
    """(alpha' - alpha sigma' / sigma)^2: the unit loss on dx_t/dt; 1 / t^2 for rectified flow.

    The arguments are those of `Process.coefs(t)`.
    """
    return (d_alpha - alpha * d_sigma / sigma) ** 2


def vp_velocity(
    alpha: Float[Array, "*B"], sigma: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """SNR + 1 = 1 / sigma^2: the unit loss on alpha eps - sigma x0, variance preserving
    (arXiv:2202.00512).
    """
    return snr(alpha, sigma) + 1


def truncated_snr(
    alpha: Float[Array, "*B"], sigma: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """max(SNR, 1) (progressive distillation, arXiv:2202.00512)."""
    return jnp.maximum(snr(alpha, sigma), 1.0)


def min_snr(
    alpha: Float[Array, "*B"], sigma: Float[Array, "*B"], gamma: float = 5.0
) -> Float[Array, "*B"]:
    """min(SNR, gamma) (arXiv:2303.09556)."""
    return jnp.minimum(snr(alpha, sigma), gamma)


def edm(sigma: Float[Array, "*B"], sigma_data: float = 0.5) -> Float[Array, "*B"]:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2: the unit loss on the output of EDM's network
    (arXiv:2206.00364, table 1).
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def uncertainty(
    loss: Float[Array, "*B"], log_var: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """e^-u L + u with a learnt u = `log_var` (EDM2, arXiv:2312.02696).

    It is least at u = log E[L], where it is 1 + u.
    """
    return jnp.exp(-log_var) * loss + log_var


def adaptive(
    loss: Float[Array, " B"], c: float = 1e-2, p: float = 1.0
) -> Float[Array, " B"]:
    """sg[1 / (L + c)^p], a weight for losses summed over dimensions (MeanFlow,
    arXiv:2505.13447).
    """
    return 1 / (jax.lax.stop_gradient(loss) + c) ** p


def barron(
    loss: Float[Array, " B"], alpha: float = 1.0, c: float = 1e-3
) -> Float[Array, " B"]:
    """sg[(L / ((c^2 + 1e-8) |alpha - 2|) + 1)^(alpha / 2 - 1)] / c, a weight for mean squared
    errors.

    For L >> c^2 and alpha = 1 the weighted loss has the gradient of 2 sqrt(L); for alpha = 2 the
    weight is 1 / c.

    Source: TwinFlow, arXiv:2512.05150, after Barron's robust loss, arXiv:1701.03077.
    """
    if alpha == 2:
        return jnp.full_like(loss, 1 / c)
    scaled = jax.lax.stop_gradient(loss) / (c**2 + 1e-8) / abs(alpha - 2)
    return (scaled + 1) ** (alpha / 2 - 1) / c


def gap(t: Float[Array, "*B"], r: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """1 + tan(72 degrees x (1 - (|t| - |r|))), a weight for average velocities between flow times.

    It is 1 for |t| - |r| = 1, and 4.08 for |r| = |t| (TwinFlow, arXiv:2512.05150).
    """
    return 1 + jnp.tan((1 - (jnp.abs(t) - jnp.abs(r))) * (jnp.pi / 2.5))
