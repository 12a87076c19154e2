"""Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797) of features.

The ball of a sample reaches to its k-th nearest neighbour in its own set; the sample itself does
not count. A sample is inside a ball where it is nearer than that. Memory grows with the number of
samples, not with its square.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped

from jaxdistill.core.types import Refused
from jaxdistill.evals import distances


def radii(x: Shaped[np.ndarray, "N D"], k: int) -> Float[np.ndarray, " N"]:
    """Distance of each sample to its k-th nearest neighbour.

    Raises:
        Refused: unless 0 < k < N.
    """
    if not 0 < k < len(x):
        raise Refused(
            f"k={k}: expected 1 to {len(x) - 1}, fewer than the {len(x)} samples"
        )
    blocks = distances.blocks(x, x)
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for d in blocks])


def _balls_around(fake: np.ndarray, real: np.ndarray, k: int) -> np.ndarray:
    """Number of real balls that each fake sample is inside of, [M]."""
    reach = radii(real, k)
    return np.concatenate(
        [np.sum(d < reach, 1) for d in distances.blocks(fake, real)]
    )


def precision_recall(
    real: Shaped[np.ndarray, "N D"], fake: Shaped[np.ndarray, "M D"], k: int = 3
) -> tuple[float, float]:
    """Share of fake samples inside any real ball, and of real samples inside any fake ball."""
    precision = np.mean(_balls_around(fake, real, k) > 0)
    recall = np.mean(_balls_around(real, fake, k) > 0)
    return float(precision), float(recall)


def density_coverage(
    real: Shaped[np.ndarray, "N D"], fake: Shaped[np.ndarray, "M D"], k: int = 5
) -> tuple[float, float]:
    """Mean number of real balls around a fake sample over k, and share of real balls with a fake.

    Both are more robust to outliers than precision and recall.
    """
    nearest = np.concatenate([d.min(1) for d in distances.blocks(real, fake)])
    density = np.mean(_balls_around(fake, real, k)) / k
    coverage = np.mean(nearest < radii(real, k))
    return float(density), float(coverage)
