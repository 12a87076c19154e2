"""A small classifier of the data's own labels: features for Fréchet distances where Inception's
make no sense.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier

EPOCHS = 10


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A two-layer perceptron on flattened pixels: 64 rectified features, then logits."""

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    def features(self, x: np.ndarray) -> np.ndarray:
        """x [n ...] -> penultimate activations [n 64], float64."""
        return np.maximum(
            x.reshape(len(x), -1).astype(np.float64) @ self.weights[0] + self.biases[0], 0
        )

    def predict(self, x: np.ndarray) -> np.ndarray:
        """x [n ...] -> label [n]."""
        return (self.features(x) @ self.weights[1] + self.biases[1]).argmax(-1)


@functools.lru_cache(maxsize=4)
def trained_on(data: Any, n: int = 20_000) -> Classifier:
    """Fits on `n` training samples; a smaller set is repeated. The fit is kept in
    $JAXDISTILL_CACHE, else ~/.cache/jaxdistill.

    Deterministic: fixed seed, first batches of the data's order with seed 0.
    """
    data = dataclasses.replace(data, seed=0)
    batches = []
    rows = 0
    for batch in data.loader():
        batches.append(batch)
        rows += len(batch["x"])
        if rows >= n:
            break
    x = np.concatenate([b["x"].reshape(len(b["x"]), -1) for b in batches])[:n]
    label = np.concatenate([b["cond"] for b in batches])[:n]
    name = hashlib.sha256(x.tobytes() + label.tobytes() + bytes([EPOCHS])).hexdigest()[:16]
    path = (
        Path(os.environ.get("JAXDISTILL_CACHE", "~/.cache/jaxdistill")).expanduser()
        / f"classifier_{name}.npz"
    )
    if path.exists():
        saved = np.load(path)
        return Classifier((saved["w0"], saved["w1"]), (saved["b0"], saved["b1"]))
    net = MLPClassifier((64,), max_iter=EPOCHS, tol=0.0, n_iter_no_change=10**6, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it stops at max_iter is meant
        net.fit(x, label)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{os.getpid()}.{path.name}")
    with temp.open("wb") as file:
        np.savez(
            file, w0=net.coefs_[0], w1=net.coefs_[1], b0=net.intercepts_[0], b1=net.intercepts_[1]
        )
    os.replace(temp, path)
    return Classifier(tuple(net.coefs_), tuple(net.intercepts_))
