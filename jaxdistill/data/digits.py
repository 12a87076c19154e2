"""scikit-learn's 8x8 digits: 1,797 grey images inside its wheel, so that the first run needs no
download.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from sklearn.datasets import load_digits

from jaxdistill.data.base import InMemory, check_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(InMemory):
    """x float32 [8, 8, 1] in [-1, 1]; cond int32 label 0-9; null_cond 10.

    The set is small, and what is measured is how well a model has learnt its law: "train" and
    "test" are all of it.
    """

    classes = 10

    def arrays(self, split):
        data = load_digits()
        x = (data.images.astype(np.float32) / 8.0 - 1.0)[..., None]
        label = data.target.astype(np.int32)
        return {"x": x, "cond": label, "null_cond": np.full_like(label, 10)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledDigits(InMemory):
    """x float32 [8, 8, 1] in [-1, 1], cond int32 the label, heldout float32: `size` training
    samples, of which a share of labels is wrong and another share (`heldout` 1) is there to be
    predicted and not fitted; the other samples, with right labels, are the test.
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
        held = np.zeros(len(pick), np.float32)
        if split == "train":
            wrong = rng.random(len(pick)) < self.noise
            label = np.where(wrong, (label + rng.integers(1, 10, len(pick))) % 10, label).astype(
                np.int32
            )
            held[: round(self.size * check_share(self.heldout))] = 1
        return {
            "x": (data.images[pick].astype(np.float32) / 8.0 - 1.0)[..., None],
            "cond": label,
            "heldout": held,
        }
