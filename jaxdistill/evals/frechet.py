"""Fréchet distance between Gaussians fitted to features (FID with Inception's, arXiv:1706.08500)."""

from __future__ import annotations

import numpy as np

from jaxdistill.core.types import Refused


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D D] of features [n D], float64. Raises Refused below 2
    rows or where not finite.
    """
    x = np.asarray(x, np.float64)
    if len(x) < 2 or not np.isfinite(x).all():
        raise Refused(f"features {x.shape}: expected at least 2 rows, all finite")
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))


def from_statistics(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The last trace is the sum of the singular values of C1^(1/2) C2^(1/2), which are the roots of
    the eigenvalues of C1^(1/2) C2 C1^(1/2); singular covariances need no regulariser.
    """
    cross = np.linalg.svd(_root(cov1) @ _root(cov2), compute_uv=False).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Between features [n D] and [m D]. Biased upwards by O(D / n): compare at equal n, and report
    it.
    """
    return from_statistics(*statistics(x), *statistics(y))
