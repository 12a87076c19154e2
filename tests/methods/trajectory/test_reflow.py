"""Rectified flow: pairs, the straight solution, straightness, rounds (00-foundations, section 7;
SlimFlow's closed forms).
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.diffusion.process import Flow, expand
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.methods.trajectory.reflow import Distil, Reflow
from jaxdistill.samplers import ode


def straight(mean, std):
    """The rectified flow of the coupling x0 = mean + std x1."""

    def denoise(x, t, cond=None):
        t_ = expand(t, x)
        noise = (x - (1 - t_) * mean) / ((1 - t_) * std + t_)
        return Flow().from_v((1 - std) * noise - mean, x, t)

    return denoise


def test_a_straight_coupling_has_no_loss(x64, gaussian, context):
    """Pairs of the exact flow map, a student that is their rectified flow: zero at every t, in one
    step too.
    """
    g = gaussian()
    noise = jax.random.normal(jax.random.key(0), (64, 2))
    ctx = context(0.7 + 0.4 * noise, noise=noise)
    net = SimpleNamespace(student=straight(0.7, 0.4))
    assert Reflow().loss(net, ctx).loss < 1e-28
    assert Distil().loss(net, ctx).loss < 1e-28
    assert Reflow().loss(SimpleNamespace(student=g.denoise), ctx).loss > 1e-2
    one = Reflow().sample(net.student, noise, None, jax.random.key(1), 1)
    np.testing.assert_allclose(one, ctx.batch["x"], atol=1e-14)


def test_pairs_are_the_teachers(x64, gaussian, context):
    """x = ODE(noise): Heun's error with 50 steps is far below that with 5; the rest of the batch
    stays.
    """
    g = gaussian()
    ctx = context(jnp.zeros((64, 2)), cond=jnp.arange(64))
    pairs = Reflow().pairs("teacher", 1.0, SimpleNamespace(teacher=g.denoise), ctx)
    np.testing.assert_array_equal(
        pairs["noise"], jax.random.normal(ctx.key("noise"), (64, 2))
    )
    np.testing.assert_array_equal(pairs["cond"], jnp.arange(64))
    want = 0.7 + 0.4 * pairs["noise"]
    error = abs(pairs["x"] - want).max()
    coarse = Reflow(solver_steps=5).pairs(
        "teacher", 1.0, SimpleNamespace(teacher=g.denoise), ctx
    )
    assert error < 0.02 and error < abs(coarse["x"] - want).max() / 5


def test_guided_pairs(x64, context):
    """The teacher's guided velocity is constant here: x = noise - v."""
    teacher = lambda x, t, cond: Flow().from_v(
        jnp.ones_like(x) * cond[:, None], x, t
    )
    ctx = context(
        jnp.zeros((8, 2)), cond=jnp.full(8, 3.0), null_cond=jnp.full(8, 1.0)
    )
    pairs = Reflow(guidance=2.0).pairs(
        "teacher", 2.0, SimpleNamespace(teacher=teacher), ctx
    )
    np.testing.assert_allclose(pairs["x"], pairs["noise"] - 5.0, atol=1e-13)


def test_independent_pairs_are_flow_matching(gaussian, context):
    """The loss on data with independent noise is the flow-matching loss."""
    x = jnp.asarray(gaussian().draw(32), jnp.float32)
    ctx = context(x)
    other = context(x, noise=jax.random.normal(ctx.key("eps"), x.shape))
    net = SimpleNamespace(student=gaussian().denoise)
    plain = FlowMatching(times=Uniform(), label_dropout=0.0).loss(net, ctx).loss
    np.testing.assert_allclose(Reflow().loss(net, other).loss, plain, rtol=1e-6)


def test_distillation_is_the_error_of_the_sample(x64, gaussian, context):
    """t = 1 for all, where |v - (noise - x)| = |x0 - x|."""
    g = gaussian()
    noise = jax.random.normal(jax.random.key(0), (16, 2))
    ctx = context(g.draw(16), noise=noise)
    pred = g.denoise(noise, jnp.ones(16))
    np.testing.assert_allclose(
        Distil().loss(SimpleNamespace(student=g.denoise), ctx).loss,
        jnp.mean((pred.x0 - ctx.batch["x"]) ** 2),
    )


def test_reflow_keeps_the_law_and_straightens(x64, gaussian):
    """The velocity that the loss has its minimum at, E[x1 - x0 | x_t] of the pairs, is the straight
    flow: same end points.
    """
    g = gaussian()
    noise = jax.random.normal(jax.random.key(0), (128, 2))
    x0 = 0.7 + 0.4 * noise
    t = jnp.full(128, 0.3)
    xt = Flow().add_noise(x0, noise, t)
    np.testing.assert_allclose(straight(0.7, 0.4)(xt, t).v, noise - x0, atol=1e-13)
    times = jnp.linspace(1, 0, 4)
    assert (
        ode.straightness(straight(0.7, 0.4), noise, times)
        < 1e-25
        < ode.straightness(g.denoise, noise, times)
    )
    end = ode.sample(ode.euler, straight(0.7, 0.4), noise, times)
    np.testing.assert_allclose(
        end, g.flow(noise, jnp.ones(128), jnp.zeros(128)), atol=1e-13
    )


def test_rounds(x64):
    """The first round asks the teacher, guided; the others ask the last student."""
    stages = Reflow(rounds=3, batches=7, guidance=2.0).stages(100)
    assert [s.steps for s in stages] == [34, 33, 33]
    assert [s.collect.batches for s in stages] == [7, 7, 7]
    assert [s.collect.make.args for s in stages] == [
        ("teacher", 2.0),
        ("student", 1.0),
        ("student", 1.0),
    ]


def test_unknown_solver_is_refused(gaussian, context):
    with pytest.raises(Refused, match="solver='hun'"):
        Reflow(solver="hun").pairs(
            "teacher",
            1.0,
            SimpleNamespace(teacher=gaussian().denoise),
            context(jnp.zeros((4, 2))),
        )


@pytest.mark.parametrize(
    "method", [Reflow(), Distil()], ids=lambda m: type(m).__name__
)
def test_three_steps(three_steps, method):
    three_steps(
        method,
        noise=jnp.asarray(
            np.random.default_rng(1).standard_normal((8, 2)), jnp.float32
        ),
    )
