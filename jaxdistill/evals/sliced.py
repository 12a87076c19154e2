"""Wasserstein-2 distances between samples.

Along random directions they are found by sorting, exactly by assignment.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped
from scipy.optimize import linear_sum_assignment

from jaxdistill.core.types import Refused
from jaxdistill.evals import distances


def _check_equal_size(x: np.ndarray, y: np.ndarray) -> None:
    if x.shape != y.shape:
        raise Refused(
            f"samples {x.shape} and {y.shape}: expected equally many of equal dimension"
        )


def sliced_wasserstein(
    x: Shaped[np.ndarray, "N D"],
    y: Shaped[np.ndarray, "_ _"],
    directions: int = 512,
    seed: int = 0,
) -> float:
    """Root mean square of the one-dimensional W2 over random unit directions.

    It is |a - b| / sqrt(D) for N(a, s I) and N(b, s I), as samples and directions grow.

    Raises:
        Refused: on sets of unequal shapes.

    Source:
        Rabin et al., Wasserstein Barycenter and its Application to Texture Mixing, 2011.
    """
    _check_equal_size(x, y)
    u = np.random.default_rng(seed).standard_normal((x.shape[1], directions))
    u /= np.linalg.norm(u, axis=0)
    first = np.sort(np.asarray(x, np.float64) @ u, 0)
    second = np.sort(np.asarray(y, np.float64) @ u, 0)
    return float(np.sqrt(np.mean((first - second) ** 2)))


def wasserstein2(
    x: Shaped[np.ndarray, "N D"], y: Shaped[np.ndarray, "_ _"]
) -> float:
    """Exact W2 of up to 500 samples; the time is cubic in their number.

    Raises:
        Refused: on sets of unequal shapes, or of more samples.
    """
    _check_equal_size(x, y)
    if len(x) > 500:
        raise Refused(
            f"wasserstein2: {len(x)} samples, expected at most 500; use sliced_wasserstein"
        )
    cost = distances.squared(x, y)
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))
