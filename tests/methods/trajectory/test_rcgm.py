"""RCGM: the recursive target in closed form, its limits, guidance, objectives, sampling
(arXiv:2512.05150).
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.build import build
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.process import Flow, Pred, expand
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.methods.trajectory.meanflow import MeanFlow
from jaxdistill.methods.trajectory.rcgm import RCGM
from jaxdistill.samplers.fewstep import jump

PLAIN = dict(barron_alpha=2.0, barron_c=1.0)  # squared error
W = np.array([0.3, -0.7, 0.2, 0.5])


def student(w, x, t, cond=None, *, r):
    """A small network; w [4]. A condition adds to the first weight."""
    first = w[0] + (0.0 if cond is None else expand(cond, x))
    v = (
        first * x
        + w[1] * expand(t, x) ** 2 * x
        + w[2] * expand(r, x)
        + w[3] * jnp.sin(x)
    )
    return Flow().from_v(v, x, t)


def nets(call, **more):
    return SimpleNamespace(student=call, ema_student=call, **more)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_residual_of_the_exact_average_velocity(x64, gaussian, order):
    """Data N(.7, .4^2), x_t = 1.3, t = .8, r = .2, v the marginal velocity: O(Delta), and the same
    for every N.
    """
    g = gaussian()
    x = jnp.full((1, 1), 1.3)
    t = jnp.full(1, 0.8)
    r = jnp.full(1, 0.2)
    F = g.average(x, t, r=r).v
    v = g.denoise(x, t).v
    xi = []
    for delta in (0.01, 0.005, 0.0025):
        method = RCGM(order=order, delta=delta)
        xi.append(
            float((F - method.consistent(nets(g.average), {}, F, x, v, t, r))[0, 0])
        )
    np.testing.assert_allclose(xi, [-0.001068, -0.000527, -0.000262], atol=5e-7)


@pytest.mark.parametrize("order", [1, 2, 3, 7])
def test_rollout_of_a_constant_velocity(x64, order):
    """D = v (t_m - r), so that the residual of any F is ((t - r) F - (t_m - r) v) / Delta - v, and
    of F = v it is 0.
    """
    v = jnp.array([[0.3, -1.1], [0.4, 0.2]])
    method = RCGM(order=order, clip=np.inf)
    x = jnp.ones((2, 2))
    t = jnp.array([0.8, 0.5])
    r = jnp.array([0.1, 0.2])
    net = nets(lambda x, t, cond=None, *, r: Pred(v, v, v, v))
    F = 0.7 * v + 0.1
    middle = (t - 0.01)[:, None]
    xi = ((t - r)[:, None] * F - (middle - r[:, None]) * v) / 0.01 - v
    np.testing.assert_allclose(
        F - method.consistent(net, {}, F, x, v, t, r), xi, rtol=1e-10
    )
    np.testing.assert_allclose(
        method.consistent(net, {}, v, x, v, t, r), v, atol=1e-12
    )


def test_near_the_boundary_it_is_flow_matching(x64, gaussian):
    """r from t to t - Delta, r = t included: the target is v, whatever F^- says; clipped where F is
    farther than 1 from it.
    """
    g = gaussian()
    method = RCGM()
    x = g.draw(4)
    t = jnp.full(4, 0.5)
    F = jnp.zeros((4, 2))
    v = jnp.full((4, 2), 0.3)
    wild = nets(lambda x, t, cond=None, *, r: Pred(x, x, 1e3 * x, x))
    for gap in (0.0, 0.004, 0.0099):
        np.testing.assert_allclose(
            method.consistent(wild, {}, F, x, v, t, t - gap), v, atol=1e-12
        )
    np.testing.assert_array_equal(
        method.consistent(wild, {}, F, x, 7 * v, t, t), 1.0
    )


def test_the_step_follows_the_guided_velocity_all_the_way(x64):
    """x_m = x_t - Delta v with the v that it is given, also where t_m is clamped to r."""
    seen = []

    def spy(x, t, cond=None, *, r):
        seen.append(x)
        return Pred(x, x, 0 * x, x)

    x = jnp.ones((2, 1))
    v = jnp.array([[2.0], [-3.0]])
    t = jnp.array([0.5, 0.5])
    with jax.disable_jit():
        RCGM(order=1).consistent(nets(spy), {}, v, x, v, t, jnp.array([0.1, 0.499]))
    np.testing.assert_allclose(seen[0], x - 0.01 * v)


def test_order_zero_without_consistency_is_flow_matching(x64, gaussian, context):
    """Rows "mul" at ratio 0 have r = t and the constant weight 1 + tan(72 degrees): the same draws,
    the same loss times 4.078.
    """
    method = RCGM(
        order=0, training_guidance=0.0, ratio=0.0, objectives=("mul",), **PLAIN
    )
    ctx = context(gaussian().draw(16))
    call = jax.tree_util.Partial(student, W * np.array([1, 1, 0, 1]))
    flow = FlowMatching(times=Uniform(), label_dropout=0.0)
    plain = flow.loss(
        SimpleNamespace(student=lambda x, t, cond: call(x, t, r=t)), ctx
    ).loss
    np.testing.assert_allclose(
        method.loss(nets(call), ctx).loss, 4.0776835 * plain, rtol=1e-7
    )


def test_gradient_is_that_of_a_weighted_regression_on_the_target(
    x64, gaussian, context
):
    """Nothing comes through the rollout, the target or the live network that makes them."""
    n = 9
    method = RCGM(training_guidance=0.0, target_network="student", **PLAIN)
    ctx = context(gaussian().draw(n))
    t, r = method.interval(ctx, n)
    eps = jax.random.normal(ctx.key("eps"), (n, 2))
    xt = (1 - t)[:, None] * ctx.batch["x"] + t[:, None] * eps
    v = eps - ctx.batch["x"]
    F = lambda w: student(w, xt, t, r=r).v
    target = method.consistent(
        nets(jax.tree_util.Partial(student, W)), {}, F(W), xt, v, t, r
    )
    weight = 1 + np.tan((1 - (t - r)) * np.pi / 2.5)
    want = (
        jnp.einsum(
            "n,nd,ndw->w", weight, F(W) - target, jax.jacobian(F)(jnp.asarray(W))
        )
        / n
    )
    grad = jax.grad(
        lambda w: method.loss(nets(jax.tree_util.Partial(student, w)), ctx).loss
    )(jnp.asarray(W))
    np.testing.assert_allclose(grad, want, rtol=1e-9)


def test_no_gradient_reaches_the_averaged_network(gaussian, context):
    ctx = context(gaussian().draw(8), cond=jnp.arange(8.0), null_cond=jnp.zeros(8))

    def loss(w, held):
        return (
            RCGM()
            .loss(
                SimpleNamespace(
                    student=jax.tree_util.Partial(student, w),
                    ema_student=jax.tree_util.Partial(student, held),
                ),
                ctx,
            )
            .loss
        )

    live, held = jax.grad(loss, (0, 1))(jnp.asarray(W), jnp.asarray(W))
    assert jnp.all(held == 0) and jnp.all(live != 0)


def test_guidance(x64, gaussian, context):
    """v + .5 (v_c - v_null) of the averaged network strictly inside the interval: not at t = 1."""
    x = gaussian().draw(5)
    t = jnp.array([0.0, 0.2, 0.5, 0.8, 1.0])
    v = jnp.ones((5, 2))
    batch = {"x": x, "cond": jnp.full(5, 3.0), "null_cond": jnp.full(5, 1.0)}
    net = SimpleNamespace(
        student=None, ema_student=jax.tree_util.Partial(student, W)
    )
    inside = lambda *rows: np.isin(np.arange(5), rows)[:, None]
    np.testing.assert_allclose(
        RCGM().velocity(net, batch, x, t, v),
        v + np.where(inside(1, 2, 3), 0.5 * 2 * x, 0.0),
        rtol=1e-13,
    )
    some = RCGM(training_guidance=0.8, guidance_times=(0.2, 0.8))
    np.testing.assert_allclose(
        some.velocity(net, batch, x, t, v),
        v + np.where(inside(2), 0.8 * 2 * x, 0.0),
        rtol=1e-13,
    )
    np.testing.assert_array_equal(
        RCGM(training_guidance=0.0).velocity(None, batch, x, t, v), v
    )


def test_objectives(context):
    method = RCGM(ratio=0.6)
    n = 3000
    t, r = (np.asarray(a) for a in method.interval(context(jnp.zeros((n, 2))), n))
    e2e, near, far = (np.arange(n) % 3 == i for i in range(3))
    assert (t[e2e] == 1).all() and (r[e2e] == 0).all()
    share = (t - r) / t
    assert (share[near] < 0.05 + 1e-4).all() and share[near].max() > 0.045
    assert (
        (share[far] < 0.6 + 1e-4).all()
        and share[far].max() > 0.55
        and (share[~e2e] > -1e-4).all()
    )
    np.testing.assert_array_equal(
        RCGM(objectives=("any", "any", "e2e")).assignment(5),
        ["any", "any", "e2e", "any", "any"],
    )


def test_bad_input_is_refused():
    with pytest.raises(Refused, match="did you mean 'any'"):
        RCGM(objectives=("anyy",))
    with pytest.raises(Refused, match="without shift"):
        RCGM(process=Flow(shift=3.0))
    with pytest.raises(Refused, match="order=0"):
        RCGM(order=0)
    with pytest.raises(Refused, match="at least 3"):
        RCGM().assignment(2)


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(style="any", fresh=0.0),
        dict(style="mul", fresh=0.0, warp=(1.17, 0.8, 1.1), gaps=(0.0, 0.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_one_data_point(x64, how, steps):
    """F = (x_t - x) / t leads to x in any style, at any number of steps."""
    x = jnp.array([[0.4, -1.2]])
    net = lambda xt, t, cond, *, r: Flow().from_v((xt - x) / t[:, None], xt, t)
    noise = jax.random.normal(jax.random.key(0), (6, 2))
    out = RCGM(**how).sample(net, noise, None, jax.random.key(1), steps)
    np.testing.assert_allclose(out, jnp.broadcast_to(x, (6, 2)), atol=1e-12)


def test_one_step_starts_at_pure_noise(x64, gaussian):
    g = gaussian()
    noise = jax.random.normal(jax.random.key(0), (6, 2))
    one = RCGM().sample(g.average, noise, None, jax.random.key(1), 1)
    np.testing.assert_allclose(
        one, noise - g.average(noise, jnp.ones(6), r=jnp.zeros(6)).v, atol=1e-13
    )
    exact = jump(g.average, noise, jnp.array([1.0, 0.3, 0.0]))
    np.testing.assert_allclose(one, exact, atol=1e-13)


def test_steps_of_the_engine(three_steps):
    three_steps(RCGM(), second_time=True)
    three_steps(
        RCGM(target_network="student", order=1, objectives=("e2e", "any")),
        second_time=True,
    )


def test_exports_like_other_average_velocities():
    assert RCGM().sampling_times(1) == 1
    with pytest.raises(Refused, match="one step"):
        RCGM().sampling_times(2)
    net = SimpleNamespace(config=None)
    assert RCGM().exported(net, "weights") == (net, "weights")
    assert RCGM.exported is MeanFlow.exported


def test_old_names_of_fields_are_read():
    old = {
        "rows": ("any",),
        "enhance": 0.2,
        "enhance_times": (0.1, 0.9),
        "target": "student",
    }
    new = RCGM(
        objectives=("any",),
        training_guidance=0.2,
        guidance_times=(0.1, 0.9),
        target_network="student",
    )
    assert build({"name": "methods.trajectory.rcgm:RCGM", **old}) == new
