"""The mixture's components, its samples, and its exact denoiser (00-foundations, section 4)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.data.mixtures import Blurred, Mixture
from jaxdistill.diffusion.process import EDM, VP, CosineVP, Flow, Trig

PROCESSES = [Flow(), Flow(shift=3.0), VP(), CosineVP(), Trig(), EDM()]


def log_density(data, process, x, t, modes):
    """log p_t(x) of one x [D] at scalar t over the modes listed, from the definition."""
    weights, means, stds = (
        jnp.asarray(a, jnp.float64)[jnp.asarray(modes)] for a in data.components
    )
    a, s = process.alpha_sigma(t)
    var = (a * stds) ** 2 + s**2
    logs = (
        jnp.log(weights)
        - jnp.sum((x - a * means) ** 2, -1) / (2 * var)
        - data.dim / 2 * jnp.log(2 * jnp.pi * var)
    )
    return jax.nn.logsumexp(logs)


@pytest.mark.parametrize(
    ("process", "dim"), [(Flow(), 1), *((p, 3) for p in PROCESSES)], ids=str
)
def test_score_is_the_gradient_of_the_log_density(x64, process, dim):
    data = Mixture(seed=2, dim=dim, modes=4)
    t = process.time_of_lam(jnp.asarray([3.0, 1.0, 0.0, -2.0]))
    x = (
        jnp.asarray(np.random.default_rng(0).standard_normal((4, dim)))
        * process.alpha_sigma(t)[1][:, None]
    )
    a, s, da, ds = (c[:, None] for c in process.coefs(t))

    def check(cond, modes):
        slope = jax.vmap(
            jax.grad(lambda x, t: log_density(data, process, x, t, modes))
        )
        return data.denoise(process, x, t, cond), slope(x, t)

    cases = [
        (None, [0, 1, 2, 3]),
        (jnp.full(4, 4), [0, 1, 2, 3]),
        (jnp.full(4, 2), [2]),
    ]
    for pred, slope in jax.jit(lambda: [check(*case) for case in cases])():
        np.testing.assert_allclose(-pred.eps / s, slope, rtol=1e-9, atol=1e-9)
        # Tweedie's x0 with it
        np.testing.assert_allclose(
            a * pred.x0 + s * pred.eps, x, rtol=1e-11, atol=1e-12
        )
        np.testing.assert_allclose(
            pred.v, da * pred.x0 + ds * pred.eps, rtol=1e-12, atol=1e-12
        )


def test_posterior_mean_by_quadrature(x64):
    """E[x0 | x_t] integrated over a grid of x0."""
    data = Mixture(seed=3, dim=1, modes=3)
    process = Flow()
    grid = jnp.linspace(-3, 3, 20_001)
    weights, means, stds = (np.asarray(a, np.float64) for a in data.components)
    prior = sum(
        w / s * np.exp(-((grid - m[0]) ** 2) / (2 * s**2))
        for w, m, s in zip(weights, means, stds)
    )
    for t, x in ((0.3, 0.4), (0.7, -0.5), (0.95, 1.0)):
        a, s = process.alpha_sigma(jnp.asarray(t))
        posterior = prior * np.exp(-((x - a * grid) ** 2) / (2 * s**2))
        want = np.sum(posterior * grid) / np.sum(posterior)
        got = data.denoise(process, jnp.full((1, 1), x), jnp.full(1, t)).x0[0, 0]
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_denoiser_is_exact_at_both_ends():
    """At t = 0 it is the identity, at pure noise the distribution's mean; float32, no 0 / 0."""
    data = Mixture(seed=4)
    x = jnp.asarray(data.evaluation(5)["x"])
    clean = data.denoise(Flow(), x, jnp.zeros(5))
    np.testing.assert_allclose(clean.x0, x, atol=4 * np.finfo(np.float32).eps)
    np.testing.assert_array_equal(clean.eps, 0.0)
    noise = data.denoise(Flow(), x, jnp.ones(5))
    weights, means, _ = data.components
    np.testing.assert_allclose(
        noise.x0, jnp.broadcast_to(weights @ means, x.shape), atol=1e-6
    )
    np.testing.assert_allclose(noise.eps, x, rtol=1e-6)


def test_net_is_the_denoiser_without_weights():
    data = Mixture()
    net = data.net(VP())
    x = jnp.ones((2, 2))
    t = jnp.full(2, 0.5)
    assert net.init(jax.random.key(0)) == {} and net.size == 0
    np.testing.assert_array_equal(
        net.apply({}, x, t, jnp.asarray([0, 6])).x0,
        data.denoise(VP(), x, t, jnp.asarray([0, 6])).x0,
    )


@pytest.mark.parametrize("seed", range(5))
def test_law_is_as_described(seed):
    data = Mixture(seed=seed, dim=2, modes=6)
    weights, means, stds = data.components
    assert weights.shape == (6,) and means.shape == (6, 2) and stds.shape == (6,)
    assert all(a.dtype == np.float32 for a in data.components)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
    assert weights.max() <= 2 * weights.min()
    assert np.all(np.linalg.norm(means, axis=1) <= 1.0 + 1e-6)
    assert np.all(np.abs(stds / data.std - 1) <= 0.25 + 1e-6)
    gaps = np.linalg.norm(means[:, None] - means, axis=-1)[np.triu_indices(6, 1)]
    assert gaps.min() > 3 * data.std  # 5 asked for, less where the ball is full
    again = Mixture(seed=seed, dim=2, modes=6).components
    assert all(np.array_equal(a, b) for a, b in zip(data.components, again))
    assert not np.array_equal(Mixture(seed=seed + 1).components[1], means)


def test_samples_have_the_laws_moments():
    data = Mixture(seed=1)
    n = 20_000
    weights, means, stds = data.components
    drawn = data.evaluation(n)
    assert drawn["x"].dtype == np.float32 and drawn["cond"].dtype == np.int32
    np.testing.assert_array_equal(drawn["null_cond"], data.modes)
    share = np.bincount(drawn["cond"], minlength=6) / n
    np.testing.assert_allclose(share, weights, atol=5 * np.sqrt(0.25 / n))
    for k in range(6):
        mine = drawn["x"][drawn["cond"] == k]
        np.testing.assert_allclose(
            mine.mean(0), means[k], atol=5 * stds[k] / np.sqrt(len(mine))
        )
        np.testing.assert_allclose(
            mine.std(0), stds[k], rtol=5 / np.sqrt(2 * len(mine))
        )


def test_batches_are_fixed_by_index_and_seed_and_split_by_rows():
    data = Mixture(seed=7, batch_size=8)
    whole = data.batch(3, slice(0, 8))
    halves = [data.batch(3, rows) for rows in (slice(0, 4), slice(4, 8))]
    for key in whole:
        np.testing.assert_array_equal(
            np.concatenate([h[key] for h in halves]), whole[key]
        )
    assert not np.array_equal(data.batch(4, slice(0, 8))["x"], whole["x"])
    np.testing.assert_array_equal(data.evaluation(5)["x"], data.evaluation(5)["x"])
    assert (
        data.spec()["x"].shape == (8, 2) and data.spec()["cond"].dtype == np.int32
    )


def test_without_labels_the_points_are_the_same():
    data = Mixture(seed=1, batch_size=8)
    plain = dataclasses.replace(data, labelled=False)
    assert set(plain.spec()) == {"x"}
    np.testing.assert_array_equal(
        plain.batch(3, slice(None))["x"], data.batch(3, slice(None))["x"]
    )
    np.testing.assert_array_equal(plain.evaluation(9)["x"], data.evaluation(9)["x"])


def test_classes_are_sectors_of_modes(x64):
    """The points stay; a class's denoiser is that of its modes alone, with their weights."""
    data = Mixture(seed=2, modes=6, classes=2, batch_size=64)
    assert data.labels.dtype == np.int32 and np.bincount(data.labels).tolist() == [
        3,
        3,
    ]
    angle = np.arctan2(data.components[1][:, 1], data.components[1][:, 0])
    assert angle[data.labels == 0].max() < angle[data.labels == 1].min()
    plain = dataclasses.replace(data, classes=0)
    mine = data.batch(0, slice(None))
    modes = plain.batch(0, slice(None))
    np.testing.assert_array_equal(mine["x"], modes["x"])
    np.testing.assert_array_equal(mine["cond"], data.labels[modes["cond"]])
    assert np.all(mine["null_cond"] == 2) and plain.labels.tolist() == list(
        range(6)
    )
    x = jnp.asarray(mine["x"][:4], jnp.float64)
    t = jnp.full(4, 0.5)
    slope = jax.vmap(
        jax.grad(
            lambda x, t: log_density(
                data, Flow(), x, t, np.flatnonzero(data.labels == 1)
            )
        )
    )(x, t)
    np.testing.assert_allclose(
        -data.denoise(Flow(), x, t, jnp.ones(4, int)).eps / 0.5,
        slope,
        rtol=1e-9,
        atol=1e-9,
    )
    both = data.denoise(Flow(), x, t, jnp.full(4, 2)).x0
    np.testing.assert_array_equal(both, data.denoise(Flow(), x, t).x0)


def test_blurred_teacher_is_off_by_that_much_noise(x64):
    """Same samples; on EDM its score at sigma is the exact one at sqrt(sigma^2 + blur^2)."""
    data = Blurred(seed=3, blur=0.1)
    exact = Mixture(seed=3)
    np.testing.assert_array_equal(
        data.batch(0, slice(None))["x"], exact.batch(0, slice(None))["x"]
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)))
    t = jnp.asarray([0.01, 0.05, 0.1, 0.3, 1.0, 10.0])
    wider = jnp.sqrt(t**2 + 0.01)
    ours = data.denoise(EDM(), x, t)
    theirs = exact.denoise(EDM(), x, wider)
    # the blurred distribution is in float32
    np.testing.assert_allclose(
        ours.eps / t[:, None], theirs.eps / wider[:, None], rtol=1e-5
    )
