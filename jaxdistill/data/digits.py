"""scikit-learn's 8x8 digits: 1,797 grey images that come with the package."""

from __future__ import annotations

import dataclasses

import numpy as np
from sklearn.datasets import load_digits

from jaxdistill.data.base import InMemory, check_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(InMemory):
    """x float32 [B 8 8 1] in [-1, 1]; cond int32 [B], the digit; null_cond 10.

    All images are both the training and the held-out samples: the set is small, and what is
    measured is how well a model has learnt its distribution.
    """

    classes = 10

    def arrays(self, split):
        data = load_digits()
        x = (data.images.astype(np.float32) / 8.0 - 1.0)[..., None]
        label = data.target.astype(np.int32)
        return {"x": x, "cond": label, "null_cond": np.full_like(label, 10)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledDigits(InMemory):
    """Digits of which some training labels are wrong, and some are not to be fitted.

    x float32 [B 8 8 1] in [-1, 1]; cond int32 [B], the label; heldout float32 [B], 1 on training
    samples that a method predicts but does not fit. All digits beyond the first `size` are held
    out, with right labels.
    """

    size: int = 400  # training samples
    noise: float = 0.15  # share of training labels that are replaced by another
    heldout: float = 0.0  # share of the training samples

    classes = 10

    def arrays(self, split):
        data = load_digits()
        rng = np.random.default_rng([self.seed, self.size])
        order = rng.permutation(len(data.target))
        pick = order[: self.size] if split == "train" else order[self.size :]
        label = data.target[pick].astype(np.int32)
        heldout = np.zeros(len(pick), np.float32)
        if split == "train":
            wrong = rng.random(len(pick)) < self.noise
            other = (label + rng.integers(1, 10, len(pick))) % 10
            label = np.where(wrong, other, label).astype(np.int32)
            heldout[: round(self.size * check_share(self.heldout))] = 1
        return {
            "x": (data.images[pick].astype(np.float32) / 8.0 - 1.0)[..., None],
            "cond": label,
            "heldout": heldout,
        }
