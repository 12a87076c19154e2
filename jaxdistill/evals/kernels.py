"""Kernel two-sample distances, unbiased.

Their mean is 0 for equal distributions, so that a value may be negative.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped

from jaxdistill.core.types import Refused
from jaxdistill.evals import distances
from jaxdistill.objectives import mmd


def median_distance(
    x: Shaped[np.ndarray, "N D"], y: Shaped[np.ndarray, "M D"]
) -> float:
    """Median distance between different samples of both sets together.

    It is computed from the first 1,000 samples of each.
    """
    first = np.asarray(x[:1000], np.float64)
    second = np.asarray(y[:1000], np.float64)
    return float(mmd.median_distance(first, second))


def mmd2(
    x: Shaped[np.ndarray, "N D"],
    y: Shaped[np.ndarray, "M D"],
    width: float | None = None,
) -> float:
    """MMD^2 under the mean of RBF kernels exp(-d^2 / 2h^2), h = `width` times each of mmd.BANDS.

    Args:
        width: by default `median_distance`; fix it to compare several sets with one.
    """
    kernel = mmd.rbf(median_distance(x, y) if width is None else width)
    return float(
        mmd.u_statistic(
            kernel, np.asarray(x, np.float64), np.asarray(y, np.float64)
        )
    )


def kid(
    x: Shaped[np.ndarray, "N D"],
    y: Shaped[np.ndarray, "M D"],
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Kernel Inception distance: MMD^2 under (a.b / D + 1)^3.

    Each subset draws `size` samples of both sets without replacement.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        Refused: where a set has fewer than `size` samples.

    Source:
        arXiv:1801.01401.
    """
    if size > min(len(x), len(y)):
        raise Refused(
            f"kid: size={size}, expected at most {min(len(x), len(y))}, the smaller set"
        )
    rng = np.random.default_rng(seed)
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    values = []
    for _ in range(subsets):
        first = x[rng.choice(len(x), size, replace=False)]
        second = y[rng.choice(len(y), size, replace=False)]
        values.append(mmd.u_statistic(kernel, first, second))
    return float(np.mean(values)), float(np.std(values))


def energy_distance(
    x: Shaped[np.ndarray, "N D"], y: Shaped[np.ndarray, "M D"]
) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, over pairs of different samples."""

    def kernel(a, b):
        return -np.sqrt(distances.squared(a, b))

    return float(mmd.u_statistic(kernel, x, y))
