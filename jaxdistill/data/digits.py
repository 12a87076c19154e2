"""scikit-learn's 8x8 digits: 1,797 grey images inside its wheel, so that the first run needs no download."""

from __future__ import annotations

import dataclasses

import numpy as np
from sklearn.datasets import load_digits

from jaxdistill.data.base import InMemory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(InMemory):
    """x float32 [8, 8, 1] in [-1, 1]; cond int32 label 0-9; null_cond 10.

    The set is small, and what is measured is how well a model has learnt its law: "train" and "test" are all of it.
    """

    def arrays(self, split):
        data = load_digits()
        x = (data.images.astype(np.float32) / 8.0 - 1.0)[..., None]
        label = data.target.astype(np.int32)
        return {"x": x, "cond": label, "null_cond": np.full_like(label, 10)}
