"""Weights of data domains from how far a student lags behind its teacher in each (DDK,
arXiv:2407.16154).

On the host, in float64: small vectors that a data controller holds. `ratio` [N] is the student's
perplexity over the teacher's in every domain; weights [N] lie on the simplex.
"""

from __future__ import annotations

import numpy as np

from jaxdistill.core.types import Refused


def discrepancy(ratio: np.ndarray) -> np.ndarray:
    """Domain discrepancy factor (eq. 1): softmax of the ratios."""
    return _softmax(_finite(ratio))


def refresh(weights: np.ndarray, ratio: np.ndarray, smoothing: float) -> np.ndarray:
    """Factor smooth updating (eq. 2): smoothing * psi / sum psi + (1 - smoothing) / N, psi =
    weights exp(ratio).

    Multiplicative in what was, with a uniform floor: smoothing 0 is uniform, 1 has no floor.
    """
    with np.errstate(divide="ignore"):  # a domain of weight 0 stays out
        psi = _softmax(np.log(np.asarray(weights, np.float64)) + _finite(ratio))
    return smoothing * psi + (1 - smoothing) / len(psi)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def _finite(ratio: np.ndarray) -> np.ndarray:
    ratio = np.asarray(ratio, np.float64)
    if not np.isfinite(ratio).all():
        raise Refused(
            f"perplexity ratios of the domains: {ratio.tolist()}, expected finite numbers (has every domain held-out rows?)"
        )
    return ratio
