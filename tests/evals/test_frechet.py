"""Fréchet distance against closed forms (00-foundations, section 12)."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from jaxdistill.core.types import Refused
from jaxdistill.evals import frechet


def covariance(dim, seed):
    a = np.random.default_rng(seed).standard_normal((dim, dim))
    return a @ a.T + 0.1 * np.eye(dim)


def test_shifted_unit_gaussians_are_the_shift_apart():
    a = np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(
        frechet.from_statistics(np.zeros(3), np.eye(3), a, np.eye(3)),
        a @ a,
        rtol=1e-13,
    )


def test_commuting_diagonals():
    c1 = np.array([1.0, 4.0, 0.0])
    c2 = np.array([9.0, 0.25, 2.0])
    got = frechet.from_statistics(
        np.zeros(3), np.diag(c1), np.zeros(3), np.diag(c2)
    )
    np.testing.assert_allclose(
        got, np.sum((np.sqrt(c1) - np.sqrt(c2)) ** 2), rtol=1e-12
    )


def test_general_covariances_by_the_matrix_root():
    c1 = covariance(6, 0)
    c2 = covariance(6, 1)
    want = np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    got = frechet.from_statistics(np.zeros(6), c1, np.zeros(6), c2)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    np.testing.assert_allclose(
        got, frechet.from_statistics(np.zeros(6), c2, np.zeros(6), c1), rtol=1e-10
    )


@pytest.mark.parametrize(
    "n", [400, 20], ids=["full rank", "fewer samples than dimensions"]
)
def test_identical_sets_are_zero_apart(n):
    x = np.random.default_rng(2).standard_normal((n, 50)).astype(np.float32)
    # the trace is 50; rounding of the roots is sqrt(eps) of it in the null space at the worst
    np.testing.assert_allclose(
        frechet.frechet_distance(x, x), 0.0, atol=50 * np.sqrt(np.finfo(float).eps)
    )


def test_samples_use_the_unbiased_covariance_and_one_dimension_works():
    x = np.array([[0.0], [2.0]])
    y = np.array([[5.0], [9.0]])
    np.testing.assert_allclose(
        frechet.frechet_distance(x, y),
        6.0**2 + (np.sqrt(2) - np.sqrt(8)) ** 2,
        rtol=1e-13,
    )


def test_bias_falls_like_one_over_n():
    """For two draws of one distribution the mean's term is 2 D / n.

    The full distance is of that order, and halves with 2 n.
    """
    rng = np.random.default_rng(3)
    dim = 8
    bias = lambda n: np.mean(
        [
            frechet.frechet_distance(*rng.standard_normal((2, n, dim)))
            for _ in range(40)
        ]
    )
    small = bias(200)
    large = bias(400)
    assert small > 2 * dim / 200
    assert 1.7 < small / large < 2.3


def test_refuses_what_has_no_covariance():
    with pytest.raises(Refused, match="at least 2 rows"):
        frechet.statistics(np.zeros((1, 3)))
    with pytest.raises(Refused, match="all finite"):
        frechet.statistics(np.array([[0.0], [np.nan]]))
