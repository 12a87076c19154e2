from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives.pacing import (
    beta_kernel,
    efficiency,
    signal_to_noise,
    signal_to_noise_by_bin,
)

P = jnp.linspace(0, 1, 1001)


@pytest.mark.parametrize(
    ("a", "b"), [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0), (0.5, 0.5)]
)
def test_shape_of_the_kernel(a, b):
    w = beta_kernel(P, a, b)
    assert w[0] == 0 and w[-1] == 0 and (w[1:-1] > 0).all()
    assert abs(float(P[jnp.argmax(w)]) - a / (a + b)) <= 1e-3
    np.testing.assert_allclose(w.max(), a**a * b**b / (a + b) ** (a + b), rtol=1e-4)
    # 1 - p is rounded: 6e-8 of 1e-3, times b
    np.testing.assert_allclose(beta_kernel(P, b, a), w[::-1], rtol=1e-3)


def test_exponents_0_are_uniform_and_one_of_them_is_one_sided():
    assert (beta_kernel(P, 0.0, 0.0) == 1).all()
    np.testing.assert_array_equal(beta_kernel(P, 0.0, 1.0), 1 - P)
    np.testing.assert_array_equal(beta_kernel(P, 1.0, 0.0), P)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_mean_of_the_plug_in_weight(k):
    """E[w(c / K)] = p (1 - p) (1 - 1 / K) of binomial counts: the bias is a factor, which
    normalisation cancels.
    """
    p = np.linspace(0, 1, 21)[:, None]
    c = np.arange(k + 1)
    law = np.array([comb(k, i) for i in c]) * p**c * (1 - p) ** (k - c)
    mean = (law * np.asarray(beta_kernel(jnp.asarray(c / k)))).sum(1)
    np.testing.assert_allclose(mean, (p * (1 - p))[:, 0] * (1 - 1 / k), atol=1e-6)


def test_efficiency_is_best_at_signal_over_variance():
    rng = np.random.default_rng(0)
    s = jnp.asarray(rng.random(50))
    v = jnp.asarray(rng.random(50) + 0.1)
    best = s / v
    np.testing.assert_allclose(efficiency(3 * best, s, v), 1, rtol=1e-6)
    for d in (0.01, 0.1, 0.5):
        for _ in range(20):
            assert (
                1 - d**2 - 1e-6
                <= efficiency(
                    best * (1 + d * jnp.asarray(rng.uniform(-1, 1, 50))), s, v
                )
                < 1
            )


def test_efficiency_bound_is_reached_by_two_atoms():
    d = 0.3
    mass = jnp.array([(1 + d) / 2, (1 - d) / 2])  # of s^2 / v
    np.testing.assert_allclose(
        efficiency(jnp.array([1 - d, 1 + d]), mass, mass), 1 - d**2, rtol=1e-6
    )


def test_signal_to_noise():
    g = jnp.array([[3.0, 1], [3, -1]])
    np.testing.assert_allclose(signal_to_noise(g), 9.0)
    assert signal_to_noise(jnp.array([[1.0, 0], [-1, 0]])) == 0
    assert signal_to_noise(jnp.ones((4, 2))) == np.inf


def test_signal_to_noise_by_bin_is_that_of_the_problems_in_it():
    """Of tables by hand, whatever tree they are in; pass rate 1 belongs to the last bin, and one
    problem has none.
    """
    rng = np.random.default_rng(0)
    g = rng.standard_normal((7, 5)).astype(np.float32)
    rate = jnp.array([0.0, 0.2, 0.24, 0.5, 0.75, 0.9, 1.0])
    split = lambda row: {"w": row["g"][:4].reshape(2, 2), "b": row["g"][4:]}
    snr, count = signal_to_noise_by_bin(split, {"g": jnp.asarray(g)}, rate, 4)
    np.testing.assert_array_equal(count, [3, 0, 1, 3])
    for i, rows in ((0, slice(0, 3)), (3, slice(4, 7))):
        np.testing.assert_allclose(
            snr[i],
            (2 * signal_to_noise(jnp.asarray(g[rows])) - 1) / 3,
            rtol=1e-4,
            atol=1e-6,
        )
    assert np.isnan(snr[1:3]).all()


def test_few_problems_do_not_look_like_signal():
    """Over many draws of pure noise the mean is 0 for n = 3 as for n = 300, in 64 dimensions, to 5
    standard errors.
    """
    rng = np.random.default_rng(0)
    rate = jnp.array([0.0] * 3 + [1.0] * 300)
    draws = jnp.asarray(rng.standard_normal((200, 303, 64)), jnp.float32)
    snr = jax.lax.map(
        lambda g: signal_to_noise_by_bin(lambda row: row, g, rate, 2)[0], draws
    )
    assert (abs(snr.mean(0)) <= 5 * snr.std(0) / 200**0.5).all()


def test_the_probe_sees_a_bell_where_there_is_one():
    """Gradients of mean 8 p (1 - p) along one direction and unit noise, 4,000 problems in each of
    five parts.
    """
    rng = np.random.default_rng(0)
    rate = jnp.asarray(rng.random(20_000), jnp.float32)
    g = (
        rng.standard_normal((20_000, 8))
        + 8 * np.asarray(beta_kernel(rate))[:, None] * np.eye(8)[0]
    )
    snr, _ = signal_to_noise_by_bin(
        lambda row: row, jnp.asarray(g, jnp.float32), rate, 5
    )
    assert (
        snr[2] > snr[1] > 1.5 * snr[0]
        and snr[2] > snr[3] > 1.5 * snr[4]
        and snr[0] > 0
    )
