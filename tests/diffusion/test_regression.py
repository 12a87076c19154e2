"""Denoising errors, and score matching within subintervals (Phased DMD): unbiased targets from
samples at s alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import Denoiser, VPVelocity
from jaxdistill.diffusion.process import DDPM, EDM, VP, CosineVP, Flow, Trig
from jaxdistill.diffusion.regression import (
    denoising_error,
    interval_error,
    interval_targets,
)
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.samplers import ode

POINTS = np.array([-1.0, 0.0, 1.0, 2.0])
PROCESSES = [Flow(), Flow(shift=5.0), Trig(), EDM()]
every = pytest.mark.parametrize(
    "process",
    PROCESSES,
    ids=lambda p: type(p).__name__ + str(getattr(p, "shift", "")),
)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def exact_x0(x, t):
    """E[x0 | x_t] of the four points on rectified flow, numpy [B]."""
    logits = -0.5 * ((x[:, None] - (1 - t) * POINTS) / t) ** 2
    w = np.exp(logits - logits.max(1, keepdims=True))
    return (w @ POINTS) / w.sum(1)


def test_conditional_mean_is_the_velocity_in_every_bin(x64):
    """s = .5, t = .8: E[u | x_t] = (x_t - E[x0 | x_t]) / t; the target eps - x_s is off by about a
    quarter.
    """
    s = 0.5
    t = 0.8
    n = 2_000_000
    rng = np.random.default_rng(0)
    xs = (1 - s) * rng.choice(POINTS, n) + s * rng.standard_normal(n)
    eps = rng.standard_normal(n)
    x0, noise, _ = interval_targets(Flow(), jnp.asarray(xs), jnp.asarray(eps), s, t)
    xt = np.asarray(
        Flow().transition(
            jnp.asarray(xs), jnp.asarray(eps), jnp.asarray(s), jnp.asarray(t)
        )
    )
    target = np.asarray(noise - x0)
    biased = eps - xs
    velocity = (xt - exact_x0(xt, t)) / t
    bins = np.digitize(xt, np.arange(-2.4, 1.61, 0.4))
    for i in range(1, 11):
        inside = bins == i
        error = target[inside] - velocity[inside]
        assert abs(error.mean()) < 5 * error.std() / inside.sum() ** 0.5, i
        assert 0.15 < np.mean(biased[inside] - velocity[inside]) < 0.35, i


@pytest.mark.parametrize(
    "process", [VP(), CosineVP(), DDPM()], ids=lambda p: type(p).__name__
)
def test_the_v_of_variance_preserving_processes(x64, process):
    """alpha eps - sigma x0: what a network of this parameterisation puts out, and (SNR + 1) times
    the error of x0.
    """
    x0 = draw(6, 2)
    eps = draw(6, 2, seed=1)
    raw = draw(6, 2, seed=2)
    t = jnp.linspace(0.2, 0.9, 6)
    net = Denoiser(param=VPVelocity(), native=process).wrap(
        lambda x, t, cond: raw, process
    )
    pred = net(process.add_noise(x0, eps, t), t)
    a, s = process.alpha_sigma(t[:, None])
    got = denoising_error(process, pred, x0, eps, t, "vp")
    np.testing.assert_allclose(
        got, jnp.mean((raw - (a * eps - s * x0)) ** 2, 1), rtol=1e-9
    )
    snr = (a / s)[:, 0] ** 2
    np.testing.assert_allclose(
        got, (snr + 1) * denoising_error(process, pred, x0, eps, t, "x0"), rtol=1e-9
    )


@every
def test_at_zero_the_targets_are_sample_and_noise(x64, process):
    xs = draw(5, 2)
    eps = draw(5, 2, seed=1)
    t = jnp.linspace(0.1, 0.9, 5)
    x0, noise, sigma = interval_targets(process, xs, eps, 0.0, t)
    np.testing.assert_array_equal(x0, xs)
    np.testing.assert_allclose(noise, eps, rtol=1e-14)
    np.testing.assert_allclose(sigma[:, 0], process.alpha_sigma(t)[1], rtol=1e-14)
    if process == Flow():
        np.testing.assert_array_equal(sigma[:, 0], t)


@every
def test_the_two_targets_are_of_one_state(x64, process):
    """alpha_t x0 + sigma_t eps = x_t for every x_s and eps; on rectified flow x_t - t u is the x0
    target.
    """
    xs = draw(6, 2)
    eps = draw(6, 2, seed=1)
    s = jnp.full(6, 0.3)
    t = jnp.linspace(0.35, 0.95, 6)
    x0, noise, _ = interval_targets(process, xs, eps, s, t)
    xt = process.transition(xs, eps, s, t)
    np.testing.assert_allclose(
        process.add_noise(x0, noise, t), xt, rtol=1e-11, atol=1e-12
    )
    if process == Flow():
        np.testing.assert_allclose(
            xt - t[:, None] * (noise - x0), x0, rtol=1e-11, atol=1e-12
        )


def test_closed_form_of_the_velocity_target(x64):
    """u = [t + (1 - t) s^2 / (1 - s)^2] / sigma_{t|s} eps - x_s / (1 - s)."""
    xs = draw(4, 3)
    eps = draw(4, 3, seed=1)
    s = 0.5
    t = jnp.array([0.6, 0.7, 0.8, 0.9])[:, None]
    x0, noise, sigma = interval_targets(Flow(), xs, eps, s, t[:, 0])
    np.testing.assert_allclose(
        sigma, jnp.sqrt(t**2 - ((1 - t) / (1 - s)) ** 2 * s**2), rtol=1e-12
    )
    np.testing.assert_allclose(
        noise - x0,
        (t + (1 - t) * s**2 / (1 - s) ** 2) / sigma * eps - xs / (1 - s),
        rtol=1e-11,
    )


def test_scaled_target_stays_finite_next_to_s(x64):
    """sigma_{t|s} u -> s / (1 - s) eps for t -> s; at t = s itself the floor keeps everything
    finite.
    """
    xs = draw(4, 2)
    eps = draw(4, 2, seed=1)
    s = 0.5
    for gap in (1e-4, 1e-6):
        x0, noise, sigma = interval_targets(Flow(), xs, eps, s, s + gap)
        np.testing.assert_allclose(
            sigma * (noise - x0), s / (1 - s) * eps, atol=8 * gap**0.5
        )
    process = Flow()
    pred = Flow().from_x0(xs, xs, jnp.full(4, s))
    error = interval_error(process, pred, xs, eps, s, jnp.full(4, s))
    assert np.all(np.isfinite(error)) and np.all(
        error < 10 * 2 * np.max((s / (1 - s) * np.abs(eps) + 1e-3) ** 2)
    )


def test_marginal_of_the_re_noised_state(x64):
    """Variance (1 - t)^2 Var(x_0) + t^2, to the sampling error of a variance."""
    rng = np.random.default_rng(0)
    n = 400_000
    s = 0.5
    t = 0.8
    xs = (1 - s) * rng.choice(POINTS, n) + s * rng.standard_normal(n)
    xt = Flow().transition(
        jnp.asarray(xs),
        jnp.asarray(rng.standard_normal(n)),
        jnp.asarray(s),
        jnp.asarray(t),
    )
    want = (1 - t) ** 2 * POINTS.var() + t**2
    np.testing.assert_allclose(np.var(xt), want, rtol=5 * (2 / n) ** 0.5)
    np.testing.assert_allclose(
        np.mean(xt), (1 - t) * POINTS.mean(), atol=5 * (want / n) ** 0.5
    )


@pytest.mark.parametrize("clamp", [10.0, np.inf])
def test_weight_of_the_error(x64, clamp):
    """min(1 / sigma_{t|s}^2, 10) |sigma_{t|s} (v - u)|^2, mean over dimensions; an infinite clamp
    is the plain error.
    """
    xs = draw(6, 3)
    eps = draw(6, 3, seed=1)
    s = 0.5
    t = jnp.linspace(0.505, 0.95, 6)
    xt = Flow().transition(xs, eps, jnp.asarray(s), t)
    pred = Flow().from_v(draw(6, 3, seed=2), xt, t)
    x0, noise, sigma = interval_targets(Flow(), xs, eps, s, t)
    scaled = np.mean((sigma * pred.v - sigma * (noise - x0)) ** 2, 1)
    got = interval_error(Flow(), pred, xs, eps, s, t, "flow", clamp)
    np.testing.assert_allclose(
        got, np.clip(1 / sigma[:, 0] ** 2, 0, clamp) * scaled, rtol=1e-10
    )
    assert np.any(1 / sigma[:, 0] ** 2 > 10) and np.any(1 / sigma[:, 0] ** 2 < 10)


def test_flow_target_does_not_depend_on_the_process_s_time(x64):
    """eps - x0 under a shift is what "v" is without one; without a shift they are the same."""
    x0 = draw(4, 2)
    eps = draw(4, 2, seed=1)
    raw = draw(4, 2, seed=2)
    t = jnp.array([0.2, 0.4, 0.6, 0.8])
    shifted = Flow(shift=5.0)
    warped = shifted.alpha_sigma(t)[1]
    plain = Flow().from_v(raw, Flow().add_noise(x0, eps, warped), warped)
    other = shifted.from_x0(plain.x0, shifted.add_noise(x0, eps, t), t)
    want = denoising_error(Flow(), plain, x0, eps, warped, "v")
    np.testing.assert_allclose(
        denoising_error(Flow(), plain, x0, eps, warped, "flow"), want, rtol=1e-10
    )
    np.testing.assert_allclose(
        denoising_error(shifted, other, x0, eps, t, "flow"), want, rtol=1e-10
    )
    with pytest.raises(Refused, match="expected one of v, flow"):
        denoising_error(Flow(), plain, x0, eps, warped, "score")


@pytest.mark.slow
def test_a_network_trained_within_the_interval_follows_the_exact_flow():
    """Four points, trained from x_.5 alone; Euler from 1 to .5. The biased target eps - x_s ends at
    least 5 times further off.
    """
    s = 0.5
    n = 1024
    steps = 3000
    net = make_net(
        MLP(dim=1, width=64, depth=2),
        wrap=functools.partial(Denoiser().wrap, process=Flow()),
    )
    process = Flow()
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def error(biased, params, key):
        keys = jax.random.split(key, 4)
        x0 = jnp.asarray(POINTS, jnp.float32)[
            jax.random.randint(keys[0], (n, 1), 0, 4)
        ]
        xs = process.add_noise(
            x0, jax.random.normal(keys[1], x0.shape), jnp.asarray(s)
        )
        t = jax.random.uniform(keys[2], (n,), minval=s + 1e-3)
        eps = jax.random.normal(keys[3], x0.shape)
        pred = net.apply(params, process.transition(xs, eps, jnp.asarray(s), t), t)
        return jnp.mean(
            (pred.v - (eps - xs)) ** 2
            if biased
            else interval_error(process, pred, xs, eps, s, t)
        )

    @functools.partial(jax.jit, static_argnums=0)
    def train(biased, params):
        def body(carry, key):
            grads = jax.grad(functools.partial(error, biased))(carry[0], key)
            updates, opt = tx.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), opt), None

        return jax.lax.scan(
            body,
            (params, tx.init(params)),
            jax.random.split(jax.random.key(1), steps),
        )[0][0]

    noise = jax.random.normal(jax.random.key(2), (2000, 1))
    times = jnp.linspace(1.0, s, 51)
    path = jax.jit(
        lambda params: ode.sample(
            ode.euler, lambda x, t: net.apply(params, x, t), noise, times
        )
    )
    want = np.asarray(noise, np.float64)[:, 0]
    for t, r in zip(np.linspace(1.0, s, 51)[:-1], np.linspace(1.0, s, 51)[1:]):
        want = want + (r - t) * (want - exact_x0(want, t)) / t
    rmse = [
        np.sqrt(
            np.mean(
                (path(train(biased, net.init(jax.random.key(0))))[:, 0] - want) ** 2
            )
        )
        for biased in (True, False)
    ]
    assert rmse[0] > 5 * rmse[1], rmse
