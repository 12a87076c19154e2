"""How well samples cover the modes of a known Gaussian mixture (`data.mixtures.Components`)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxdistill.data.mixtures import Components
from jaxdistill.evals import distances


def assign(
    x: Shaped[np.ndarray, "B D"], components: Components
) -> tuple[Int[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """The most likely mode of each sample.

    Returns:
        The mode, and the distance from its mean in its standard deviations.
    """
    weights, means, stds = (np.asarray(a, np.float64) for a in components)
    square = distances.squared(x, means) / stds**2
    mode = np.argmax(np.log(weights) - x.shape[1] * np.log(stds) - square / 2, 1)
    return mode, np.sqrt(np.take_along_axis(square, mode[:, None], 1)[:, 0])


def modes_hit(
    x: Shaped[np.ndarray, "B D"],
    components: Components,
    share: float = 0.01,
    radius: float = 3.0,
) -> float:
    """Share of the modes that are covered.

    A mode is covered where at least `share` of the samples that it should have lie within `radius`
    standard deviations of its mean.
    """
    weights, _, _ = components
    mode, distance = assign(x, components)
    count = np.bincount(mode[distance <= radius], minlength=len(weights))
    return float(np.mean(count / len(x) >= share * weights))


def mode_kl(x: Shaped[np.ndarray, "B D"], components: Components) -> float:
    """KL(histogram of the samples' modes || weights), in nats; finite where modes are missing."""
    weights, _, _ = components
    mode, _ = assign(x, components)
    share = np.bincount(mode, minlength=len(weights)) / len(x)
    log_ratio = np.log(np.where(share > 0, share, 1.0) / weights)
    return float(np.sum(np.where(share > 0, share * log_ratio, 0.0)))


def quality(
    x: Shaped[np.ndarray, "B D"], components: Components, radius: float = 3.0
) -> float:
    """Share of samples within `radius` standard deviations of their mode's mean.

    It is 1 - exp(-radius^2 / 2) for the mixture itself in two dimensions.
    """
    _, distance = assign(x, components)
    return float(np.mean(distance <= radius))


def offsets(
    x: Shaped[np.ndarray, "B D"], components: Components
) -> Float[np.ndarray, "B D"]:
    """Each sample's offset from the mean of its most likely mode, in its standard deviations."""
    _, means, stds = components
    mode, _ = assign(x, components)
    return (x - means[mode]) / stds[mode, None]
