"""Maximum mean discrepancy of samples x and y (Gretton et al., arXiv:0805.2368), for losses and
evaluation alike.

Statistics take NumPy or JAX arrays, and keep their precision. U-statistics have mean 0 for equal
distributions, hence may be negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped

from jaxdistill.core.types import Array, lookup
from jaxdistill.objectives.numerics import wide

Kernel = Callable[[Array, Array], Array]  # [N D], [M D] -> [N M]
Scalar = Shaped[Array, ""] | np.floating
BANDS = (0.25, 0.5, 1.0, 2.0, 4.0)


def squared(
    x: Shaped[Array, "N D"], y: Shaped[Array, "M D"]
) -> Shaped[Array, "N M"]:
    """||x_i - y_j||^2. Both are centred first, so that an offset costs no digits."""
    centre = y.mean(0)
    x = x - centre
    y = y - centre
    d = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return d.__array_namespace__().maximum(d, 0)


def median_distance(x: Shaped[Array, "N D"], y: Shaped[Array, "M D"]) -> Scalar:
    """Median distance between different samples of both sets together: the usual kernel width."""
    xp = x.__array_namespace__()
    both = xp.concat([x, y])
    pairs = xp.triu_indices(len(both), 1)
    return xp.median(xp.sqrt(squared(both, both)[pairs]))


def rbf(width: float | Scalar) -> Kernel:
    """The mean of exp(-d^2 / 2 h^2) over h = `width` times each of BANDS."""

    def kernel(x: Array, y: Array) -> Array:
        d = squared(x, y)
        xp = d.__array_namespace__()
        return sum(xp.exp(-d / (2 * (width * band) ** 2)) for band in BANDS) / len(
            BANDS
        )

    return kernel


def u_statistic(
    kernel: Kernel, x: Shaped[Array, "N D"], y: Shaped[Array, "M D"]
) -> Scalar:
    """Mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over pairs of different samples (eq. 3).

    It is unbiased.
    """

    def within(a: Array) -> Any:
        k = kernel(a, a)
        n = len(a)
        return (k.sum() - k.trace()) / float(n * (n - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def v_statistic(
    kernel: Kernel, x: Shaped[Array, "N D"], y: Shaped[Array, "M D"]
) -> Scalar:
    """`u_statistic` over all pairs: the square of a norm, 0 for equal sets."""
    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()


def linear_v(x: Shaped[Array, "N D"], y: Shaped[Array, "M D"]) -> Scalar:
    """|mean x - mean y|^2: the V-statistic under k(a, b) = a . b, without a matrix of pairs."""
    return ((x.mean(0) - y.mean(0)) ** 2).sum()


def linear_u(x: Shaped[Array, "N D"], y: Shaped[Array, "M D"]) -> Scalar:
    """The U-statistic under k(a, b) = a . b, without a matrix of pairs.

    It is `linear_v` less tr Cov(x) / N + tr Cov(y) / M, the covariances over N - 1 and M - 1.
    """

    def spread(a: Array) -> Array:
        return ((a - a.mean(0)) ** 2).sum() / float(len(a) * (len(a) - 1))

    return linear_v(x, y) - spread(x) - spread(y)


def rbf_u(x: Shaped[Array, "N D"], y: Shaped[Array, "M D"]) -> Shaped[Array, ""]:
    """`u_statistic` of the `rbf` kernel as wide as the median distance, under stop_gradient."""
    return u_statistic(_median_rbf(x, y), x, y)


def rbf_v(x: Shaped[Array, "N D"], y: Shaped[Array, "M D"]) -> Shaped[Array, ""]:
    """`v_statistic` of the `rbf` kernel as wide as the median distance, under stop_gradient."""
    return v_statistic(_median_rbf(x, y), x, y)


ESTIMATES = {
    "linear": {"u": linear_u, "v": linear_v},
    "rbf": {"u": rbf_u, "v": rbf_v},
}


def mmd2(
    x: Shaped[Array, "N D"],
    y: Shaped[Array, "M D"],
    kernel: str = "linear",
    estimator: str = "u",
) -> Float[Array, ""]:
    """MMD^2 in float32 or wider.

    Args:
      kernel: linear | rbf, whose width is the median distance under stop_gradient.
      estimator: u | v.

    Raises:
      Refused: on another name.
    """
    estimate = lookup(lookup(ESTIMATES, kernel, "kernel"), estimator, "estimator")
    return estimate(wide(x), wide(y))


def _median_rbf(x: Array, y: Array) -> Kernel:
    return rbf(jax.lax.stop_gradient(median_distance(x, y)))
