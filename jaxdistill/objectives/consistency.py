"""Consistency training: distances, the tangent surrogate, and discretisation schedules.

CT arXiv:2303.01469, iCT arXiv:2310.14189, ECT arXiv:2406.14548, sCM arXiv:2410.11081.
00-foundations, section 6. Steps `k` may be traced; totals and sizes are Python ints.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array


def pseudo_huber(a: Array, b: Array, c: float | Array) -> Array:
    """sqrt(||a - b||^2 + c^2) - c, the norm over all but the first axis: [B ...] -> [B]. iCT's c is
    `ict_c(dim)`.

    Written without the difference, so that it is exact where ||a - b|| << c; for c = 0 it is the
    norm.
    """
    square = jnp.sum((a - b) ** 2, axis=range(1, a.ndim))
    root = jnp.sqrt(jnp.where(square + c**2 > 0, square + c**2, 1.0))
    return square / (root + c)


def ict_c(dim: int) -> float:
    """iCT's c for samples of `dim` numbers: 0.00054 sqrt(dim)."""
    return 0.00054 * math.sqrt(dim)


def tangent_surrogate(f: Array, tangent: Array) -> Array:
    """||f - sg(f + g)||^2 over all but the first axis, [B ...] -> [B]: value ||g||^2, gradient -2 g
    . df (sCM).
    """
    return jnp.sum(
        (f - jax.lax.stop_gradient(f) - jax.lax.stop_gradient(tangent)) ** 2, axis=range(1, f.ndim)
    )


def normalise_tangent(tangent: Array, c: float = 0.1) -> Array:
    """g / (||g|| / sqrt(dim) + c) per sample; with the root mean square in place of sCM's norm, c
    does not depend on size.
    """
    square = jnp.mean(tangent**2, axis=range(1, tangent.ndim), keepdims=True)
    return tangent / (jnp.sqrt(square) + c)


def clip_tangent(tangent: Array, limit: float = 1.0) -> Array:
    """Every component within [-limit, limit]; sCM's alternative to normalising."""
    return jnp.clip(tangent, -limit, limit)


def ct_levels(k: Array, total: int, s0: int = 2, s1: int = 150) -> Array:
    """CT's number of noise levels N(k) at step `k` of `total`, int32: s0 at first, s1 + 1 in the
    end.
    """
    square = k / total * ((s1 + 1) ** 2 - s0**2) + s0**2
    return jnp.ceil(jnp.sqrt(square) - 1).astype(jnp.int32) + 1


def ct_decay(levels: Array, s0: int = 2, mu0: float = 0.9) -> Array:
    """CT's decay mu(k) of the target network at N(k) = `levels`: exp(s0 log(mu0) / (N - 1)).

    The released code divides by the number of intervals, where the paper's appendix C has N.
    """
    return jnp.exp(s0 * math.log(mu0) / (levels - 1))


def ict_levels(k: Array, total: int, s0: int = 10, s1: int = 1280) -> Array:
    """iCT's number of noise levels: intervals double from s0 up to s1 in equal shares of `total`
    steps; int32.
    """
    share = total // (math.floor(math.log2(s1 // s0)) + 1)
    return jnp.minimum(s0 * 2 ** (jnp.asarray(k, jnp.int32) // share), s1) + 1


def noise_levels(
    n: Array, size: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Array:
    """`n` levels of EDM's grid from sigma_min up to sigma_max, the last repeated until there are
    `size`: [size].

    `n` may be traced (`ct_levels`, `ict_levels`); `size` is the most it can be.
    """
    ramp = jnp.minimum(jnp.arange(size) / (n - 1), 1.0)
    bottom = sigma_min ** (1 / rho)
    top = sigma_max ** (1 / rho)
    return (bottom + ramp * (top - bottom)) ** rho


def neighbours(key: Array, levels: Array, logits: Array, n: int) -> tuple[Array, Array]:
    """(t, r) [n]: the ends of intervals between rising `levels` [N], drawn by `logits` [N - 1]."""
    index = jax.random.categorical(key, logits, shape=(n,))
    return levels[index + 1], levels[index]


def ict_probs(levels: Array, mean: float = -1.1, std: float = 2.0) -> Array:
    """iCT's law of the interval (sigma_i, sigma_{i+1}): mass of the lognormal in it, [size] ->
    [size - 1], summing to 1.

    Intervals between repeated levels get 0.
    """
    erf = jax.scipy.special.erf((jnp.log(levels) - mean) / (math.sqrt(2) * std))
    mass = erf[1:] - erf[:-1]
    return mass / jnp.sum(mass)


def ect_time(t: Array, stage: Array, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Array:
    """ECT's second time r < t: t max(0, 1 - n(t) q^-(stage + 1)), n(t) = 1 + k sigmoid(-b t). Early
    stages have r = 0.
    """
    n = 1 + k * jax.nn.sigmoid(-b * t)
    return t * jnp.maximum(0.0, 1 - n / q ** (stage + 1))
