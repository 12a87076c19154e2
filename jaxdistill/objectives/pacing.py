"""The value of a problem for a student that solves it with probability p (PACED,
arXiv:2603.11178).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PyTree, Shaped

from jaxdistill.core.types import Array, Batch, Params


def beta_kernel(
    p: Float[Array, "*B"], a: float = 1.0, b: float = 1.0
) -> Float[Array, "*B"]:
    """p^a (1 - p)^b with 0^0 = 1.

    For a, b > 0 it is 0 where no attempt or every attempt succeeds, and greatest at a / (a + b).
    """
    return p**a * (1 - p) ** b


def efficiency(
    weight: Float[Array, " N"],
    signal: Float[Array, " N"],
    variance: Float[Array, " N"],
) -> Float[Array, ""]:
    """Signal to noise of a weighted mean of gradients over that of the best weights.

    (sum w s)^2 / (sum w^2 v  sum s^2 / v). It is at most 1, which w proportional to s / v reaches,
    and at least 1 - d^2 where w is within a factor of 1 +- d of that.
    """
    noise = jnp.sum(weight**2 * variance)
    return jnp.sum(weight * signal) ** 2 / (noise * jnp.sum(signal**2 / variance))


def signal_to_noise(gradients: Float[Array, "N D"]) -> Float[Array, ""]:
    """|mean g|^2 / mean |g - mean g|^2 over the gradients of N problems.

    It says how far they agree, and is infinite where all are equal.
    """
    mean = jnp.mean(gradients, 0)
    return jnp.sum(mean**2) / jnp.mean(jnp.sum((gradients - mean) ** 2, -1))


def signal_to_noise_by_bin(
    gradient: Callable[[Batch], Params],
    problems: PyTree[Array],
    rate: Float[Array, " N"],
    bins: int = 5,
) -> tuple[Float[Array, " {bins}"], Float[Array, " {bins}"]]:
    """Signal to noise of the problems' gradients by their pass rate, and the problems in each bin.

    The bins are equal parts of [0, 1]. For n problems `signal_to_noise` is on average 1 / n even
    without any signal, which would raise bins of few problems; its correction (n - 1) / n of it
    minus 1 / n has mean 0 there. A bin of fewer than two problems is NaN. In float32, where
    gradients agree up to a share d of their length, the result is exact up to 1e-7 / d^2.

    Args:
      gradient: of one problem. One gradient is held at a time, beside a sum for each bin.
      problems: N of them, along the first axis of each array.
    """
    place = jnp.clip((rate * bins).astype(jnp.int32), 0, bins - 1)

    def add(sums: tuple[Any, Array], row: tuple[Any, Array]) -> tuple[Any, None]:
        total, squares = sums
        problem, i = row
        g = gradient(problem)
        total = jax.tree.map(lambda s, x: s.at[i].add(x), total, g)
        return (total, squares.at[i].add(_squared_norm(g))), None

    one = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], problems))
    zeros = jax.tree.map(lambda s: jnp.zeros((bins, *s.shape), jnp.float32), one)
    (total, squares), _ = jax.lax.scan(
        add, (zeros, jnp.zeros(bins)), (problems, place)
    )
    count = jnp.zeros(bins).at[place].add(1.0)
    mean = jax.vmap(_squared_norm)(total) / count**2
    biased = mean / (squares / count - mean)
    return jnp.where(count < 2, jnp.nan, ((count - 1) * biased - 1) / count), count


def _squared_norm(tree: Any) -> Shaped[Array, ""]:
    """|g|^2 over all arrays of a tree."""
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))
