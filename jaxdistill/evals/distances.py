"""Pairwise distances of features, by one matrix product for each block of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxdistill.objectives import mmd


def squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """||x_i - y_j||^2 of [n D] and [m D], float64 [n m]. Both are centred first, so that an offset
    costs no digits.
    """
    return mmd.squared(np.asarray(x, np.float64), np.asarray(y, np.float64))


def blocks(x: np.ndarray, y: np.ndarray, rows: int = 1000) -> Iterator[np.ndarray]:
    """Distances [<= rows, m] of consecutive blocks of `x`."""
    for i in range(0, len(x), rows):
        yield np.sqrt(squared(x[i : i + rows], y))
