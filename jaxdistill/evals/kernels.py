"""Kernel two-sample distances, unbiased: 0 in the mean for equal laws, so that a value may be
negative.
"""

from __future__ import annotations

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.evals import distances
from jaxdistill.objectives import mmd


def median_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Median distance between different samples of both sets together, from the first 1,000 rows of
    each.
    """
    return float(mmd.median_distance(*(np.asarray(a[:1000], np.float64) for a in (x, y))))


def mmd2(x: np.ndarray, y: np.ndarray, width: float | None = None) -> float:
    """MMD^2 of [n D] and [m D] under the mean of RBF kernels exp(-d^2 / 2h^2), h = `width` times
    each of mmd.BANDS.

    `width` defaults to `median_distance`; fix it to compare several sets with one.
    """
    kernel = mmd.rbf(median_distance(x, y) if width is None else width)
    return float(mmd.u_statistic(kernel, np.asarray(x, np.float64), np.asarray(y, np.float64)))


def kid(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel Inception distance (arXiv:1801.01401): MMD^2 under (a.b / D + 1)^3; mean and standard
    deviation over subsets.

    Each subset draws `size` rows of [n D] and of [m D] without replacement. Raises Refused where
    there are fewer.
    """
    if size > min(len(x), len(y)):
        raise Refused(f"kid: size={size}, expected at most {min(len(x), len(y))}, the smaller set")
    rng = np.random.default_rng(seed)
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    pick = lambda a: a[rng.choice(len(a), size, replace=False)]
    values = [mmd.u_statistic(kernel, pick(x), pick(y)) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of [n D] and [m D], over pairs of different samples."""
    return float(mmd.u_statistic(lambda a, b: -np.sqrt(distances.squared(a, b)), x, y))
