"""Consistency distillation and training: pairs of times, targets, the fixed point, sampling
(00-foundations, section 6).
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core import build
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import EDM, Flow, Trig, expand
from jaxdistill.methods.trajectory._metrics import (
    PerceptualConsistency,
    PerceptualCT,
    SquaredConsistency,
    SquaredCT,
)
from jaxdistill.methods.trajectory.consistency import CT, Consistency
from jaxdistill.objectives.consistency import noise_levels, pseudo_huber
from jaxdistill.objectives.pixels import Preprocess

W = np.array([0.3, -0.7, 0.2])


def network(w, process=Flow()):
    """A small velocity network of rectified flow, read in `process`; w [3]."""
    raw = lambda x, t, cond=None: (
        w[0] * x + w[1] * expand(t, x) ** 2 * x + w[2] * jnp.sin(2 * x)
    )
    return Denoiser().wrap(raw, process)


def test_the_exact_function_has_no_loss_but_the_solvers(x64, gaussian, context):
    """The error of one Heun step is O(h^3) and that of DDIM O(h^2): halving h divides it by 8 and
    4, roughly.
    """
    g = gaussian()

    def distance(solver, levels):
        method = Consistency(solver=solver, levels=levels, huber=0.0)
        net = SimpleNamespace(
            student=g.consistent, ema_student=g.consistent, teacher=g.denoise
        )
        return float(method.loss(net, context(g.draw(512))).metrics["distance"])

    for solver, order in (("ddim", 2), ("heun", 3)):
        assert (
            0.8 * 2**order
            < distance(solver, 33) / distance(solver, 65)
            < 1.25 * 2**order
        ), solver
    assert distance("heun", 65) < 1e-4


@pytest.mark.parametrize("process", [Flow(), Trig()], ids=str)
def test_gradient_is_that_of_a_distance_to_a_constant(
    x64, gaussian, context, process
):
    """The target is one solver step of the teacher, seen by the averaged student; at the lowest
    level it is x_r itself.
    """
    g = gaussian(process)
    method = Consistency(process=process, levels=5, huber=0.01, solver="heun")
    ctx = context(g.draw(32))
    t, r = method.pair(ctx, 32)
    xt = process.add_noise(
        ctx.batch["x"], jax.random.normal(ctx.key("eps"), (32, 2)), t
    )
    slope = g.denoise(xt, t).v
    ahead = xt + (r - t)[:, None] * slope
    xr = xt + (r - t)[:, None] * 0.5 * (slope + g.denoise(ahead, r).v)
    target = jnp.where((r == 0)[:, None], xr, network(2 * W, process)(xr, r).x0)
    assert 0 < (r == 0).sum() < 32
    distance = lambda w: jnp.mean(
        pseudo_huber(network(w, process)(xt, t).x0, target, 0.01 * math.sqrt(2))
    )
    nets = lambda w: SimpleNamespace(
        student=network(w, process),
        ema_student=network(2 * W, process),
        teacher=g.denoise,
    )
    loss = lambda w: method.loss(nets(w), ctx).loss
    np.testing.assert_allclose(loss(W), distance(W), rtol=1e-13)
    np.testing.assert_allclose(jax.grad(loss)(W), jax.grad(distance)(W), rtol=1e-12)


def test_training_uses_the_same_noise(x64, gaussian, context):
    g = gaussian()
    method = CT(total=100, s1=20)
    ctx = context(g.draw(32), step=50)
    (t, r), eps = method.pair(ctx, 32), jax.random.normal(ctx.key("eps"), (32, 2))
    x0 = ctx.batch["x"]
    along = lambda time: (1 - time)[:, None] * x0 + time[:, None] * eps
    target = jnp.where((r == 0)[:, None], x0, network(2 * W)(along(r), r).x0)
    want = jnp.mean(
        pseudo_huber(
            network(W)(along(t), t).x0, target, method.huber * math.sqrt(2)
        )
    )
    loss = method.loss(
        SimpleNamespace(student=network(W), ema_student=network(2 * W)), ctx
    ).loss
    np.testing.assert_allclose(loss, want, rtol=1e-13)


def test_training_is_distillation_where_the_path_is_the_teachers(
    x64, gaussian, context
):
    """Data at one point: the same noise is a step of DDIM, whatever its length."""
    g = gaussian(std=0.0)
    net = network(W)
    nets = SimpleNamespace(student=net, ema_student=net, teacher=g.denoise)
    ctx = context(g.draw(16), step=1)
    training = CT(total=1, s1=17)
    distillation = Consistency(levels=18, solver="ddim")
    np.testing.assert_array_equal(
        training.pair(ctx, 16)[0], distillation.pair(ctx, 16)[0]
    )
    np.testing.assert_allclose(
        training.loss(nets, ctx).loss, distillation.loss(nets, ctx).loss, rtol=1e-12
    )


def test_pairs_are_neighbours_on_the_grid(x64, context):
    edm = Consistency(process=EDM(), levels=18, rho=7.0)
    t, r = edm.pair(context(jnp.zeros((4096, 1))), 4096)
    levels = noise_levels(18, 18, 0.002, 80.0, 7.0)
    # CM's grid is EDM's
    np.testing.assert_allclose(levels, EDM().grid(18)[:-1][::-1], rtol=1e-6)
    index = np.searchsorted(levels, t)
    np.testing.assert_array_equal(levels[index], t)
    np.testing.assert_array_equal(levels[index - 1], r)
    # equally likely: 17 counts of mean 241 and standard deviation 15
    assert abs(
        np.bincount(index, minlength=18)[1:] - 4096 / 17
    ).max() < 5 * math.sqrt(4096 / 17)
    np.testing.assert_allclose(
        sorted(
            set(
                Consistency(levels=5)
                .pair(context(jnp.zeros((64, 1))), 64)[0]
                .tolist()
            )
        ),
        [0.25, 0.5, 0.75, 1],
    )


def test_the_grid_of_training_grows(x64, context):
    """s0 levels at the start, s1 + 1 in the end, from t_min to t_max at all times."""
    method = CT(total=1000, s0=2, s1=30)
    at = lambda step: method.pair(context(jnp.zeros((8192, 1)), step), 8192)
    (t, r), (late_t, late_r) = at(0), at(1000)
    assert set(t.tolist()) == {1.0} and set(r.tolist()) == {0.0}
    np.testing.assert_allclose(late_t - late_r, 1 / 30, rtol=1e-12)
    assert (
        len(set(late_t.tolist())) == 30
        and late_t.max() == 1.0
        and late_r.min() == 0.0
    )


def test_the_targets_average_follows_the_grid():
    """mu(k) = exp(s0 log(mu0) / (N(k) - 1)), N(k) the levels that update k is made on; the engine's
    average decays by it.
    """
    method = CT(total=400, s0=2, s1=150, mu0=0.9)
    k = np.arange(0, 401, 20)
    levels = [math.ceil(math.sqrt(i / 400 * (151**2 - 4) + 4) - 1) + 1 for i in k]
    # the first update is made at k = 0
    got = [float(method.turns[0].decay(jnp.asarray(i + 1))) for i in k]
    np.testing.assert_allclose(
        got, [math.exp(2 * math.log(0.9) / (n - 1)) for n in levels], rtol=1e-6
    )
    assert got[0] == pytest.approx(0.81) and got[-1] == pytest.approx(
        0.9 ** (2 / 150)
    )
    assert CT(mu0=0.0).turns[0].decay is None


@pytest.mark.parametrize("process", [Flow(), Trig()], ids=str)
def test_velocity_networks_satisfy_the_boundary(x64, process):
    x = jnp.array([[1.3, -0.2], [0.4, 2.0]])
    np.testing.assert_array_equal(network(W, process)(x, jnp.zeros(2)).x0, x)


def test_times_below_the_process_ask_for_the_data(x64, gaussian, context):
    """On EDM r = 0 is no time of the network: it is run at t_min, and its output is not used."""
    seen = []

    class Clean(CT):
        def pair(self, ctx, n):
            return jnp.full(n, 2.0), jnp.zeros(n)

    def student(x, t, cond=None):
        seen.append(t)
        return EDM().from_x0(0.9 * x, x, t)

    ctx = context(gaussian().draw(4))
    loss = (
        Clean(process=EDM(), huber=0.0)
        .loss(SimpleNamespace(student=student, ema_student=student), ctx)
        .loss
    )
    x0 = ctx.batch["x"]
    eps = jax.random.normal(ctx.key("eps"), (4, 2))
    np.testing.assert_allclose(
        loss,
        jnp.mean(jnp.sqrt(jnp.sum((0.9 * (x0 + 2 * eps) - x0) ** 2, 1))),
        rtol=1e-13,
    )
    np.testing.assert_array_equal(seen[0], 0.002)


@pytest.mark.parametrize("steps", [1, 2])
def test_sampling_the_exact_function(gaussian, steps):
    """One step is the exact flow; more keep the law of the data: moments of 40 000 numbers to 5
    standard errors.
    """
    g = gaussian()
    n = 20_000
    noise = jax.random.normal(jax.random.key(1), (n, 2))
    x = Consistency(student_times=(1.0, 0.4)).sample(
        g.consistent, noise, None, jax.random.key(2), steps
    )
    if steps == 1:
        np.testing.assert_allclose(x, 0.7 + 0.4 * noise, atol=1e-5)
    assert abs(x.mean() - 0.7) < 5 * 0.4 / math.sqrt(2 * n)
    assert abs(x.std() - 0.4) < 5 * 0.4 / math.sqrt(4 * n)


@pytest.mark.parametrize(
    "squared, host",
    [(SquaredConsistency, Consistency), (SquaredCT, CT)],
    ids=["CD", "CT"],
)
def test_squared_error(x64, gaussian, context, squared, host):
    """mean |f(x_t, t) - sg f(x_r, r)|^2 over dimensions; of the norm that `huber=0` is, sample by
    sample the square / dimension.
    """
    g = gaussian()
    ctx = context(gaussian().draw(16), step=3)
    nets = SimpleNamespace(
        student=network(W), ema_student=network(2 * W), teacher=g.denoise
    )
    norms = []

    class Norm(host):
        def weight(self, t, r):
            return norms.append(None) or jnp.ones_like(t)

        def distance(self, net, made, held):
            norms.append(super().distance(net, made, held))
            return norms[-1]

    Norm(huber=0.0).loss(nets, ctx)
    np.testing.assert_allclose(
        squared().loss(nets, ctx).loss, jnp.mean(norms[0] ** 2 / 2), rtol=1e-12
    )
    with pytest.raises(Refused, match="has no field 'huber'"):
        build.spec(f"methods.trajectory._metrics:{squared.__name__}", huber=0.1)


@pytest.mark.parametrize(
    "make", [PerceptualConsistency, PerceptualCT], ids=["CD", "CT"]
)
def test_a_frozen_network_is_the_distance(x64, gaussian, context, make):
    """The role `perceptual` sees both sides preprocessed; only the student gets a gradient."""
    g = gaussian()
    ctx = context(gaussian().draw(16), step=3)
    perceptual = lambda a, b: jnp.sum(jnp.sin(a) * a - b**3, -1)
    method = make(preprocess=Preprocess(std=(0.25,)))
    assert (
        method.frozen[-1] == "perceptual"
        and method.frozen[:-1] == make.__mro__[2].frozen
    )
    pairs = []
    nets = lambda w, p=perceptual: SimpleNamespace(
        student=network(w),
        ema_student=network(2 * W),
        teacher=g.denoise,
        perceptual=p,
    )
    method.loss(nets(W, lambda a, b: pairs.append((a, b)) or perceptual(a, b)), ctx)
    loss = lambda w: method.loss(nets(w), ctx).loss
    np.testing.assert_allclose(loss(W), jnp.mean(perceptual(*pairs[0])), rtol=1e-13)
    (t, _), eps = method.pair(ctx, 16), jax.random.normal(ctx.key("eps"), (16, 2))
    xt = Flow().add_noise(ctx.batch["x"], eps, t)
    want = lambda w: jnp.mean(perceptual(2 * network(w)(xt, t).x0, pairs[0][1]))
    np.testing.assert_allclose(jax.grad(loss)(W), jax.grad(want)(W), rtol=1e-12)


def test_refusals(gaussian, context):
    g = gaussian()
    with pytest.raises(Refused, match="steps=2: expected 1 to 1"):
        Consistency().sampling_times(2)
    net = SimpleNamespace(
        student=g.consistent, ema_student=g.consistent, teacher=g.denoise
    )
    with pytest.raises(Refused, match="solver='huen'"):
        Consistency(solver="huen").loss(net, context(jnp.zeros((4, 2))))


@pytest.mark.parametrize(
    "method",
    [Consistency(), CT(total=10), SquaredCT(total=10)],
    ids=lambda m: type(m).__name__,
)
def test_three_steps(three_steps, method):
    three_steps(method)
