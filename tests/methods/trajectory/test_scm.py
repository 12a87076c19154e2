"""sCM: zero tangent at the solution, both ends of the warm-up, gradients by finite differences
(00-foundations, section 6).
"""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import Denoiser, TrigPrecond
from jaxdistill.diffusion.process import Flow, Trig, expand
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.trajectory.consistency import Consistency
from jaxdistill.methods.trajectory.scm import SCM, SCT

WARM = 10  # at this step the tangent has its full weight
BIG = 1e9  # a tangent_c that leaves the tangent as it is, divided by BIG, to 1e-9
W = np.array([0.3, -0.7, 0.2])


def flat(t):
    return jnp.zeros_like(t)


def raw(w, x, t, cond=None):
    """A small velocity network of rectified flow; w [3]."""
    return w[0] * x + w[1] * expand(t, x) ** 2 * x + w[2] * jnp.sin(2 * x)


def bound(w, process=Trig(), weight=flat, **others):
    """The network read in `process` through schedule equivalence."""
    net = Denoiser().wrap(jax.tree_util.Partial(raw, w), process)
    return SimpleNamespace(student=net, weight=weight, ema_student=net, **others)


def unit(method, ctx):
    """t, x_t and the path's velocity, drawn as the loss draws them."""
    x0 = ctx.batch["x"]
    t = method.times.draw(method.process, ctx.key("t"), x0.shape[0])
    eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
    return (
        t,
        method.process.add_noise(x0, eps, t),
        method.process.velocity(x0, eps, t),
    )


@pytest.mark.parametrize("derivative", ["jvp", "central"])
def test_the_exact_consistency_function_has_no_tangent(
    x64, gaussian, context, derivative
):
    """f = m + s / std_t (x - cos t m) is constant along the teacher's ODE: g = 0 at r = 1, and only
    there.
    """
    g = gaussian(Trig())
    method = SCM(tangent_warmup=WARM, derivative=derivative)
    net = SimpleNamespace(student=g.consistent, teacher=g.denoise, weight=flat)
    tangent = lambda step: method.loss(net, context(g.draw(64), step)).metrics[
        "tangent"
    ]
    # the surrogate's value is the mean square of g / (rms + c): (1e-8)^2 from a central
    # difference's eps^(2/3), over c^2
    assert tangent(WARM) < (1e-25 if derivative == "jvp" else 1e-12)
    assert tangent(WARM // 2) > 1e-3


def test_at_the_start_it_is_velocity_regression(x64, gaussian, context):
    """At r = 0 the gradient is that of cos^2 t / (sigma_d^2 tan t) |sigma_d F - dx/dt|^2 / dim."""
    g = gaussian(Trig())
    method = SCM(tangent_c=BIG)
    ctx = context(g.draw(16))
    t, xt, _ = unit(method, ctx)
    v = g.denoise(xt, t).v
    loss = lambda w: BIG * method.loss(bound(w, teacher=g.denoise), ctx).loss
    weight = jnp.cos(t) ** 2 / (0.25 * jnp.tan(t))
    regression = lambda w: jnp.mean(
        weight * jnp.mean((bound(w).student(xt, t).v - v) ** 2, 1)
    )
    np.testing.assert_allclose(
        jax.grad(loss)(W), jax.grad(regression)(W), rtol=1e-7
    )


def test_gradient_by_finite_differences(x64, gaussian, context):
    """grad = -2 prior e^w (g / (rms + c)) . dF/dtheta / dim with g = cos t df/dt, f differenced
    along the teacher's ODE.
    """
    g = gaussian(Trig())
    method = SCM(tangent_warmup=WARM, tangent_c=0.3)
    h = 1e-5
    ctx = context(g.draw(16), WARM)
    t, xt, _ = unit(method, ctx)
    v = g.denoise(xt, t).v
    net = bound(W).student
    log_weight = 0.2 * jnp.sin(t)
    f = lambda step: net(xt + step * v, t + step).x0
    tangent = jnp.cos(t)[:, None] * (f(h) - f(-h)) / (2 * h)
    tangent /= jnp.sqrt(jnp.mean(tangent**2, 1, keepdims=True)) + 0.3
    jacobian = jax.jacobian(lambda w: bound(w).student(xt, t).v / 0.5)(W)
    scale = jnp.exp(log_weight) / (0.5 * jnp.tan(t))
    want = -2 * jnp.einsum("n,nd,ndw->w", scale, tangent, jacobian) / (16 * 2)
    loss = lambda w: (
        method.loss(
            bound(w, teacher=g.denoise, weight=lambda t: 0.2 * jnp.sin(t)), ctx
        ).loss
    )
    np.testing.assert_allclose(jax.grad(loss)(W), want, rtol=1e-6)


def test_discrete_consistency_tends_to_it(x64, gaussian, context):
    """||f(x_t) - sg f(x_r)||^2 / (t - r) -> the unnormalised sCM gradient times dim tan t sigma_d
    sin t / cos t, at one t.
    """
    g = gaussian(Trig())
    time = 0.8
    gap = 1e-6

    class Close(Consistency):
        def pair(self, ctx, n):
            return jnp.full(n, time), jnp.full(n, time - gap)

    law = Uniform(low=time / (math.pi / 2), high=time / (math.pi / 2))
    ctx = context(g.draw(16), WARM)
    c = 1e5
    # |.|^2 = 2 c x pseudo-Huber, to |.|^2 / c^2
    discrete = Close(process=Trig(), solver="euler", huber=c / math.sqrt(2))
    held = bound(W).student
    loss = lambda w: (
        2
        * c
        / gap
        * discrete.loss(
            SimpleNamespace(
                student=bound(w).student, ema_student=held, teacher=g.denoise
            ),
            ctx,
        ).loss
    )
    continuous = SCM(times=law, tangent_warmup=WARM, tangent_c=BIG)
    other = lambda w: BIG * continuous.loss(bound(w, teacher=g.denoise), ctx).loss
    factor = 2 * 0.5 * math.sin(time) / math.cos(time) * 0.5 * math.tan(time)
    np.testing.assert_allclose(
        jax.grad(loss)(W), factor * jax.grad(other)(W), rtol=1e-4
    )


def test_any_parameterisation_is_the_same_network(x64, gaussian, context):
    """A flow network and its trigonometric form (SANA-Sprint's transform) have the same loss."""
    g = gaussian(Trig())
    method = SCM(tangent_warmup=WARM)
    sd = 0.5

    def rewritten(x, t, cond=None):
        time = (sd * jnp.sin(t) / (jnp.cos(t) + sd * jnp.sin(t)))[:, None]
        x = x * sd  # the parameterisation divides by sigma_d
        xf = x / (jnp.cos(t)[:, None] + sd * jnp.sin(t)[:, None])
        v = raw(W, xf, time[:, 0])
        x0 = xf - time * v
        eps = xf + (1 - time) * v
        return (-jnp.sin(t)[:, None] * x0 + sd * jnp.cos(t)[:, None] * eps) / sd

    trig = Denoiser(param=TrigPrecond(), native=Trig()).wrap(rewritten, Trig())
    ctx = context(g.draw(16), WARM)
    a = method.loss(bound(W, teacher=g.denoise), ctx)
    b = method.loss(
        SimpleNamespace(student=trig, weight=flat, teacher=g.denoise), ctx
    )
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-12)


def test_training_and_distillation_agree_where_the_path_is_the_teacher(
    x64, gaussian, context
):
    """Data at one point: the path's own velocity is the marginal one, so sCT equals sCD."""
    g = gaussian(Trig(), mean=0.7, std=0.0)
    ctx = context(g.draw(8), WARM)
    own = SCT(tangent_warmup=WARM).loss(bound(W), ctx).loss
    np.testing.assert_allclose(
        own,
        SCM(tangent_warmup=WARM).loss(bound(W, teacher=g.denoise), ctx).loss,
        rtol=1e-10,
    )


def test_adaptive_weight_is_best_at_the_log_error(x64, gaussian, context):
    """e^w E - w is least at w = -log E, E the prior-weighted error: zero gradient in w there."""
    g = gaussian(Trig())
    method = SCM(tangent_warmup=WARM)
    ctx = context(g.draw(16), WARM)
    loss = lambda w: (
        method.loss(
            bound(W, teacher=g.denoise, weight=lambda t: jnp.full_like(t, w)), ctx
        ).loss
    )
    error = loss(0.0)
    np.testing.assert_allclose(jax.grad(loss)(-jnp.log(error)), 0.0, atol=1e-14)
    np.testing.assert_allclose(
        loss(-jnp.log(error)), 1 + jnp.log(error), rtol=1e-13
    )


def test_guidance_is_the_teachers(x64, gaussian, context):
    teacher = lambda x, t, cond: dataclasses.replace(
        gaussian(Trig()).denoise(x, t), v=cond[:, None] * x
    )
    x = gaussian().draw(8)
    t = jnp.linspace(0.1, 1.5, 8)
    ctx = context(x, cond=jnp.full(8, 3.0), null_cond=jnp.full(8, 9.0))
    v = SCM(guidance=2.5).velocity(
        SimpleNamespace(teacher=teacher), ctx, x, t, None
    )
    np.testing.assert_allclose(v, (9 + 2.5 * (3 - 9)) * x, rtol=1e-13)


@pytest.mark.parametrize("steps", [1, 2])
def test_sampling_the_exact_function(gaussian, steps):
    """One step is the exact flow; more keep the law of the data: moments of 40 000 samples to 5
    standard errors.
    """
    g = gaussian(Trig())
    method = SCM()
    n = 20_000
    noise = jax.random.normal(jax.random.key(1), (n, 2))
    x = method.sample(g.consistent, noise, None, jax.random.key(2), steps)
    if steps == 1:
        np.testing.assert_allclose(x, 0.7 + 0.4 * noise, atol=1e-5)
    assert abs(x.mean() - 0.7) < 5 * 0.4 / math.sqrt(2 * n)
    assert abs(x.std() - 0.4) < 5 * 0.4 / math.sqrt(4 * n)


def test_refusals():
    with pytest.raises(Refused, match="tangent_warmup=0"):
        SCM(tangent_warmup=0)
    with pytest.raises(Refused, match="steps=3: expected 1 to 2"):
        SCM().sampling_times(3)


@pytest.mark.parametrize("method", [SCM(), SCT()], ids=lambda m: type(m).__name__)
def test_three_steps(three_steps, method):
    three_steps(method)


def test_flow_times_of_the_student(gaussian):
    """What the flow network is asked for at the ends of the trigonometric process."""
    seen = []

    def spy(x, t, cond=None):
        seen.append((x, t))
        return x

    net = Denoiser(native=Flow()).wrap(spy, Trig())
    x = jnp.ones((2, 2))
    net(x, jnp.array([0.0, math.pi / 2]))
    np.testing.assert_allclose(seen[0][1], [0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(seen[0][0], [[1.0, 1.0], [2.0, 2.0]], rtol=1e-6)
