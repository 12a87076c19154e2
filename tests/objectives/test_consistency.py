"""Consistency objectives and their discretisation schedules (00-foundations, section 6)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives import consistency as cm


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def test_pseudo_huber_value_and_limits(x64):
    a = draw(5, 2, 3)
    b = draw(5, 2, 3, seed=1)
    square = np.sum((np.asarray(a) - np.asarray(b)) ** 2, (1, 2))
    np.testing.assert_allclose(
        cm.pseudo_huber(a, b, 0.3), np.sqrt(square + 0.09) - 0.3, rtol=1e-13
    )
    np.testing.assert_allclose(
        cm.pseudo_huber(a, b, 0.0), np.sqrt(square), rtol=1e-13
    )
    np.testing.assert_allclose(2e6 * cm.pseudo_huber(a, b, 1e6), square, rtol=1e-9)
    grad = jax.grad(lambda a: cm.pseudo_huber(a, b, 0.3).sum())(a)
    np.testing.assert_allclose(
        grad, (a - b) / np.sqrt(square + 0.09)[:, None, None], rtol=1e-12
    )


@pytest.mark.parametrize("c", [0.0, 0.03])
def test_pseudo_huber_is_exact_near_zero_in_float32(c):
    a = jnp.full((1, 4), 1e-6, jnp.float32)
    want = 4e-12 / (math.sqrt(4e-12 + c**2) + c)
    np.testing.assert_allclose(
        cm.pseudo_huber(a, jnp.zeros_like(a), c), want, rtol=1e-6
    )
    grad = jax.grad(lambda a: cm.pseudo_huber(a, a * 0, c).sum())(jnp.zeros_like(a))
    np.testing.assert_array_equal(grad, 0.0)


def test_ict_constant():
    np.testing.assert_allclose(
        cm.ict_c(32 * 32 * 3), 0.00054 * np.sqrt(3072), rtol=1e-15
    )


def test_tangent_surrogate_has_value_g_squared_and_gradient_minus_two_g(x64):
    f = draw(4, 3, 2)
    g = draw(4, 3, 2, seed=1)
    np.testing.assert_allclose(
        cm.tangent_surrogate(f, g), np.sum(np.asarray(g) ** 2, (1, 2)), rtol=1e-14
    )
    by_f, by_g = jax.grad(
        lambda f, g: cm.tangent_surrogate(f, g).sum(), argnums=(0, 1)
    )(f, g)
    np.testing.assert_array_equal(by_f, -2 * g)
    np.testing.assert_array_equal(by_g, 0.0)


def test_discrete_consistency_gradient_tends_to_the_continuous_one(x64):
    """||f_t - sg f_r||^2 / (t - r) -> 2 (df/dt) . d f_t as r -> t, that is the surrogate with g =
    -df/dt.
    """
    weights = draw(6)
    f = lambda w, t: jnp.stack([w[:3] * jnp.cos(t), w[3:] * t**2])[None]
    t = 0.7
    gap = 1e-6
    slope = jax.jacfwd(f, argnums=1)(weights, t)
    continuous = jax.grad(lambda w: cm.tangent_surrogate(f(w, t), -slope).sum())(
        weights
    )
    held = f(weights, t - gap)
    discrete = jax.grad(lambda w: jnp.sum((f(w, t) - held) ** 2) / gap)(weights)
    np.testing.assert_allclose(discrete, continuous, rtol=10 * gap, atol=10 * gap)


def test_normalised_tangent_is_free_of_size_and_scale(x64):
    g = draw(3, 4, 5)
    rms = np.sqrt(np.mean(np.asarray(g) ** 2, (1, 2), keepdims=True))
    np.testing.assert_allclose(cm.normalise_tangent(g), g / (rms + 0.1), rtol=1e-13)
    np.testing.assert_allclose(
        cm.normalise_tangent(g, c=0.0),
        cm.normalise_tangent(7 * g, c=0.0),
        rtol=1e-13,
    )
    twice = jnp.concatenate([g, g], 2)
    np.testing.assert_allclose(
        cm.normalise_tangent(twice)[..., :5], cm.normalise_tangent(g), rtol=1e-13
    )
    np.testing.assert_array_equal(cm.normalise_tangent(0 * g), 0.0)
    np.testing.assert_array_equal(
        cm.clip_tangent(jnp.asarray([-3.0, 0.2, 1.5])), [-1.0, 0.2, 1.0]
    )


def test_the_euclidean_norm_depends_on_the_size():
    """Without c it is the normalisation by the root mean square over sqrt(dim)."""
    with jax.enable_x64(True):
        g = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)))
        norm = np.sqrt((np.asarray(g) ** 2).sum((1, 2), keepdims=True))
        np.testing.assert_allclose(
            cm.euclidean_tangent(g), g / (norm + 0.1), rtol=1e-13
        )
        np.testing.assert_allclose(
            cm.euclidean_tangent(g, 0.0) * np.sqrt(20),
            cm.normalise_tangent(g, 0.0),
            rtol=1e-13,
        )
        assert np.linalg.norm(cm.euclidean_tangent(g)[0]) < 1


def test_ct_schedule():
    np.testing.assert_array_equal(
        cm.ct_levels(jnp.asarray([0, 1000]), 1000), [2, 151]
    )
    k = jnp.arange(0, 1001, 50)
    levels = np.asarray(cm.ct_levels(k, 1000))
    want = [
        math.ceil(math.sqrt(i / 1000 * (151**2 - 4) + 4) - 1) + 1
        for i in np.asarray(k)
    ]
    np.testing.assert_array_equal(levels, want)
    assert np.all(np.diff(levels) > 0)
    np.testing.assert_allclose(
        cm.ct_decay(jnp.asarray([2, 3, 151])),
        [0.81, 0.9, 0.9 ** (2 / 150)],
        rtol=1e-6,
    )


def test_ict_schedule_doubles_every_50k_of_400k():
    k = jnp.asarray(
        [
            0,
            49_999,
            50_000,
            100_000,
            150_000,
            200_000,
            250_000,
            300_000,
            350_000,
            399_999,
            400_000,
        ]
    )
    want = [11, 11, 21, 41, 81, 161, 321, 641, 1281, 1281, 1281]
    np.testing.assert_array_equal(cm.ict_levels(k, 400_000), want)


def test_noise_levels_are_the_karras_grid_upwards():
    levels = cm.noise_levels(jnp.asarray(8), 11)
    assert levels.shape == (11,)
    np.testing.assert_allclose(
        levels[:8][::-1],
        [80, 34.992, 13.699, 4.637, 1.287, 0.2675, 0.0352, 0.002],
        rtol=2e-3,
    )
    np.testing.assert_allclose(levels[8:], 80.0, rtol=1e-5)


def test_ict_probs_are_lognormal_masses(x64):
    levels = cm.noise_levels(11, 14)
    probs = np.asarray(cm.ict_probs(levels))
    np.testing.assert_allclose(probs.sum(), 1.0, rtol=1e-14)
    np.testing.assert_array_equal(probs[10:], 0.0)
    cdf = jax.scipy.stats.norm.cdf((jnp.log(levels[:11]) + 1.1) / 2)
    np.testing.assert_allclose(
        probs[:10], np.diff(cdf) / (cdf[-1] - cdf[0]), rtol=1e-10
    )


def test_ect_time_starts_at_diffusion_and_closes_in(x64):
    t = jnp.asarray([1e-3, 0.5, 3.0, 80.0])
    np.testing.assert_array_equal(
        cm.ect_time(t, 0), jnp.where(t < 3, 0.0, cm.ect_time(t, 0))
    )
    n = 1 + 8 / (1 + np.exp(np.asarray(t)))
    last = np.zeros(4)
    for stage in range(8):
        r = np.asarray(cm.ect_time(t, stage))
        np.testing.assert_allclose(
            r, t * np.maximum(0, 1 - n * 2.0 ** -(stage + 1)), rtol=1e-12
        )
        assert np.all(r >= last) and np.all(r < t)
        last = r
    np.testing.assert_allclose(cm.ect_time(t, 40), t, rtol=1e-10)
    np.testing.assert_allclose(
        cm.ect_time(80.0, 0, q=256.0), 80 * (1 - 1 / 256), rtol=1e-12
    )
