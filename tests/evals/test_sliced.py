"""Wasserstein distances against closed forms (00-foundations, section 12)."""

import itertools

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.evals import sliced


def draw(n, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim))


def test_shift_of_a_set_is_its_length_over_root_dim():
    """A pure shift by a moves every projection by a.u, whose mean square is |a|^2 / D."""
    x = draw(50, 8)
    a = np.arange(8.0)
    got = sliced.sliced_wasserstein(x, x + a, directions=20_000)
    # (a.u)^2 / |a|^2 is Beta(1/2, 7/2): mean 1/8, variance 2 (D - 1) / (D^2 (D + 2)); 5 sigma of
    # its mean, halved by the root
    sigma = np.sqrt(2 * 7 / (64 * 10)) * 8 / np.sqrt(20_000)
    np.testing.assert_allclose(
        got, np.linalg.norm(a) / np.sqrt(8), rtol=5 * sigma / 2
    )


def test_gaussians_of_equal_spread():
    """SW2^2 -> |a - b|^2 / D; the two samples' own noise adds O(1 / n)."""
    a = np.array([3.0, 0.0, 0.0, 4.0])
    got = sliced.sliced_wasserstein(
        draw(4000, 4), draw(4000, 4, seed=1) + a, directions=2000
    )
    np.testing.assert_allclose(got, 5 / 2, rtol=0.04)


def test_one_dimension_is_exact_and_order_does_not_matter():
    x = draw(30, 1)
    y = draw(30, 1, seed=1) ** 2
    want = np.sqrt(np.mean((np.sort(x, 0) - np.sort(y, 0)) ** 2))
    np.testing.assert_allclose(
        sliced.sliced_wasserstein(x, y, directions=3), want, rtol=1e-12
    )
    np.testing.assert_allclose(sliced.wasserstein2(x, y), want, rtol=1e-7)
    np.testing.assert_allclose(sliced.wasserstein2(x[::-1], y), want, rtol=1e-7)
    assert sliced.sliced_wasserstein(x, x[::-1]) < 1e-15


def test_exact_distance_is_the_best_of_all_matchings():
    x = draw(5, 2)
    y = draw(5, 2, seed=1)
    cost = lambda order: np.mean(np.sum((x - y[list(order)]) ** 2, 1))
    want = np.sqrt(min(map(cost, itertools.permutations(range(5)))))
    np.testing.assert_allclose(sliced.wasserstein2(x, y), want, rtol=1e-10)
    assert sliced.sliced_wasserstein(x, y) <= want


def test_refusals():
    with pytest.raises(Refused, match="equally many"):
        sliced.sliced_wasserstein(draw(3, 2), draw(4, 2))
    with pytest.raises(Refused, match="at most 500"):
        sliced.wasserstein2(draw(501, 1), draw(501, 1))
