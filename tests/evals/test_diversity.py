"""Diversity at its extremes (00-foundations, section 12)."""

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.evals import diversity


def test_vendi_counts_different_samples():
    np.testing.assert_allclose(
        diversity.vendi_score(np.ones((7, 3))), 1.0, rtol=1e-10
    )
    np.testing.assert_allclose(
        diversity.vendi_score(5 * np.eye(6)), 6.0, rtol=1e-12
    )
    np.testing.assert_allclose(
        diversity.vendi_score(np.repeat(np.eye(4), 3, 0)), 4.0, rtol=1e-12
    )


def test_vendi_is_the_entropy_of_the_kernels_eigenvalues():
    x = np.random.default_rng(0).standard_normal((5, 9))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 5)
    np.testing.assert_allclose(
        diversity.vendi_score(x),
        np.exp(-np.sum(values * np.log(values))),
        rtol=1e-11,
    )
    with pytest.raises(Refused, match="no direction"):
        diversity.vendi_score(np.zeros((3, 2)))


def test_pairwise_distance_stays_within_conditions():
    x = np.array([[0.0], [1.0], [3.0], [100.0], [104.0], [7.0]])
    cond = np.array([0, 0, 0, 1, 1, 2])
    np.testing.assert_allclose(
        diversity.pairwise_distance(x, cond), ((1 + 2 + 3) / 3 + 4) / 2, rtol=1e-6
    )
    np.testing.assert_allclose(diversity.pairwise_distance(x[:3]), 2.0, rtol=1e-6)
    np.testing.assert_allclose(diversity.pairwise_distance(np.zeros((4, 2))), 0.0)
    with pytest.raises(Refused, match="1 samples of 1 conditions"):
        diversity.pairwise_distance(x[:1])
