from math import comb

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives.pacing import beta_kernel, efficiency, signal_to_noise

P = jnp.linspace(0, 1, 1001)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0), (0.5, 0.5)])
def test_shape_of_the_kernel(a, b):
    w = beta_kernel(P, a, b)
    assert w[0] == 0 and w[-1] == 0 and (w[1:-1] > 0).all()
    assert abs(float(P[jnp.argmax(w)]) - a / (a + b)) <= 1e-3
    np.testing.assert_allclose(w.max(), a**a * b**b / (a + b) ** (a + b), rtol=1e-4)
    np.testing.assert_allclose(beta_kernel(P, b, a), w[::-1], rtol=1e-3)  # 1 - p is rounded: 6e-8 of 1e-3, times b


def test_exponents_0_are_uniform_and_one_of_them_is_one_sided():
    assert (beta_kernel(P, 0.0, 0.0) == 1).all()
    np.testing.assert_array_equal(beta_kernel(P, 0.0, 1.0), 1 - P)
    np.testing.assert_array_equal(beta_kernel(P, 1.0, 0.0), P)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_mean_of_the_plug_in_weight(k):
    """E[w(c / K)] = p (1 - p) (1 - 1 / K) of binomial counts: the bias is a factor, which normalisation cancels."""
    p, c = np.linspace(0, 1, 21)[:, None], np.arange(k + 1)
    law = np.array([comb(k, i) for i in c]) * p**c * (1 - p) ** (k - c)
    mean = (law * np.asarray(beta_kernel(jnp.asarray(c / k)))).sum(1)
    np.testing.assert_allclose(mean, (p * (1 - p))[:, 0] * (1 - 1 / k), atol=1e-6)


def test_efficiency_is_best_at_signal_over_variance():
    rng = np.random.default_rng(0)
    s, v = jnp.asarray(rng.random(50)), jnp.asarray(rng.random(50) + 0.1)
    best = s / v
    np.testing.assert_allclose(efficiency(3 * best, s, v), 1, rtol=1e-6)
    for d in (0.01, 0.1, 0.5):
        for _ in range(20):
            assert 1 - d**2 - 1e-6 <= efficiency(best * (1 + d * jnp.asarray(rng.uniform(-1, 1, 50))), s, v) < 1


def test_efficiency_bound_is_reached_by_two_atoms():
    d = 0.3
    mass = jnp.array([(1 + d) / 2, (1 - d) / 2])  # of s^2 / v
    np.testing.assert_allclose(efficiency(jnp.array([1 - d, 1 + d]), mass, mass), 1 - d**2, rtol=1e-6)


def test_signal_to_noise():
    g = jnp.array([[3.0, 1], [3, -1]])
    np.testing.assert_allclose(signal_to_noise(g), 9.0)
    assert signal_to_noise(jnp.array([[1.0, 0], [-1, 0]])) == 0
    assert signal_to_noise(jnp.ones((4, 2))) == np.inf
