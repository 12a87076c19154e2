"""Diversity of samples by their features."""

from __future__ import annotations

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.evals import distances


def pairwise_distance(x: np.ndarray, cond: np.ndarray | None = None) -> float:
    """Mean distance between different samples [n D] of one condition [n], the mean over conditions
    with two or more.

    Raises Refused where no condition has two.
    """
    cond = np.zeros(len(x), int) if cond is None else np.asarray(cond)
    groups = [x[cond == c] for c in np.unique(cond)]
    mean = lambda g: np.sqrt(distances.squared(g, g))[np.triu_indices(len(g), 1)].mean()
    values = [mean(g) for g in groups if len(g) > 1]
    if not values:
        raise Refused(
            f"pairwise_distance: {len(x)} samples of {len(groups)} conditions, expected two or more of one"
        )
    return float(np.mean(values))


def vendi_score(x: np.ndarray) -> float:
    """exp(entropy of the eigenvalues of K / n), K the cosines of [n D]: the effective number of
    different samples, 1 to n.

    Vendi score, arXiv:2210.02410. Raises Refused where a row is 0 or not finite.
    """
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if not np.all((norm > 0) & np.isfinite(norm)):
        raise Refused("vendi_score: a feature vector is 0 or not finite and has no direction")
    values = np.linalg.svd(x / norm, compute_uv=False) ** 2 / len(x)
    values = values[values > 0]
    return float(np.exp(-np.sum(values * np.log(values))))
