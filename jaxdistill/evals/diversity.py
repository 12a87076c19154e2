"""Diversity of samples by their features."""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped

from jaxdistill.core.types import Refused
from jaxdistill.evals import distances


def pairwise_distance(
    x: Shaped[np.ndarray, "B D"], cond: Shaped[np.ndarray, " B"] | None = None
) -> float:
    """Mean distance between different samples of one condition, averaged over the conditions.

    Conditions with one sample are left out.

    Raises:
        Refused: where no condition has two samples.
    """
    cond = np.zeros(len(x), int) if cond is None else np.asarray(cond)
    groups = [x[cond == c] for c in np.unique(cond)]
    values = [_mean_distance(group) for group in groups if len(group) > 1]
    if not values:
        raise Refused(
            f"pairwise_distance: {len(x)} samples of {len(groups)} conditions, "
            "expected two or more of one"
        )
    return float(np.mean(values))


def _mean_distance(x: np.ndarray) -> float:
    """Mean distance between different samples [B D]."""
    distance = np.sqrt(distances.squared(x, x))
    return distance[np.triu_indices(len(x), 1)].mean()


def vendi_score(x: Shaped[np.ndarray, "B D"]) -> float:
    """Effective number of different samples, 1 to B.

    It is exp(entropy of the eigenvalues of K / B), where K are the cosines between samples.

    Raises:
        Refused: where the features of a sample are all 0 or not finite.

    Source:
        Vendi score, arXiv:2210.02410.
    """
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if not np.all((norm > 0) & np.isfinite(norm)):
        raise Refused(
            "vendi_score: a feature vector is 0 or not finite and has no direction"
        )
    values = np.linalg.svd(x / norm, compute_uv=False) ** 2 / len(x)
    values = values[values > 0]
    return float(np.exp(-np.sum(values * np.log(values))))
