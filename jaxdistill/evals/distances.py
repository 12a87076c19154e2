"""Pairwise distances of features, by one matrix product for each block of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """||x_i - y_j||^2 of [n D] and [m D], float64 [n m]. Both are centred first, so that an offset costs no digits."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    centre = y.mean(0)
    x, y = x - centre, y - centre
    return np.maximum(np.sum(x**2, 1)[:, None] + np.sum(y**2, 1) - 2 * x @ y.T, 0)


def blocks(x: np.ndarray, y: np.ndarray, rows: int = 1000) -> Iterator[np.ndarray]:
    """Distances [<= rows, m] of consecutive blocks of `x`."""
    for i in range(0, len(x), rows):
        yield np.sqrt(squared(x[i : i + rows], y))
