"""iCT and ECT: the laws of their times, their weight, and ECT's first stage (00-foundations,
section 6).
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import EDM, Flow, Trig, expand
from jaxdistill.methods.trajectory.consistency_training import ECT, ICT
from jaxdistill.objectives.consistency import ict_levels, noise_levels, pseudo_huber

W = np.array([0.3, -0.7, 0.2])


def network(w):
    raw = lambda x, t, cond=None: (
        w[0] * x + w[1] * expand(t, x) ** 2 * x + w[2] * jnp.sin(2 * x)
    )
    return Denoiser().wrap(raw, Flow())


@pytest.mark.parametrize("process", [Flow(), Trig(), EDM()], ids=str)
def test_intervals_hold_their_lognormal_mass(x64, context, process):
    """Counts of 40 000 draws against the normal law of log(sigma / alpha), to 5 standard
    deviations.
    """
    n = 40_000
    method = ICT(
        process=process,
        s0=6,
        s1=24,
        total=30,
        rho=7.0 if isinstance(process, EDM) else 1.0,
    )
    step = 12  # of the second of three shares: 12 intervals
    t, r = method.pair(context(jnp.zeros((n, 1)), step), n)
    levels = noise_levels(13, 13, process.t_min, process.t_max, method.rho)
    assert ict_levels(step, 30, 6, 24) == 13
    index = np.argmin(np.abs(np.asarray(t)[:, None] - levels[1:]), 1)
    np.testing.assert_allclose(levels[index], r, atol=1e-12)
    cdf = [
        0.5 * (1 + math.erf((-float(lam) + 1.1) / (2.0 * math.sqrt(2))))
        for lam in process.lam(levels)
    ]
    want = n * np.diff(cdf) / (cdf[-1] - cdf[0])
    assert (
        abs(np.bincount(index, minlength=12) - want) < 5 * np.sqrt(want) + 1
    ).all()


@pytest.mark.parametrize(
    "method",
    [ICT(s0=4, s1=8, total=10), ECT(stage_steps=1)],
    ids=lambda m: type(m).__name__,
)
def test_the_target_is_the_student_itself(x64, gaussian, context, method):
    """L = mean 1 / (t - r) d(f(x_t, t), sg f(x_r, r)) with the same noise; x0 where r = 0."""
    g = gaussian()
    ctx = context(gaussian().draw(32), step=5)
    (t, r), eps, x0 = (
        method.pair(ctx, 32),
        jax.random.normal(ctx.key("eps"), (32, 2)),
        ctx.batch["x"],
    )
    along = lambda time: (1 - time)[:, None] * x0 + time[:, None] * eps
    target = jnp.where((r <= 0)[:, None], x0, network(W)(along(r), r).x0)
    want = lambda w: jnp.mean(
        pseudo_huber(
            network(w)(along(t), t).x0, target, method.huber * math.sqrt(2)
        )
        / (t - r)
    )
    loss = lambda w: (
        method.loss(
            SimpleNamespace(student=network(w), ema_student=g.denoise), ctx
        ).loss
    )
    np.testing.assert_allclose(loss(W), want(W), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(loss)(W), jax.grad(want)(W), rtol=1e-11)


def test_tuning_starts_as_diffusion_training(x64, gaussian, context):
    """At the first stage r = 0 for every t, since n(t) >= 2 = q; then r grows towards t."""
    method = ECT(stage_steps=10)
    x = gaussian().draw(64)
    t, r = method.pair(context(x, step=9), 64)
    np.testing.assert_array_equal(r, 0.0)
    ctx = context(x, step=9)
    xt = Flow().add_noise(x, jax.random.normal(ctx.key("eps"), (64, 2)), t)
    want = jnp.mean(
        pseudo_huber(network(W)(xt, t).x0, x, method.huber * math.sqrt(2)) / t
    )
    np.testing.assert_allclose(
        method.loss(SimpleNamespace(student=network(W)), ctx).loss, want, rtol=1e-13
    )
    gaps = []
    for stage in range(3, 9):
        t, r = method.pair(context(x, step=10 * stage), 64)
        assert (r < t).all()
        gaps.append(jnp.mean((t - r) / t))
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 2.0, rtol=1e-12)


def test_tuning_on_edm_is_finite_at_the_data(context):
    """r = 0 lies below EDM's times; log(0) must not reach the network."""
    from jaxdistill.diffusion.denoiser import EDMPrecond

    net = Denoiser(param=EDMPrecond(), native=EDM()).wrap(
        lambda x, t, cond=None: x * jnp.sin(t)[:, None], EDM()
    )
    out = ECT(process=EDM()).loss(
        SimpleNamespace(student=net), context(jnp.ones((16, 2)))
    )
    assert np.isfinite(out.loss)


def test_below_edms_times_tuning_asks_the_network(x64, gaussian, context):
    """The target is data at r = 0, and f(x_r, r) at 0 < r <= t_min, as in the released code."""

    class Pairs(ECT):
        def pair(self, ctx, n):
            return jnp.full(n, 0.5), jnp.asarray([0.0, 1e-4, 0.002, 0.1])

    seen = []

    def student(x, t, cond=None):
        seen.append(t)
        return EDM().from_x0(0.9 * x + jnp.sin(t)[:, None], x, t)

    ctx = context(gaussian().draw(4))
    r = jnp.asarray([0.0, 1e-4, 0.002, 0.1])
    loss = (
        Pairs(process=EDM(), huber=0.0)
        .loss(SimpleNamespace(student=student), ctx)
        .loss
    )
    x0 = ctx.batch["x"]
    eps = jax.random.normal(ctx.key("eps"), (4, 2))
    f = lambda t: 0.9 * (x0 + t[:, None] * eps) + jnp.sin(t)[:, None]
    held = jnp.where((r > 0)[:, None], f(r), x0)
    want = jnp.mean(
        jnp.sqrt(jnp.sum((f(jnp.full(4, 0.5)) - held) ** 2, 1)) / (0.5 - r)
    )
    np.testing.assert_allclose(loss, want, rtol=1e-12)
    np.testing.assert_array_equal(seen[0], [0.002, 1e-4, 0.002, 0.1])


@pytest.mark.parametrize(
    "method",
    [ICT(total=100, s0=2, s1=8), ECT(stage_steps=1)],
    ids=lambda m: type(m).__name__,
)
def test_three_steps(three_steps, method):
    three_steps(method)
