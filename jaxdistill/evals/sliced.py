"""Wasserstein-2 distances between samples: along random directions by sorting, or exactly by
assignment.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxdistill.core.types import Refused
from jaxdistill.evals import distances


def _equal_size(x: np.ndarray, y: np.ndarray) -> None:
    if x.shape != y.shape:
        raise Refused(f"samples {x.shape} and {y.shape}: expected equally many of equal dimension")


def sliced_wasserstein(x: np.ndarray, y: np.ndarray, directions: int = 512, seed: int = 0) -> float:
    """Root mean square over random unit directions of the 1-D W2 of [n D] and [n D] (Rabin et al.,
    2011).

    |a - b| / sqrt(D) for N(a, s I) and N(b, s I) as both numbers grow. Raises Refused on unequal shapes.
    """
    _equal_size(x, y)
    u = np.random.default_rng(seed).standard_normal((x.shape[1], directions))
    u /= np.linalg.norm(u, axis=0)
    gap = np.sort(np.asarray(x, np.float64) @ u, 0) - np.sort(np.asarray(y, np.float64) @ u, 0)
    return float(np.sqrt(np.mean(gap**2)))


def wasserstein2(x: np.ndarray, y: np.ndarray) -> float:
    """Exact W2 of [n D] and [n D], n <= 500 (cubic in n). Raises Refused on unequal shapes or more
    samples.
    """
    _equal_size(x, y)
    if len(x) > 500:
        raise Refused(
            f"wasserstein2: {len(x)} samples, expected at most 500; use sliced_wasserstein"
        )
    cost = distances.squared(x, y)
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))
