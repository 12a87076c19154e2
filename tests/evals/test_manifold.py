"""Precision, recall, density and coverage on sets whose balls are known."""

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.evals import distances, manifold


def modes(counts, seed=0):
    """Tight clusters, ten units apart."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [
            rng.standard_normal((n, 2)) * 0.1 + [10 * i, 0]
            for i, n in enumerate(counts)
        ]
    )


def test_identical_sets_are_perfect():
    x = modes([40, 40])
    assert manifold.precision_recall(x, x) == (1.0, 1.0)
    density, coverage = manifold.density_coverage(x, x)
    assert coverage == 1.0
    # k neighbours or, where rounding breaks a tie, k + 1
    np.testing.assert_allclose(density, 1.0, atol=0.2)


def test_disjoint_sets_have_nothing():
    x = modes([40])
    assert manifold.precision_recall(x, x + 100) == (0.0, 0.0)
    assert manifold.density_coverage(x, x + 100) == (0.0, 0.0)


def test_a_dropped_mode_lowers_recall_and_coverage_only():
    real = modes([200, 200])
    fake = modes([400], seed=1)
    precision, recall = manifold.precision_recall(real, fake)
    density, coverage = manifold.density_coverage(real, fake)
    assert precision > 0.9 and density > 0.9
    assert recall <= 0.5 and coverage <= 0.5
    back = manifold.precision_recall(fake, real)
    assert back == (recall, precision)


def test_points_on_a_line_by_hand():
    """Reals 0, 1, 3 reach 1, 1, 2 (k = 1). Fakes .5 (balls of 0 and 1), 2.5 (of 3), 6 (none)."""
    real = np.array([[0.0], [1.0], [3.0]])
    fake = np.array([[0.5], [2.5], [6.0]])
    np.testing.assert_allclose(manifold.radii(real, 1), [1, 1, 2])
    # fakes reach 2, 2, 3.5
    assert manifold.precision_recall(real, fake, k=1) == (
        2 / 3,
        1.0,
    )
    assert manifold.density_coverage(real, fake, k=1) == (1.0, 1.0)
    assert manifold.density_coverage(real, fake[2:], k=1) == (0.0, 0.0)


def test_blocks_of_rows_give_the_whole():
    x = modes([30, 7])
    y = modes([25], seed=1)
    whole = np.sqrt(((x[:, None] - y) ** 2).sum(-1))
    parts = list(distances.blocks(x, y, size=10))
    assert [len(p) for p in parts] == [10, 10, 10, 7]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-9)


def test_refuses_more_neighbours_than_samples():
    with pytest.raises(Refused, match="k=3: expected 1 to 2"):
        manifold.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
