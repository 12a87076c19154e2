"""How much a problem is worth to a student that solves it with probability p (PACED,
arXiv:2603.11178).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Params


def beta_kernel(p: Array, a: float = 1.0, b: float = 1.0) -> Array:
    """p^a (1 - p)^b with 0^0 = 1: 0 where nothing or everything is solved (a, b > 0), greatest at a
    / (a + b).
    """
    return p**a * (1 - p) ** b


def efficiency(weight: Array, signal: Array, variance: Array) -> Array:
    """(sum w s)^2 / (sum w^2 v  sum s^2 / v): what a weighted mean of gradients keeps of the best
    one's signal to noise.

    At most 1, at w proportional to s / v; at least 1 - d^2 where w is within a factor 1 +- d of
    that.
    """
    return jnp.sum(weight * signal) ** 2 / (
        jnp.sum(weight**2 * variance) * jnp.sum(signal**2 / variance)
    )


def signal_to_noise(gradients: Array) -> Array:
    """|mean g|^2 / mean |g - mean g|^2 over the problems' gradients [N D]: how far they agree;
    infinite where all are equal.
    """
    mean = jnp.mean(gradients, 0)
    return jnp.sum(mean**2) / jnp.mean(jnp.sum((gradients - mean) ** 2, -1))


def signal_to_noise_by_bin(
    gradient: Callable[[Batch], Params], problems: Batch, rate: Array, bins: int = 5
) -> tuple[Array, Array]:
    """(signal to noise [bins] of the problems whose pass rate [N] is in each of `bins` equal parts
    of [0, 1], their number [bins]).

    gradient: of one problem, a row of `problems` [N ...]; one is held at a time, beside a sum for
    each bin. Of n problems `signal_to_noise` is 1 / n even where there is no signal, which would
    raise the bins of few: both of its parts are corrected, (n - 1) / n of it minus 1 / n, so that
    it scatters around 0 there. A bin of fewer than two problems is NaN. Float32: where gradients
    agree to d of their length, the result is good to 1e-7 / d^2.
    """
    place = jnp.clip((rate * bins).astype(jnp.int32), 0, bins - 1)

    def add(sums, row):
        problem, i = row
        g = gradient(problem)
        total, squares = sums
        total = jax.tree.map(lambda s, x: s.at[i].add(x), total, g)
        return (total, squares.at[i].add(_squared(g))), None

    one = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], problems))
    zeros = jax.tree.map(lambda s: jnp.zeros((bins, *s.shape), jnp.float32), one)
    (total, squares), _ = jax.lax.scan(add, (zeros, jnp.zeros(bins)), (problems, place))
    count = jnp.zeros(bins).at[place].add(1.0)
    mean = jax.vmap(_squared)(total) / count**2
    biased = mean / (squares / count - mean)
    return jnp.where(count < 2, jnp.nan, ((count - 1) * biased - 1) / count), count


def _squared(tree: Params) -> Array:
    """|g|^2 over all of its arrays."""
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))
