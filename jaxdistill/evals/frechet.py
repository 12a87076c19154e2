"""Fréchet distance between Gaussians fitted to features.

With Inception's features it is the FID (arXiv:1706.08500).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped

from jaxdistill.core.types import Refused


def statistics(
    x: Shaped[np.ndarray, "B D"],
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]:
    """Mean and unbiased covariance of features, float64.

    Raises:
        Refused: below two samples, and where a feature is not finite.
    """
    x = np.asarray(x, np.float64)
    if len(x) < 2 or not np.isfinite(x).all():
        raise Refused(f"features {x.shape}: expected at least 2 rows, all finite")
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))


def from_statistics(
    mean1: Float[np.ndarray, " D"],
    cov1: Float[np.ndarray, "D D"],
    mean2: Float[np.ndarray, " D"],
    cov2: Float[np.ndarray, "D D"],
) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The last trace is the sum of the singular values of C1^(1/2) C2^(1/2): these are the square
    roots of the eigenvalues of C1^(1/2) C2 C1^(1/2). Singular covariances need no regulariser.
    """
    cross = np.linalg.svd(_root(cov1) @ _root(cov2), compute_uv=False).sum()
    return float(
        np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross
    )


def _root(cov: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance [D D]."""
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def frechet_distance(
    x: Shaped[np.ndarray, "N D"], y: Shaped[np.ndarray, "M D"]
) -> float:
    """Fréchet distance between two sets of features.

    It is biased upwards by O(D / N): compare values at equal N, and report N.
    """
    return from_statistics(*statistics(x), *statistics(y))
