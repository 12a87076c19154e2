import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.objectives.mixture import discrepancy, refresh

RATIOS = [1.2, 1.5, 1.0, 1.8, 1.1]
UNIFORM = np.full(5, 0.2)


def iterate(smoothing, weights=UNIFORM, ratio=RATIOS, n=10):
    for _ in range(n):
        weights = refresh(weights, ratio, smoothing)
    return weights


def test_weights_stay_between_floor_and_ceiling():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = rng.integers(2, 12)
        a = rng.uniform()
        r = refresh(rng.dirichlet(np.ones(n)), 1 + rng.exponential(5, n), a)
        assert abs(r.sum() - 1) <= 1e-12
        assert r.min() >= (1 - a) / n - 1e-15 and r.max() <= a + (1 - a) / n + 1e-15
    # the bounds are reached, and nothing overflows
    r = refresh(UNIFORM, [1, 1, 1, 1, 1e4], 0.5)
    np.testing.assert_allclose(r, [0.1, 0.1, 0.1, 0.1, 0.6], rtol=1e-12)


def test_equal_ratios_contract_to_uniform():
    r = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    np.testing.assert_allclose(
        refresh(r, [3.0] * 5, 0.5) - 0.2, 0.5 * (r - 0.2), atol=1e-15
    )
    np.testing.assert_allclose(
        refresh(UNIFORM, [3.0] * 5, 0.5), UNIFORM, atol=1e-15
    )


def test_limits_of_the_smoothing():
    np.testing.assert_allclose(
        refresh([0.5, 0.2, 0.1, 0.1, 0.1], RATIOS, 0.0), UNIFORM, rtol=1e-15
    )
    pure = iterate(1.0)  # r_0 exp(sum of the ratios)
    np.testing.assert_allclose(
        pure,
        np.exp(10 * np.array(RATIOS)) / np.exp(10 * np.array(RATIOS)).sum(),
        rtol=1e-12,
    )
    assert round(pure[3], 2) == 0.95


def test_fixed_point():
    np.testing.assert_allclose(
        discrepancy(RATIOS), [0.1696, 0.2290, 0.1389, 0.3091, 0.1535], atol=5e-5
    )
    expected = [0.1622, 0.2073, 0.1457, 0.3317, 0.1531]
    np.testing.assert_allclose(
        iterate(0.5, discrepancy(RATIOS), n=100), expected, atol=5e-5
    )
    np.testing.assert_allclose(iterate(0.5, n=100), expected, atol=5e-5)


def test_order_and_shift():
    r = refresh(UNIFORM, RATIOS, 0.5)
    assert (np.argsort(r) == np.argsort(RATIOS)).all()
    np.testing.assert_allclose(
        refresh(UNIFORM, np.array(RATIOS) + 7, 0.5), r, rtol=1e-12
    )


def test_a_domain_without_rows_is_refused():
    with pytest.raises(Refused, match="expected finite numbers"):
        discrepancy([1.0, np.nan])
