"""Consistency training: distances, the tangent surrogate, and discretisation schedules.

CT arXiv:2303.01469, iCT arXiv:2310.14189, ECT arXiv:2406.14548, sCM arXiv:2410.11081. Steps `k` may
be traced; totals and sizes are Python integers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key, Shaped

from jaxdistill.core.types import Array
from jaxdistill.objectives.numerics import sum_per_sample


def pseudo_huber(
    a: Float[Array, "B ..."], b: Float[Array, "B ..."], c: float | Array
) -> Float[Array, " B"]:
    """sqrt(||a - b||^2 + c^2) - c of each sample; iCT's c is `ict_c(dim)`.

    It is computed without the difference, so that it is exact for ||a - b|| << c. For c = 0 it is
    the norm.
    """
    square = sum_per_sample((a - b) ** 2)
    root = jnp.sqrt(jnp.where(square + c**2 > 0, square + c**2, 1.0))
    return square / (root + c)


def ict_c(dim: int) -> float:
    """iCT's c for samples of `dim` numbers: 0.00054 sqrt(dim)."""
    return 0.00054 * math.sqrt(dim)


def tangent_surrogate(
    f: Float[Array, "B ..."], tangent: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """||f - sg(f + g)||^2 of each sample, of value ||g||^2 and gradient -2 g . df (sCM)."""
    gap = f - jax.lax.stop_gradient(f) - jax.lax.stop_gradient(tangent)
    return sum_per_sample(gap**2)


def normalise_tangent(
    tangent: Float[Array, "B ..."], c: float = 0.1
) -> Float[Array, "B ..."]:
    """g / (||g|| / sqrt(dim) + c) of each sample.

    The root mean square takes the place of sCM's norm, so that c does not depend on the size.
    """
    square = jnp.mean(tangent**2, axis=range(1, tangent.ndim), keepdims=True)
    return tangent / (jnp.sqrt(square) + c)


def euclidean_tangent(
    tangent: Float[Array, "B ..."], c: float = 0.1
) -> Float[Array, "B ..."]:
    """g / (||g|| + c) of each sample: sCM's printed form, as SANA-Sprint has it.

    For c = 0 it is that of `normalise_tangent` divided by sqrt(dim).
    """
    square = sum_per_sample(tangent**2)
    norm = jnp.sqrt(square).reshape(-1, *[1] * (tangent.ndim - 1))
    return tangent / (norm + c)


def clip_tangent(
    tangent: Float[Array, "*B"], limit: float = 1.0
) -> Float[Array, "*B"]:
    """Every component clipped to [-limit, limit]: sCM's alternative to normalisation."""
    return jnp.clip(tangent, -limit, limit)


def ct_levels(
    k: int | Shaped[Array, "*K"], total: int, s0: int = 2, s1: int = 150
) -> Int[Array, "*K"]:
    """CT's number of noise levels N(k) at step `k` of `total`: from s0 to s1 + 1."""
    square = k / total * ((s1 + 1) ** 2 - s0**2) + s0**2
    return jnp.ceil(jnp.sqrt(square) - 1).astype(jnp.int32) + 1


def ct_decay(
    levels: int | Shaped[Array, "*K"], s0: int = 2, mu0: float = 0.9
) -> Float[Array, "*K"]:
    """CT's decay mu(k) of the target network at N(k) = `levels`: exp(s0 log(mu0) / (N - 1)).

    The released code divides by the number of intervals, where the paper's appendix C has N.
    """
    return jnp.exp(s0 * math.log(mu0) / (levels - 1))


def ict_levels(
    k: int | Shaped[Array, "*K"], total: int, s0: int = 10, s1: int = 1280
) -> Int[Array, "*K"]:
    """iCT's number of noise levels at step `k` of `total`.

    The number of intervals doubles from s0 to s1, each value for an equal share of the steps.
    """
    share = total // (math.floor(math.log2(s1 // s0)) + 1)
    return jnp.minimum(s0 * 2 ** (jnp.asarray(k, jnp.int32) // share), s1) + 1


def noise_levels(
    n: int | Int[Array, ""],
    size: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Float[Array, " {size}"]:
    """`n` levels of EDM's grid from sigma_min up to sigma_max, the last one repeated up to `size`.

    `n` may be traced (`ct_levels`, `ict_levels`); `size` is its largest value.
    """
    ramp = jnp.minimum(jnp.arange(size) / (n - 1), 1.0)
    bottom = sigma_min ** (1 / rho)
    top = sigma_max ** (1 / rho)
    return (bottom + ramp * (top - bottom)) ** rho


def neighbours(
    key: Key[Array, ""],
    levels: Float[Array, " N"],
    logits: Float[Array, " N-1"],
    n: int,
) -> tuple[Float[Array, " {n}"], Float[Array, " {n}"]]:
    """(t, r): upper and lower ends of `n` intervals between rising levels, drawn by `logits`."""
    index = jax.random.categorical(key, logits, shape=(n,))
    return levels[index + 1], levels[index]


def ict_probs(
    levels: Float[Array, " N"], mean: float = -1.1, std: float = 2.0
) -> Float[Array, " N-1"]:
    """iCT's probability of each interval between levels: the mass of a lognormal, normalised.

    Intervals between repeated levels have probability 0.
    """
    erf = jax.scipy.special.erf((jnp.log(levels) - mean) / (math.sqrt(2) * std))
    mass = erf[1:] - erf[:-1]
    return mass / jnp.sum(mass)


def ect_time(
    t: float | Float[Array, "*B"],
    stage: int | Shaped[Array, "*K"],
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
) -> Float[Array, "*B"]:
    """ECT's second time r < t: t max(0, 1 - n(t) q^-(stage + 1)), n(t) = 1 + k sigmoid(-b t).

    It is 0 at early stages.
    """
    n = 1 + k * jax.nn.sigmoid(-b * t)
    return t * jnp.maximum(0.0, 1 - n / q ** (stage + 1))
