"""How well samples cover a known Gaussian mixture, given as `Mixture.components`: (weights [K], means [K
D], stds [K]).
"""

from __future__ import annotations

import numpy as np

from jaxdistill.evals import distances

Components = tuple[np.ndarray, np.ndarray, np.ndarray]


def assign(x: np.ndarray, components: Components) -> tuple[np.ndarray, np.ndarray]:
    """The most likely mode of each sample [n D], int [n], and its distance to that mode's mean in
    standard deviations [n].
    """
    weights, means, stds = (np.asarray(a, np.float64) for a in components)
    d2 = distances.squared(x, means) / stds**2
    mode = np.argmax(np.log(weights) - x.shape[1] * np.log(stds) - d2 / 2, 1)
    return mode, np.sqrt(np.take_along_axis(d2, mode[:, None], 1)[:, 0])


def modes_hit(
    x: np.ndarray, components: Components, share: float = 0.01, radius: float = 3.0
) -> float:
    """Fraction of modes with at least `share` of their weight's samples within `radius` standard
    deviations.
    """
    mode, distance = assign(x, components)
    found = np.bincount(mode[distance <= radius], minlength=len(components[0])) / len(x)
    return float(np.mean(found >= share * components[0]))


def mode_kl(x: np.ndarray, components: Components) -> float:
    """KL(histogram of modes || weights), in nats; finite where modes are missing."""
    share = np.bincount(assign(x, components)[0], minlength=len(components[0])) / len(x)
    return float(
        np.sum(
            np.where(
                share > 0, share * np.log(np.where(share > 0, share, 1.0) / components[0]), 0.0
            )
        )
    )


def quality(x: np.ndarray, components: Components, radius: float = 3.0) -> float:
    """Fraction of samples within `radius` standard deviations of their mode's mean; 1 -
    e^(-radius^2 / 2) for 2-D data itself.
    """
    return float(np.mean(assign(x, components)[1] <= radius))


def offsets(x: np.ndarray, components: Components) -> np.ndarray:
    """Every sample's offset from the mean of its most likely mode, in that mode's standard
    deviations: [n D].
    """
    _, means, stds = components
    mode, _ = assign(x, components)
    return (x - means[mode]) / stds[mode, None]
