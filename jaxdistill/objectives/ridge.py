"""Self-distillation of kernel ridge regression in closed form (arXiv:2102.13088).

Step tau fits alpha_tau y + (1 - alpha_tau) y_{tau-1}, labels and the step before, with ridge lam
(not n lam) and y_0 = y: every step is the linear smoother S = K (K + lam I)^-1. Arrays: K [n n] the
kernel on the data, y [n ...], cross [m n] the kernel of other points with the data; `alphas` are
those of steps 1, 2, ... (the first has no effect). High powers need float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array


def rbf(x: Array, z: Array, gamma: float) -> Array:
    """exp(-gamma |x_i - z_j|^2) [m n] of points [m] and [n]."""
    return jnp.exp(-gamma * (x[:, None] - z[None]) ** 2)


def fit(cross: Array, kernel: Array, target: Array, lam: float) -> Array:
    """S_x target = cross (K + lam I)^-1 target (eq. 1); `cross` = K gives the fit on the data."""
    return cross @ jax.scipy.linalg.solve(
        kernel + lam * jnp.eye(len(kernel)), target, assume_a="pos"
    )


def steps(
    cross: Array, kernel: Array, y: Array, lam: float, alphas: Sequence[float]
) -> list[Array]:
    """f_1, f_2, ... at the points of `cross`, one step after another (eq. 1)."""
    out = []
    last = y
    for alpha in alphas:
        target = alpha * y + (1 - alpha) * last
        out.append(fit(cross, kernel, target, lam))
        last = fit(kernel, kernel, target, lam)
    return out


def unrolled(cross: Array, kernel: Array, y: Array, lam: float, alphas: Sequence[float]) -> Array:
    """f_tau, tau = len(alphas), from powers of the smoother without any step between (eq. 2)."""
    d, v = jnp.linalg.eigh(kernel)
    shrink = d / (d + lam)
    powers = 0.0
    weight = 1.0
    for i in reversed(
        range(len(alphas))
    ):  # weight: the product of 1 - alpha over the steps after this one
        share = float(alphas[i]) if i else 1.0
        powers = powers + weight * share * shrink ** (
            len(alphas) - 1 - i
        )  # one S of each power is S_x, at the left
        weight *= 1 - share
    return cross @ (v @ (_columns(powers / (d + lam), y) * (v.T @ y)))


def constant(kernel: Array, y: Array, lam: float, alpha: float, tau: int) -> Array:
    """y_tau for one alpha: y_inf + ((1 - alpha) S)^tau (y - y_inf) (eq. 3)."""
    end = limit(kernel, kernel, y, lam, alpha)
    d, v = jnp.linalg.eigh(kernel)
    return end + v @ (_columns(((1 - alpha) * d / (d + lam)) ** tau, y) * (v.T @ (y - end)))


def limit(cross: Array, kernel: Array, y: Array, lam: float, alpha: float) -> Array:
    """f_inf: the fit with ridge lam / alpha; 0 for alpha = 0 (eq. 4)."""
    return (
        fit(cross, kernel, y, lam / alpha)
        if alpha
        else jnp.zeros((len(cross), *y.shape[1:]), y.dtype)
    )


def filters(d: Array, lam: float, alphas: Sequence[float]) -> list[Array]:
    """Diagonals of B_1, B_2, ...: what each step leaves of y's coordinates in the eigenbasis with
    eigenvalues d (eq. 5).
    """
    shrink = d / (d + lam)
    out = []
    for alpha in alphas:
        out.append(shrink * ((1 - alpha) * out[-1] + alpha) if out else shrink)
    return out


def best_alpha(target: Array, labels: Array, pure: Array) -> Array:
    """argmin |alpha labels + (1 - alpha) pure - target|^2, unclipped (eq. 7): `labels` and `pure`
    are what the models fitted to the labels alone and to the last step alone say where `target` is
    known.
    """
    return jnp.divide(*best_alpha_sums(target, labels, pure))


def best_alpha_sums(target: Array, labels: Array, pure: Array) -> tuple[Array, Array]:
    """Numerator and denominator of `best_alpha`, which add up over batches."""
    return jnp.sum((target - pure) * (labels - pure)), jnp.sum((labels - pure) ** 2)


def _columns(diagonal: Array, y: Array) -> Array:
    return diagonal.reshape(-1, *([1] * (y.ndim - 1)))
