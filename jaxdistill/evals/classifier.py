"""A small classifier of the data's own labels.

Its features serve Fréchet distances of pictures that Inception was not made for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped
from sklearn.neural_network import MLPClassifier

from jaxdistill.data.base import Dataset

EPOCHS = 10
WIDTH = 64  # features


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A two-layer perceptron on flattened pixels: 64 rectified features, then logits."""

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    def features(self, x: Shaped[np.ndarray, "B ..."]) -> Float[np.ndarray, "B D"]:
        """The activations before the logits, float64."""
        pixels = x.reshape(len(x), -1).astype(np.float64)
        return np.maximum(pixels @ self.weights[0] + self.biases[0], 0)

    def predict(self, x: Shaped[np.ndarray, "B ..."]) -> Int[np.ndarray, " B"]:
        """The most likely labels."""
        logits = self.features(x) @ self.weights[1] + self.biases[1]
        return logits.argmax(-1)


@functools.lru_cache(maxsize=4)
def trained_on(data: Dataset, n: int = 20_000) -> Classifier:
    """A classifier fitted to the first `n` training samples; a smaller data set is repeated.

    The fit is deterministic: its seed is fixed, and the samples are those of the data set's order
    with seed 0. It is kept in $JAXDISTILL_CACHE, else ~/.cache/jaxdistill.
    """
    x, label = _first_samples(dataclasses.replace(data, seed=0), n)
    name = hashlib.sha256(
        x.tobytes() + label.tobytes() + bytes([EPOCHS])
    ).hexdigest()[:16]
    folder = Path(
        os.environ.get("JAXDISTILL_CACHE", "~/.cache/jaxdistill")
    ).expanduser()
    file = folder / f"classifier_{name}.npz"
    if file.exists():
        saved = np.load(file)
        return Classifier((saved["w0"], saved["w1"]), (saved["b0"], saved["b1"]))
    net = MLPClassifier(
        (WIDTH,), max_iter=EPOCHS, tol=0.0, n_iter_no_change=10**6, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training is meant to stop at max_iter
        net.fit(x, label)
    found = Classifier(tuple(net.coefs_), tuple(net.intercepts_))
    _save(found, file)
    return found


def _first_samples(data: Dataset, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixels [n D], labels [n]) of the first training samples."""
    batches = []
    count = 0
    for batch in data.loader():
        batches.append(batch)
        count += len(batch["x"])
        if count >= n:
            break
    x = np.concatenate([b["x"].reshape(len(b["x"]), -1) for b in batches])
    label = np.concatenate([b["cond"] for b in batches])
    return x[:n], label[:n]


def _save(net: Classifier, file: Path) -> None:
    """Writes the weights in one move, so that no reader sees half of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    first, second = net.weights
    shift, offset = net.biases
    with temporary.open("wb") as stream:
        np.savez(stream, w0=first, w1=second, b0=shift, b1=offset)
    os.replace(temporary, file)
