"""Self-distillation of kernel ridge regression in closed form (arXiv:2102.13088).

Step tau fits alpha_tau y + (1 - alpha_tau) y_{tau-1}, a mixture of the labels and the fit of the
step before, with ridge lam (not n lam) and y_0 = y. Every step is the linear smoother
S = K (K + lam I)^-1. `kernel` is K on the N data points, `cross` the kernel of M other points with
the data; `alphas` are those of steps 1, 2, ..., of which the first has no effect. High powers of S
need float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxdistill.core.types import Array


def rbf(
    x: Shaped[Array, " M"], z: Shaped[Array, " N"], gamma: float
) -> Shaped[Array, "M N"]:
    """exp(-gamma (x_i - z_j)^2) of points on a line."""
    return jnp.exp(-gamma * (x[:, None] - z[None]) ** 2)


def fit(
    cross: Shaped[Array, "M N"],
    kernel: Shaped[Array, "N N"],
    target: Shaped[Array, "N ..."],
    lam: float,
) -> Shaped[Array, "M ..."]:
    """cross (K + lam I)^-1 target (eq. 1); with K as `cross`, the fit on the data."""
    ridge = kernel + lam * jnp.eye(len(kernel))
    return cross @ jax.scipy.linalg.solve(ridge, target, assume_a="pos")


def steps(
    cross: Shaped[Array, "M N"],
    kernel: Shaped[Array, "N N"],
    y: Shaped[Array, "N ..."],
    lam: float,
    alphas: Sequence[float] | Shaped[np.ndarray, " K"],
) -> list[Shaped[Array, "M ..."]]:
    """f_1, f_2, ... at the points of `cross`, one step after another (eq. 1)."""
    out = []
    last = y
    for alpha in alphas:
        target = alpha * y + (1 - alpha) * last
        out.append(fit(cross, kernel, target, lam))
        last = fit(kernel, kernel, target, lam)
    return out


def unrolled(
    cross: Shaped[Array, "M N"],
    kernel: Shaped[Array, "N N"],
    y: Shaped[Array, "N ..."],
    lam: float,
    alphas: Sequence[float] | Shaped[np.ndarray, " K"],
) -> Shaped[Array, "M ..."]:
    """f_tau for tau = len(alphas) from powers of the smoother, without steps between (eq. 2)."""
    d, v = jnp.linalg.eigh(kernel)
    shrink = d / (d + lam)
    powers = 0.0
    weight = 1.0  # the product of 1 - alpha over the steps after step i
    for i in reversed(range(len(alphas))):
        share = float(alphas[i]) if i else 1.0
        # one factor S of each power is the left factor, `cross`
        power = len(alphas) - 1 - i
        powers = powers + weight * share * shrink**power
        weight *= 1 - share
    return cross @ (v @ (_columns(powers / (d + lam), y) * (v.T @ y)))


def constant(
    kernel: Shaped[Array, "N N"],
    y: Shaped[Array, "N ..."],
    lam: float,
    alpha: float,
    tau: int,
) -> Shaped[Array, "N ..."]:
    """y_tau for one alpha at all steps: y_inf + ((1 - alpha) S)^tau (y - y_inf) (eq. 3)."""
    end = limit(kernel, kernel, y, lam, alpha)
    d, v = jnp.linalg.eigh(kernel)
    power = ((1 - alpha) * d / (d + lam)) ** tau
    return end + v @ (_columns(power, y) * (v.T @ (y - end)))


def limit(
    cross: Shaped[Array, "M N"],
    kernel: Shaped[Array, "N N"],
    y: Shaped[Array, "N ..."],
    lam: float,
    alpha: float,
) -> Shaped[Array, "M ..."]:
    """f_inf: the fit with ridge lam / alpha, and 0 for alpha = 0 (eq. 4)."""
    if alpha == 0:
        return jnp.zeros((len(cross), *y.shape[1:]), y.dtype)
    return fit(cross, kernel, y, lam / alpha)


def filters(
    d: Shaped[Array, " N"],
    lam: float,
    alphas: Sequence[float] | Shaped[np.ndarray, " K"],
) -> list[Shaped[Array, " N"]]:
    """Diagonals of B_1, B_2, ...: the factors of y's coordinates after each step (eq. 5).

    `d` are the eigenvalues of K, and the coordinates those in its eigenbasis.
    """
    shrink = d / (d + lam)
    out = []
    for alpha in alphas:
        out.append(shrink * ((1 - alpha) * out[-1] + alpha) if out else shrink)
    return out


def best_alpha(
    target: Shaped[Array, "*B"],
    labels: Shaped[Array, "*B"],
    pure: Shaped[Array, "*B"],
) -> Shaped[Array, ""]:
    """argmin |alpha labels + (1 - alpha) pure - target|^2, unclipped (eq. 7).

    `labels` and `pure` are the predictions, where `target` is known, of the models fitted to the
    labels alone and to the last step alone.
    """
    numerator, denominator = best_alpha_sums(target, labels, pure)
    return numerator / denominator


def best_alpha_sums(
    target: Shaped[Array, "*B"],
    labels: Shaped[Array, "*B"],
    pure: Shaped[Array, "*B"],
) -> tuple[Shaped[Array, ""], Shaped[Array, ""]]:
    """Numerator and denominator of `best_alpha`, each of which may be summed over batches."""
    gap = labels - pure
    return jnp.sum((target - pure) * gap), jnp.sum(gap**2)


def _columns(diagonal: Array, y: Array) -> Array:
    return diagonal.reshape(-1, *([1] * (y.ndim - 1)))
