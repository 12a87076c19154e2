"""MeanFlow: the identity in closed form, the target's algebra, guidance, sampling (00-foundations,
section 7).
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net, paths
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.diffusion.process import Flow, Trig, expand
from jaxdistill.diffusion.tangent import central_difference, total_derivative
from jaxdistill.diffusion.times import LogitNormal, Uniform
from jaxdistill.methods.trajectory.meanflow import (
    GuidedMeanFlow,
    MeanFlow,
    MeanFlowDistillation,
)
from jaxdistill.models.denoisers.dit import DiT

PROCESSES = [Flow(), Flow(shift=3.0), Trig()]


def times(n=6):
    t = jnp.linspace(0.3, 0.95, n)
    return t, t * jnp.linspace(0.0, 0.9, n)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_closed_form_satisfies_the_identity(x64, gaussian, process):
    g, (t, r) = gaussian(process), times()
    x = g.draw(6)
    v = g.denoise(x, t).v
    u, du = total_derivative(
        lambda x, t, r: g.average(x, t, r=r).v,
        (x, t, r),
        (v, jnp.ones(6), jnp.zeros(6)),
    )
    np.testing.assert_allclose(u, v - expand(t - r, x) * du, atol=1e-14)
    np.testing.assert_array_equal(g.average(x, t, r=t).v, v)


def test_displacements_add_up(x64, gaussian):
    g, (t, s) = gaussian(), times()
    r = s + 0.5 * (t - s)
    x = g.draw(6)
    leap = lambda x, t, r: expand(t - r, x) * g.average(x, t, r=r).v
    np.testing.assert_allclose(
        leap(x, t, s), leap(x, t, r) + leap(x - leap(x, t, r), r, s), atol=1e-14
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_sampling_the_closed_form_is_the_exact_flow(x64, gaussian, process, steps):
    g = gaussian(process)
    method = MeanFlow(process=process)
    noise = g.draw(5)
    x = method.sample(g.average, noise, None, jax.random.key(0), steps)
    full = lambda time: jnp.full(5, time)
    np.testing.assert_allclose(
        x,
        g.flow(process.start(noise), full(process.t_max), full(process.t_min)),
        atol=1e-13,
    )


def test_the_exact_student_has_no_error_under_the_exact_teacher(
    x64, gaussian, context
):
    g = gaussian()
    method = MeanFlowDistillation(times=Uniform(), flow_share=0.25)
    out = method.loss(
        SimpleNamespace(student=g.average, teacher=g.denoise), context(g.draw(32))
    )
    assert out.metrics["error"] < 1e-24
    wrong = lambda x, t, cond=None, *, r: dataclasses.replace(
        g.average(x, t, r=r), v=1.01 * g.average(x, t, r=r).v
    )
    assert (
        method.loss(
            SimpleNamespace(student=wrong, teacher=g.denoise), context(g.draw(32))
        ).metrics["error"]
        > 1e-6
    )


def student(w, x, t, cond=None, *, r):
    """A small differentiable network; w [4]."""
    v = (
        w[0] * x
        + w[1] * expand(t, x) ** 2 * x
        + w[2] * expand(r, x)
        + w[3] * jnp.sin(x)
    )
    return Flow().from_v(v, x, t)


W = np.array([0.3, -0.7, 0.2, 0.5])


def test_gradient_is_that_of_a_weighted_regression_on_the_target(
    x64, gaussian, context
):
    """The target and the weight are constants: grad = 2 sum_i weight_i (u_i - target_i) . du_i / dw
    / n.
    """
    g = gaussian()
    method = MeanFlow(
        weight_c=0.05, weight_power=0.7, flow_share=0.5, times=Uniform()
    )
    ctx = context(g.draw(8))
    n = 8
    t, r = method.interval(ctx, n)
    x0 = ctx.batch["x"]
    eps = jax.random.normal(ctx.key("eps"), (8, 2))
    xt = (1 - t)[:, None] * x0 + t[:, None] * eps
    v = eps - x0
    u = lambda w: student(w, xt, t, r=r).v
    slope = lambda h: student(W, xt + h * v, t + h, r=r).v
    du = (slope(1e-6) - slope(-1e-6)) / 2e-6
    residual = u(W) - (v - (t - r)[:, None] * du)
    error = jnp.sum(residual**2, 1)
    jacobian = jax.jacobian(u)(jnp.asarray(W))
    want = (
        2
        * jnp.einsum("n,nd,ndw->w", 1 / (error + 0.05) ** 0.7, residual, jacobian)
        / n
    )
    loss = lambda w: (
        method.loss(
            SimpleNamespace(student=jax.tree_util.Partial(student, w)), ctx
        ).loss
    )
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(W)), want, rtol=1e-8)
    central = dataclasses.replace(method, derivative="central")
    loss = lambda w: (
        central.loss(
            SimpleNamespace(student=jax.tree_util.Partial(student, w)), ctx
        ).loss
    )
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(W)), want, rtol=1e-8)


def test_with_r_at_t_it_is_flow_matching(x64, gaussian, context):
    g = gaussian()
    method = MeanFlow(flow_share=1.0, weight_power=0.0)
    ctx = context(g.draw(16))
    t, r = method.interval(ctx, 16)
    np.testing.assert_array_equal(t, r)
    x0 = ctx.batch["x"]
    eps = jax.random.normal(ctx.key("eps"), (16, 2))
    pred = student(W, (1 - t)[:, None] * x0 + t[:, None] * eps, t, r=t)
    loss = method.loss(
        SimpleNamespace(student=jax.tree_util.Partial(student, W)), ctx
    ).loss
    np.testing.assert_allclose(
        loss, jnp.mean(jnp.sum((pred.v - (eps - x0)) ** 2, 1)), rtol=1e-13
    )


def test_intervals(context):
    method = MeanFlow(flow_share=0.75)
    ctx = context(jnp.zeros((4096, 2)))
    t, r = (np.asarray(a) for a in method.interval(ctx, 4096))
    assert (t[:3072] == r[:3072]).all() and (r[3072:] < t[3072:]).all()
    a, b = (
        LogitNormal(mean=-0.4, std=1.0).draw(Flow(), ctx.key(k), 4096) for k in "tr"
    )
    np.testing.assert_array_equal(t, np.maximum(a, b))
    np.testing.assert_array_equal(r[3072:], np.minimum(a, b)[3072:])


def labelled(w, x, t, cond, *, r):
    return Flow().from_v((w + cond[:, None]) * x, x, t)


def test_guided_velocity(x64, gaussian, context):
    """Inside the interval and with the label kept: omega v + (1 - omega - kappa) u_null + kappa
    u_cond, else v.
    """
    method = GuidedMeanFlow(
        omega=0.2, kappa=0.7, guidance_times=(0.2, 0.6), label_dropout=0.5
    )
    x = gaussian().draw(64)
    t = jnp.linspace(0, 1, 64)
    v = jnp.ones((64, 2))
    ctx = context(x, cond=jnp.full(64, 3), null_cond=jnp.full(64, 9))
    net = SimpleNamespace(student=jax.tree_util.Partial(labelled, 0.5))
    got, cond = method.velocity(net, ctx, x, t, v)
    kept = np.asarray(cond) == 3
    inside = (t >= 0.2) & (t <= 0.6)
    assert 10 < kept.sum() < 54
    np.testing.assert_array_equal(cond, np.where(kept, 3, 9))
    mixed = 0.2 * v + 0.1 * 9.5 * x + 0.7 * 3.5 * x
    np.testing.assert_allclose(
        got, np.where((kept & inside)[:, None], mixed, v), rtol=1e-13
    )
    grad = jax.grad(
        lambda w: method.velocity(
            SimpleNamespace(student=jax.tree_util.Partial(labelled, w)),
            ctx,
            x,
            t,
            v,
        )[0].sum()
    )
    assert grad(0.5) == 0.0


@pytest.mark.full
def test_dropped_labels_fall_on_the_first_rows(x64, context):
    """As in the released code: of n rows the first k lose their label, k the number of n draws
    below the share; there r = t.
    """
    n = 64
    method = GuidedMeanFlow(label_dropout=0.3, flow_share=0.75)
    net = SimpleNamespace(student=jax.tree_util.Partial(labelled, 0.5))
    counts = []
    for seed in range(40):
        ctx = context(
            jnp.ones((n, 2)),
            seed=seed,
            cond=jnp.full(n, 3),
            null_cond=jnp.full(n, 9),
        )
        t, r = method.interval(ctx, n)
        v, cond = method.velocity(net, ctx, ctx.batch["x"], t, jnp.zeros((n, 2)))
        k = int((cond == 9).sum())
        np.testing.assert_array_equal(cond, np.where(np.arange(n) < k, 9, 3))
        assert k <= 48 and (t == r)[:k].all()
        assert (v[:k] == 0).all() and (
            v[k:] != 0
        ).all()  # without guidance where the label is dropped
        counts.append(k)
    assert (
        abs(np.mean(counts) - 0.3 * n) < 5 * (0.21 * n / 40) ** 0.5
        and len(set(counts)) > 5
    )


def test_guidance_of_scale_one_is_the_plain_method(gaussian, context):
    """omega 1, kappa 0 and no dropout: the same draws, the same loss."""
    ctx = context(
        jnp.asarray(gaussian().draw(16), jnp.float32),
        cond=jnp.arange(16) % 3,
        null_cond=jnp.full(16, 3),
    )
    net = SimpleNamespace(student=jax.tree_util.Partial(labelled, 0.5))
    plain = MeanFlow().loss(net, ctx).loss
    np.testing.assert_allclose(
        GuidedMeanFlow(omega=1.0, kappa=0.0, label_dropout=0.0).loss(net, ctx).loss,
        plain,
        rtol=1e-6,
    )


def test_distillation_guides_the_teacher(x64, gaussian, context):
    x = gaussian().draw(8)
    t = jnp.linspace(0.1, 0.9, 8)
    ctx = context(x, cond=jnp.full(8, 3), null_cond=jnp.full(8, 9))
    teacher = lambda x, t, cond: labelled(0.0, x, t, cond, r=None)
    v, cond = MeanFlowDistillation(guidance=2.5).velocity(
        SimpleNamespace(teacher=teacher), ctx, x, t, None
    )
    np.testing.assert_allclose(v, (9 + 2.5 * (3 - 9)) * x, rtol=1e-13)
    np.testing.assert_array_equal(cond, 3)


def test_central_difference_of_a_network_agrees_with_its_jvp(x64, gaussian):
    x, (t, r) = gaussian().draw(6), times()
    fn = lambda x, t, r: student(W, x, t, r=r).v
    args = (fn, (x, t, r), (2 * x, jnp.ones(6), jnp.zeros(6)))
    np.testing.assert_allclose(
        central_difference(*args)[1], total_derivative(*args)[1], rtol=1e-5
    )


def test_unknown_derivative_is_refused(gaussian, context):
    with pytest.raises(Refused, match="did you mean 'central'"):
        MeanFlow(derivative="centre").loss(
            SimpleNamespace(student=gaussian().average), context(jnp.zeros((4, 2)))
        )


@pytest.mark.parametrize(
    "method", [MeanFlow(), MeanFlowDistillation()], ids=lambda m: type(m).__name__
)
def test_three_steps(three_steps, method):
    three_steps(method, second_time=True)


def test_exported_student_takes_one_time_and_gives_the_same_samples():
    """The gap's embedding, a constant at one step, moves into the label table; more steps are
    refused.
    """
    cfg = DiT(size=4, dim=16, depth=1, heads=2, second_time=True)
    net = make_net(
        cfg,
        wrap=functools.partial(
            Denoiser(param=Velocity(time_scale=1000.0)).wrap, process=Flow()
        ),
        config=cfg,
    )
    rng = np.random.default_rng(0)
    draw = lambda w: w + np.float32(0.05 * rng.standard_normal(w.shape))
    params = jax.tree.map(draw, jax.jit(net.init)(jax.random.key(0)))
    method = MeanFlow()
    noise = np.float32(rng.standard_normal((3, 4, 4, 1)))
    cond = jnp.array([0, 5, 10])
    sample = lambda params: method.sample(
        functools.partial(net.apply, params), noise, cond, None, 1
    )
    ours = jax.jit(sample)(params)
    folded, weights = method.exported(net, params)
    assert (
        not folded.config.second_time
        and paths(weights).keys() == paths(folded.shapes).keys()
    )
    one_step = jax.jit(
        lambda weights: noise - folded.apply(weights, noise, jnp.ones(3), cond).v
    )
    np.testing.assert_allclose(one_step(weights), ours, atol=1e-5)
    plain = {k: v for k, v in params.items() if k != "gap_embed"}
    assert np.abs(one_step(plain) - ours).max() > 1e-3  # the gap does matter
    assert method.sampling_times(1) == 1
    with pytest.raises(Refused, match="one step"):
        method.sampling_times(2)
