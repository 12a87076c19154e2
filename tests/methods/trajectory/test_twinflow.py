"""TwinFlow: the push is the scores' difference, who sees which times, and the host without them
(arXiv:2512.05150).
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.build import build
from jaxdistill.core.net import make_net
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import Flow, expand
from jaxdistill.methods.trajectory.rcgm import RCGM
from jaxdistill.methods.trajectory.twinflow import (
    FullTwinFlow,
    ImageFreeTwinFlow,
    TunedTwinFlow,
    TwinFlow,
    TwinFlowDistillation,
)
from jaxdistill.models.denoisers.mlp import MLP
from launch._command import load_config, override
from tools.first_steps import first_steps

PLAIN = dict(barron_alpha=2.0, barron_c=1.0)
W = np.array([0.3, -0.7, 0.2, 0.5])


def student(w, x, t, cond=None, *, r):
    """A small network that tells t from -t; w [4]."""
    first = w[0] + (0.0 if cond is None else expand(cond, x))
    v = (
        first * x
        + w[1] * expand(t, x) * x
        + w[2] * expand(r, x)
        + w[3] * jnp.sin(x)
    )
    return Flow().from_v(v, x, jnp.abs(t))


def nets(w=W, **more):
    call = jax.tree_util.Partial(student, w)
    return SimpleNamespace(student=call, ema_student=call, **more)


def test_difference_of_scores_is_that_of_velocities(x64, gaussian):
    """s = -(x + (1 - t) v) / t, so s_fake - s_real = (1 - t) / t (v_real - v_fake)."""
    real = gaussian(Flow(), 0.7, 0.4)
    fake = gaussian(Flow(), -0.2, 0.6)
    t = jnp.linspace(0.1, 0.9, 8)
    x = real.draw(8)
    a = real.denoise(x, t)
    b = fake.denoise(x, t)
    np.testing.assert_allclose(
        Flow().score(a, t), -(x + (1 - t)[:, None] * a.v) / t[:, None], rtol=1e-12
    )
    difference = Flow().score(b, t) - Flow().score(a, t)
    np.testing.assert_allclose(
        difference, ((1 - t) / t)[:, None] * (a.v - b.v), rtol=1e-10, atol=1e-12
    )


def two_branches(real, fake):
    """Exact velocities of two laws, by the sign of t."""

    def call(x, t, cond=None, *, r):
        size = jnp.abs(t)
        v = jnp.where(
            expand(t > 0, x), real.denoise(x, size).v, fake.denoise(x, size).v
        )
        return Flow().from_v(v, x, size)

    return call


def test_push_lowers_the_divergence(x64, gaussian, context):
    """Own samples of mean -.2 under data of mean .7: descending L_rectify, the sample z - F moves
    up.
    """
    real = gaussian(Flow(), 0.7, 0.4)
    fake = gaussian(Flow(), -0.2, 0.4)
    x_f = fake.draw(64)
    net = SimpleNamespace(student=two_branches(real, fake))
    dv = TwinFlow().push(net, x_f, None, context(x_f))
    F = jnp.zeros_like(x_f)
    grad = jax.grad(lambda F: jnp.mean(TwinFlow(**PLAIN).rectify(F, dv)))(F)
    assert jnp.all(grad > 0)  # F falls, z - F rises


def test_gradient_of_the_push(x64):
    """-2 dv / dim per sample with squared errors, each component of dv within [-1, 1]; 0 where both
    branches agree.
    """
    rng = np.random.default_rng(0)
    F, dv = (jnp.asarray(rng.standard_normal((5, 4)) * s) for s in (1.0, 2.0))
    grad = jax.grad(lambda F: jnp.sum(TwinFlow(**PLAIN).rectify(F, dv)))(F)
    np.testing.assert_allclose(grad, -2 * np.clip(dv, -1, 1) / 4, rtol=1e-12)
    free = jax.grad(lambda F: jnp.sum(FullTwinFlow().rectify(F, dv)))(F)
    np.testing.assert_allclose(free, -2 * dv / 4, rtol=1e-12)
    robust = jax.grad(lambda F: jnp.sum(TwinFlow().rectify(F, dv)))(F)
    # |clipped|^2 >> c^2: the gradient of 2 sqrt(mean square)
    clipped = np.clip(dv, -1, 1)
    rms = np.sqrt(np.mean(clipped**2, 1, keepdims=True))
    # 1e-8 beside c^2 = 1e-6 is half a percent of the root
    np.testing.assert_allclose(robust, -2 * clipped / 4 / rms, rtol=6e-3)


def test_no_push_where_both_branches_agree(x64, gaussian, context):
    g = gaussian()
    net = SimpleNamespace(student=two_branches(g, g))
    np.testing.assert_array_equal(
        TwinFlow().push(net, g.draw(8), None, context(g.draw(8))), 0.0
    )


def test_push_compares_the_same_state_at_both_signs(x64, gaussian, context):
    """F(x', t', t') - F(x', -t', -t') of the small network is 2 t' (w1 x' + w2): the noise and
    times are fresh ones.
    """
    x_f = gaussian().draw(8)
    ctx = context(x_f)
    t = RCGM().times.draw(Flow(), ctx.key("push_t"), 8)[:, None]
    xt = (1 - t) * x_f + t * jax.random.normal(ctx.key("push_eps"), (8, 2))
    np.testing.assert_allclose(
        TwinFlow().push(nets(), x_f, None, ctx),
        2 * t * (W[1] * xt + W[2]),
        rtol=1e-12,
    )


def test_gradients_of_the_whole_loss(x64, gaussian, context):
    """The loss is the weighted regressions on constants: nothing comes through own samples, pushes,
    targets or the average.
    """
    n = 8
    method = TwinFlow(training_guidance=0.0, **PLAIN)
    ctx = context(gaussian().draw(n))
    kind = method.assignment(n)
    t, r = method.interval(ctx, n)
    eps = jax.random.normal(ctx.key("eps"), (n, 2))
    real = np.flatnonzero(kind != "adv")
    adv = np.flatnonzero(kind == "adv")
    e2e = np.flatnonzero(kind == "e2e")
    assert list(adv) == [3, 7] and list(e2e) == [0, 4]
    x = ctx.batch["x"]
    const = nets()
    xt = (1 - t)[:, None] * x + t[:, None] * eps
    F = lambda w, i: student(w, xt[i], t[i], r=r[i]).v
    target = method.consistent(
        const, {}, F(W, real), xt[real], (eps - x)[real], t[real], r[real]
    )
    weight = 1 + np.tan((1 - (t - r)[real]) * np.pi / 2.5)
    z = jax.random.normal(ctx.key("own"), (2, 2))
    x_f = z - student(W, z, jnp.ones(2), r=jnp.zeros(2)).v
    x_adv = (1 - t[adv])[:, None] * x_f + t[adv][:, None] * eps[adv]
    dv = np.clip(method.push(const, eps[e2e] - F(W, e2e), None, ctx), -1, 1)
    mean = lambda a: jnp.mean(a**2, 1)

    def by_hand(w):
        base = weight * mean(F(w, real) - target)
        # -t, r = -t, target z' - x_f, weight 1
        twin = mean(student(w, x_adv, -t[adv], r=-t[adv]).v - (eps[adv] - x_f))
        push = mean(F(w, e2e) - (F(W, e2e) + dv))
        return (base.sum() + twin.sum()) / n + 0.5 * push.mean()

    ours = lambda w: (
        method.loss(
            SimpleNamespace(
                student=jax.tree_util.Partial(student, w),
                ema_student=const.ema_student,
            ),
            ctx,
        ).loss
    )
    np.testing.assert_allclose(ours(W), by_hand(W), rtol=1e-12)
    np.testing.assert_allclose(
        jax.grad(ours)(jnp.asarray(W)), jax.grad(by_hand)(jnp.asarray(W)), rtol=1e-9
    )


def seen_by(method, ctx, **more):
    """Every (t, r, cond, x) that the networks of a loss are called at, by role."""
    calls = {}

    def spy(role):
        def call(x, t, cond=None, *, r=None):
            calls.setdefault(role, []).append((t, r, cond, x))
            return student(W, x, t, cond, r=t if r is None else r)

        return call

    with jax.disable_jit():
        method.loss(
            SimpleNamespace(
                student=spy("student"),
                ema_student=spy("ema"),
                **{k: spy(k) for k in more},
            ),
            ctx,
        )
    return calls


def test_samples_of_the_twin_get_no_recursion_and_no_guidance(gaussian, context):
    ctx = context(
        jnp.asarray(gaussian().draw(8), jnp.float32),
        cond=jnp.arange(8.0),
        null_cond=jnp.full(8, -1.0),
    )
    calls = seen_by(TwinFlow(), ctx)
    assert len(calls["ema"]) == 2 + 2  # guided pair, N = 2
    for t, r, cond, _ in calls["ema"]:
        assert len(t) == 6 and (t >= 0).all() and (r <= t).all()
        assert not np.isin(cond, (3.0, 7.0)).any()
    negative = [(t, r, cond) for t, r, cond, _ in calls["student"] if (t < 0).any()]
    # the twin's own samples, and the push's second branch
    assert len(negative) == 2
    for t, r, _ in negative:
        assert (t < 0).all() and (t == r).all()
    assert [sorted(c.tolist()) for *_, c in negative] == [[3.0, 7.0], [0.0, 4.0]]


@pytest.mark.parametrize("kappa", ["student", "ema_student"])
def test_kappa_zero_recurs_through_the_live_network(gaussian, context, kappa):
    ctx = context(jnp.asarray(gaussian().draw(8), jnp.float32))
    calls = seen_by(TwinFlow(target_network=kappa, training_guidance=0.0), ctx)
    assert ("ema" in calls) == (kappa == "ema_student")


@pytest.mark.full
def test_frozen_base_serves_step_one_only(x64, gaussian, context):
    """kappa = 1: v_u + 4 (v_c - v_u) of the base in place of v, inside the interval; the recursion
    is live.
    """
    ctx = context(
        gaussian().draw(8), cond=jnp.full(8, 3.0), null_cond=jnp.full(8, 1.0)
    )
    calls = seen_by(TwinFlowDistillation(), ctx, teacher=True)
    assert (
        "ema" not in calls
        and len(calls["teacher"]) == 1
        and len(calls["teacher"][0][0]) == 12
    )
    assert all(r is None for _, r, *_ in calls["teacher"])
    x = ctx.batch["x"]
    t = jnp.linspace(0, 1, 8)
    v = jnp.ones((8, 2))
    base = lambda x, t, cond: Flow().from_v(expand(cond, x) * x, x, t)
    got = TwinFlowDistillation().velocity(
        SimpleNamespace(teacher=base), ctx.batch, x, t, v
    )
    np.testing.assert_allclose(got[1:-1], ((1 + 4 * (3 - 1)) * x)[1:-1], rtol=1e-12)
    np.testing.assert_array_equal(got[np.array([0, 7])], 1.0)


def test_image_free_training_does_not_look_at_the_data(gaussian, context):
    net = nets(teacher=lambda x, t, cond: student(W, x, t, r=t))
    loss = lambda method, x: float(method.loss(net, context(x)).loss)
    a = jnp.zeros((8, 2))
    b = jnp.asarray(gaussian().draw(8), jnp.float32)
    assert loss(ImageFreeTwinFlow(), a) == loss(ImageFreeTwinFlow(), b)
    assert loss(TwinFlowDistillation(), a) != loss(TwinFlowDistillation(), b)


def five(method):
    """Losses, weights and averages of five steps of the engine."""
    net = make_net(
        MLP(width=8, depth=1, second_time=True, classes=3),
        wrap=functools.partial(Denoiser().wrap, process=Flow()),
    )
    rng = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(rng.standard_normal((12, 2)), jnp.float32),
        "cond": jnp.arange(12) % 3,
        "null_cond": jnp.full(12, 3),
    }
    states, metrics = first_steps(
        method, {"student": net}, optax.adam(1e-3), {}, batch
    )
    return np.array([row["student/loss"] for row in metrics]), jax.tree.leaves(
        (states[-1].params, states[-1].ema)
    )


def test_without_twin_and_push_it_is_rcgm():
    host = five(RCGM())
    alone = five(TwinFlow(objectives=RCGM().objectives, rectify_weight=0.0))
    np.testing.assert_allclose(alone[0], host[0], rtol=1e-6)
    for a, b in zip(alone[1], host[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(five(TwinFlow())[0] - host[0]).max() > 1e-3


def test_the_tutorials_form(x64, gaussian, context):
    """Squared errors on every sample: recursion, flow, recursion from noise to data, twin, push."""
    n = 4
    method = FullTwinFlow()
    ctx = context(gaussian().draw(n), cond=jnp.arange(4.0))
    net = nets()
    cond = jnp.arange(4.0)
    x = ctx.batch["x"]
    (t, r), eps = method.interval(ctx, n), jax.random.normal(ctx.key("eps"), (n, 2))
    assert (r < t).all() and (t < 1).all()
    null = jax.random.permutation(ctx.key("null"), cond)
    xt = (1 - t)[:, None] * x + t[:, None] * eps
    at = lambda x, t, r, c=cond: student(W, x, t, c, r=r).v
    v = eps - x + 0.5 * (at(xt, t, t) - at(xt, t, t, null))
    F = at(xt, t, r)
    one = at(eps, jnp.ones(n), jnp.zeros(n))
    batch = {"cond": cond}
    mean = lambda a: jnp.mean(a**2)
    want = mean(F - method.consistent(net, batch, F, xt, v, t, r)) + mean(
        at(xt, t, t) - v
    )
    want += mean(
        one - method.consistent(net, batch, one, eps, v, jnp.ones(n), jnp.zeros(n))
    )
    x_f = eps - one
    want += mean(
        at((1 - t)[:, None] * x_f + t[:, None] * eps, -t, -t) - (eps - x_f)
    ) + mean(method.push(net, x_f, cond, ctx))
    np.testing.assert_allclose(method.loss(net, ctx).loss, want, rtol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize(
    "method",
    [
        TwinFlow(),
        FullTwinFlow(),
        TunedTwinFlow(target_network="student"),
        TwinFlowDistillation(),
        ImageFreeTwinFlow(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_three_steps(three_steps, method):
    three_steps(method, second_time=True)


def test_the_guidance_scale_of_the_base_has_its_own_name():
    """A saved config and the command line may use the old one."""
    name = "methods.trajectory.twinflow:TwinFlowDistillation"
    assert build({"name": name, "enhance": 3.0}) == TwinFlowDistillation(
        guidance=3.0
    )
    config = load_config("configs/recipes/twinflow.py:imagefree")
    override(config, "method.enhance", "2")
    assert config.method.guidance == 2.0
