"""Weights of data domains from how far a student lags behind its teacher in each (DDK,
arXiv:2407.16154).

They are small vectors in float64 on the host, which a data controller holds. `ratio` is the
student's perplexity over the teacher's in each of K domains; weights lie on the simplex.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Shaped

from jaxdistill.core.types import Refused

Ratios = Sequence[float] | Shaped[np.ndarray, " K"]


def discrepancy(ratio: Ratios) -> Float64[np.ndarray, " K"]:
    """Domain discrepancy factor (eq. 1): softmax of the ratios."""
    return _softmax(_finite(ratio))


def refresh(
    weights: Ratios, ratio: Ratios, smoothing: float
) -> Float64[np.ndarray, " K"]:
    """Factor smooth updating (eq. 2): smoothing * psi / sum psi + (1 - smoothing) / K.

    psi = weights exp(ratio) multiplies the previous weights. With smoothing 0 the weights are
    equal; with smoothing 1 they have no lower bound, and a domain of weight 0 keeps it.
    """
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.asarray(weights, np.float64))
    psi = _softmax(log_weights + _finite(ratio))
    return smoothing * psi + (1 - smoothing) / len(psi)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def _finite(ratio: Ratios) -> np.ndarray:
    ratio = np.asarray(ratio, np.float64)
    if not np.isfinite(ratio).all():
        found = f"perplexity ratios of the domains: {ratio.tolist()}"
        raise Refused(
            f"{found}, expected finite numbers (has every domain held-out rows?)"
        )
    return ratio
