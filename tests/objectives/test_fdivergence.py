"""The registry against its own f, and both identities that its weights serve, by quadrature in one
dimension.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.objectives import fdivergence, gan

KINDS = sorted(fdivergence.NAMES)
EPS64 = np.finfo(np.float64).eps


pytestmark = pytest.mark.usefixtures("x64")


def normal(n):
    """Nodes and weights of the mean over N(0, 1)."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return jnp.asarray(x), jnp.asarray(w / w.sum())


def log_density(x, mean, var):
    return -0.5 * (x - mean) ** 2 / var - 0.5 * jnp.log(2 * jnp.pi * var)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_f(kind):
    """h = r^2 f'', r^2 h'', h - r h' by automatic differentiation; f(1) = 0, h(1) = f''(1)."""
    row = fdivergence.NAMES[kind]
    h = lambda r: r**2 * jax.grad(jax.grad(row.f))(r)
    for r in (0.1, 1.0, 7.0):
        np.testing.assert_allclose(row.h(jnp.asarray(r)), h(r), rtol=1e-10)
        np.testing.assert_allclose(
            row.di(jnp.asarray(r)),
            r**2 * jax.grad(jax.grad(h))(r),
            rtol=1e-9,
            atol=1e-12,
        )
        np.testing.assert_allclose(
            row.fgm(jnp.asarray(r)),
            h(r) - r * jax.grad(h)(r),
            rtol=1e-10,
            atol=1e-12,
        )
        assert h(r) > 0
    np.testing.assert_allclose(row.f(jnp.asarray(1.0)), 0.0, atol=4 * EPS64)
    np.testing.assert_allclose(
        row.h(jnp.asarray(1.0)), jax.grad(jax.grad(row.f))(1.0), rtol=1e-12
    )


def test_mixtures_of_the_two_kl():
    r = jnp.array([0.1, 1.0, 7.0])
    jkl = fdivergence.NAMES["jkl"]
    jeffreys = fdivergence.NAMES["jeffreys"]
    np.testing.assert_allclose(jkl.h(r), 0.4 * r + 0.6, rtol=1e-12)
    np.testing.assert_allclose(jkl.fgm(r), 0.6, rtol=1e-12)
    np.testing.assert_array_equal(jkl.di(r), 0.0)
    np.testing.assert_allclose(jeffreys.f(r), (r - 1) * jnp.log(r), rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "scale", "value"),
    [
        ("forward_kl", 1, 0.2661067),
        ("reverse_kl", 1, 0.1605600),
        ("js", 0.5, 0.0456237),
    ],
)
def test_expansion_over_noise_levels(kind, scale, value):
    """VE, t = sigma: D_f(q_0 || p_0) = int sigma E_p[h d^2] d sigma + D_f(q_T || p_T) for p_0 =
    N(.4, .5), q_0 = N(0, .9), T = 6.
    """
    row = fdivergence.NAMES[kind]
    end = 6.0
    u, w = np.polynomial.legendre.leggauss(80)
    sigmas = jnp.asarray((u + 1) * end / 2)
    lengths = jnp.asarray(w * end / 2)
    z, p = normal(120)

    def at(sigma):
        mean = 0.4
        var = 0.5 + sigma**2
        other = 0.9 + sigma**2
        x = mean + jnp.sqrt(var) * z
        r = jnp.exp(log_density(x, 0.0, other) - log_density(x, mean, var))
        d = -(x - mean) / var + x / other
        return scale * jnp.sum(p * row.f(r)), scale * jnp.sum(p * row.h(r) * d**2)

    integral = jnp.sum(lengths * sigmas * jax.vmap(lambda s: at(s)[1])(sigmas))
    np.testing.assert_allclose(at(0.0)[0], value, atol=6e-8)
    np.testing.assert_allclose(integral + at(end)[0], value, atol=6e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_at_one_noise_level(kind):
    """d D_f(q || p_theta) / d theta = E[h(r) (s_p - s_q) dx / d theta] for x = m + c z; reverse KL
    is the plain difference.
    """
    row, (z, w) = fdivergence.NAMES[kind], normal(160)
    m = 0.32
    c = 0.8488
    var = 1.1

    def value(m, c):
        x = m + c * z
        return jnp.sum(
            w * row.f(jnp.exp(log_density(x, 0.0, var) - log_density(x, m, c**2)))
        )

    x = m + c * z
    r = jnp.exp(log_density(x, 0.0, var) - log_density(x, m, c**2))
    pull = row.h(r) * (-(x - m) / c**2 + x / var)
    np.testing.assert_allclose(
        jax.grad(value, (0, 1))(m, c),
        (jnp.sum(w * pull), jnp.sum(w * pull * z)),
        rtol=1e-8,
        atol=1e-10,
    )


def test_the_best_discriminator_says_the_log_ratio():
    """The derivative of its loss along a + b x + c x^2 vanishes at log q - log p alone."""
    (z, w), (m, c, var) = normal(160), (0.32, 0.8488, 1.1)
    best = lambda x: log_density(x, 0.0, var) - log_density(x, m, c**2)

    def loss(move):
        logit = lambda x: best(x) + move[0] + move[1] * x + move[2] * x**2
        return jnp.sum(
            w
            * gan.non_saturating_discriminator(
                logit(jnp.sqrt(var) * z), logit(m + c * z)
            )
        )

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(3)), 0.0, atol=1e-6)
    assert jnp.all(jnp.abs(jax.grad(loss)(jnp.full(3, 0.3))) > 1e-2)


def test_ratio_is_clipped_and_differentiable_inside():
    r = fdivergence.ratio(jnp.array([-40.0, 0.0, 1.0, 40.0]))
    np.testing.assert_allclose(r, [1e-3, 1.0, np.e, 1e3], rtol=1e-12)
    slope = jax.grad(lambda z: fdivergence.ratio(z).sum())(jnp.array([-40.0, 0.5]))
    np.testing.assert_allclose(slope, [0.0, np.exp(0.5)], rtol=1e-12)


def test_ratio_clip_and_bins_are_the_released_codes():
    """r clipped to [.1, 20]; bins follow the mean of r in each tenth of the times; h of r over its
    bin's mean, over the batch mean.
    """
    rng = np.random.default_rng(0)
    bins = 10
    rate = 0.5
    logit = 4 * rng.standard_normal(64)
    t = rng.uniform(0.2, 0.69, 64)
    means = rng.uniform(0.5, 2.0, bins)
    r = np.clip(np.exp(np.clip(logit, -10, 10)), 0.1, 20)
    index = np.floor((t - 0.1) / 0.08).astype(int)
    want = means.copy()
    for i in range(bins):
        mine = r[index == i]
        if len(mine):
            want[i] = rate * means[i] + (1 - rate) * mine.sum() / (len(mine) + 1e-6)
    assert 0 < len(set(index.tolist())) < bins
    got, own = fdivergence.binned_means(
        jnp.asarray(means),
        fdivergence.f_ratio(jnp.asarray(logit), 0.1, 20),
        jnp.asarray(t),
        0.1,
        0.9,
        rate,
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(own, want[index], rtol=1e-12)
    scaled = r / (want[index] + 1e-6)
    h = fdivergence.f_weight(
        fdivergence.NAMES["js"], jnp.asarray(logit), 0.1, 20, scale=own + 1e-6
    )
    np.testing.assert_allclose(
        h, (1 - 1 / (1 + scaled)) / np.mean(1 - 1 / (1 + scaled)), rtol=1e-9
    )


def test_times_at_the_ends_fall_into_the_outer_bins():
    means, own = fdivergence.binned_means(
        jnp.ones(4),
        jnp.asarray([2.0, 3.0, 5.0]),
        jnp.asarray([-1.0, 1.0, 7.0]),
        0.0,
        1.0,
        0.0,
    )
    np.testing.assert_allclose(means, [2, 1, 1, 4], rtol=1e-6)
    np.testing.assert_allclose(own, [2, 4, 4], rtol=1e-6)


def test_f_weight_has_batch_mean_one_is_clipped_and_carries_no_gradient():
    logit = jnp.asarray([-40.0, -10.0, 0.0, 1.0])
    h = fdivergence.f_weight(fdivergence.NAMES["forward_kl"], logit)
    np.testing.assert_allclose(h.mean(), 1.0, rtol=4 * EPS64)
    assert h[0] == h[1]
    np.testing.assert_allclose(h[3] / h[2], np.e, rtol=1e-12)
    np.testing.assert_array_equal(
        fdivergence.f_weight(fdivergence.NAMES["reverse_kl"], logit), 1.0
    )
    np.testing.assert_array_equal(
        jax.grad(
            lambda z: fdivergence.f_weight(fdivergence.NAMES["jeffreys"], z)[3]
        )(logit),
        0.0,
    )
    with pytest.raises(
        Refused, match=r"divergence='jefreys'.* did you mean 'jeffreys'"
    ):
        fdivergence.from_name({"divergence": "jefreys"})
