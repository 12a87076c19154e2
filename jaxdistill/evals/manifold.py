"""Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797) from balls of k
nearest neighbours.

A sample's ball reaches to its k-th nearest neighbour in its own set, itself not counted; inside
means nearer than that. Features are [n D]; memory grows with n, not n^2.
"""

from __future__ import annotations

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.evals import distances


def radii(x: np.ndarray, k: int) -> np.ndarray:
    """Distance of each row of [n D] to its k-th nearest neighbour, [n]. Raises Refused unless 0 < k
    < n.
    """
    if not 0 < k < len(x):
        raise Refused(f"k={k}: expected 1 to {len(x) - 1}, fewer than the {len(x)} samples")
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for d in distances.blocks(x, x)])


def _inside(real: np.ndarray, fake: np.ndarray, k: int) -> np.ndarray:
    """Number of real balls around each fake, [m]."""
    reach = radii(real, k)
    return np.concatenate([np.sum(d < reach, 1) for d in distances.blocks(fake, real)])


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of fakes inside any real ball, and of reals inside any fake ball."""
    return float(np.mean(_inside(real, fake, k) > 0)), float(np.mean(_inside(fake, real, k) > 0))


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Mean number of real balls around a fake over k, and share of reals whose ball holds a fake;
    robust to outliers.
    """
    nearest = np.concatenate([d.min(1) for d in distances.blocks(real, fake)])
    return float(np.mean(_inside(real, fake, k)) / k), float(np.mean(nearest < radii(real, k)))
