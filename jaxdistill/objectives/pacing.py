"""How much a problem is worth to a student that solves it with probability p (PACED, arXiv:2603.11178)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxdistill.core.types import Array


def beta_kernel(p: Array, a: float = 1.0, b: float = 1.0) -> Array:
    """p^a (1 - p)^b with 0^0 = 1: 0 where nothing or everything is solved (a, b > 0), greatest at a / (a + b)."""
    return p**a * (1 - p) ** b


def efficiency(weight: Array, signal: Array, variance: Array) -> Array:
    """(sum w s)^2 / (sum w^2 v  sum s^2 / v): what a weighted mean of gradients keeps of the best one's signal to noise.

    At most 1, at w proportional to s / v; at least 1 - d^2 where w is within a factor 1 +- d of that.
    """
    return jnp.sum(weight * signal) ** 2 / (jnp.sum(weight**2 * variance) * jnp.sum(signal**2 / variance))


def signal_to_noise(gradients: Array) -> Array:
    """|mean g|^2 / mean |g - mean g|^2 over the problems' gradients [N D]: how far they agree; infinite where all are equal."""
    mean = jnp.mean(gradients, 0)
    return jnp.sum(mean**2) / jnp.mean(jnp.sum((gradients - mean) ** 2, -1))
