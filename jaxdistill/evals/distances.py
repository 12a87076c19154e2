"""Pairwise distances of features, by one matrix product for each block of samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Shaped

from jaxdistill.objectives import mmd


def squared(
    x: Shaped[np.ndarray, "N D"], y: Shaped[np.ndarray, "M D"]
) -> Float[np.ndarray, "N M"]:
    """||x_i - y_j||^2 in float64.

    Both sets are centred first, so that a common offset costs no digits.
    """
    return mmd.squared(np.asarray(x, np.float64), np.asarray(y, np.float64))


def blocks(
    x: Shaped[np.ndarray, "N D"], y: Shaped[np.ndarray, "M D"], size: int = 1000
) -> Iterator[np.ndarray]:
    """Distances [<= size, M] of consecutive blocks of `x` from all of `y`."""
    for i in range(0, len(x), size):
        yield np.sqrt(squared(x[i : i + size], y))
