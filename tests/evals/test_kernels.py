"""Kernel distances: unbiasedness, definitions, invariances (00-foundations, section 12)."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from jaxdistill.core.types import Refused
from jaxdistill.evals import kernels


def draw(n, dim=2, shift=0.0, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)) + shift


def loops(k, x, y):
    """The unbiased estimate, sum by sum."""
    n = len(x)
    m = len(y)
    within = lambda a, n: (
        sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j)
        / (n * (n - 1))
    )
    return (
        within(x, n)
        + within(y, m)
        - 2 * sum(k(a, b) for a in x for b in y) / (n * m)
    )


def test_mmd2_by_definition():
    x = draw(7)
    y = draw(9, shift=1.0, seed=1)
    both = np.concatenate([x, y])
    median = np.median(cdist(both, both)[np.triu_indices(16, 1)])
    np.testing.assert_allclose(kernels.median_distance(x, y), median, rtol=1e-12)
    rbf = lambda a, b: np.mean(
        [
            np.exp(-np.sum((a - b) ** 2) / (2 * (median * 2.0**i) ** 2))
            for i in range(-2, 3)
        ]
    )
    np.testing.assert_allclose(kernels.mmd2(x, y), loops(rbf, x, y), rtol=1e-11)
    np.testing.assert_allclose(
        kernels.mmd2(x, y, width=median), kernels.mmd2(y, x), rtol=1e-12
    )


def test_energy_distance_by_definition():
    x = draw(7)
    y = draw(9, shift=1.0, seed=1)
    np.testing.assert_allclose(
        kernels.energy_distance(x, y),
        loops(lambda a, b: -np.linalg.norm(a - b), x, y),
        rtol=1e-11,
    )


def test_kid_of_whole_sets_is_the_cubic_kernels_estimate():
    x = draw(8, 3)
    y = draw(8, 3, shift=0.5, seed=1)
    mean, std = kernels.kid(x, y, subsets=3, size=8)
    np.testing.assert_allclose(
        mean, loops(lambda a, b: (a @ b / 3 + 1) ** 3, x, y), rtol=1e-11
    )
    np.testing.assert_allclose(std, 0.0, atol=1e-11)
    with pytest.raises(Refused, match="size=1000, expected at most 8"):
        kernels.kid(x, y)


@pytest.mark.parametrize(
    "distance",
    [
        lambda x, y: kernels.mmd2(x, y, width=1.0),
        kernels.energy_distance,
        lambda x, y: kernels.kid(x, y, 1, len(x))[0],
    ],
    ids=["mmd2", "energy", "kid"],
)
def test_mean_zero_for_equal_laws_negative_at_times_and_positive_for_others(
    distance,
):
    values = np.array(
        [
            distance(draw(40, seed=2 * i), draw(40, seed=2 * i + 1))
            for i in range(100)
        ]
    )
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert values.min() < 0 < values.max()
    assert distance(draw(40), draw(40, shift=1.0, seed=1)) > values.max()


def test_energy_distance_of_separated_points():
    """Two tight clusters a apart: 2 a, less their own spreads."""
    x = 1e-6 * draw(20)
    y = 1e-6 * draw(20, seed=1) + np.array([3.0, 4.0])
    np.testing.assert_allclose(kernels.energy_distance(x, y), 10.0, rtol=1e-5)


def test_an_offset_costs_no_digits():
    x = draw(30)
    y = draw(30, shift=0.3, seed=1)
    np.testing.assert_allclose(
        kernels.mmd2(x + 1e6, y + 1e6), kernels.mmd2(x, y), rtol=1e-6
    )
