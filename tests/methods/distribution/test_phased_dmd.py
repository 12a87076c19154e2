"""Phased DMD: phases and their roles, roll-outs, gradients at the end of a phase, and what it is
with a single phase.
"""

import dataclasses
import functools
import zlib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.recipes import phased_dmd as recipe
from jaxdistill.core import build, lora, sharding
from jaxdistill.core.net import make_net
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.step import all_weights, bind
from jaxdistill.core.types import Refused
from jaxdistill.data.mixtures import Mixture
from jaxdistill.data.synthetic import Synthetic
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import Flow
from jaxdistill.diffusion.times import Uniform
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.phased_dmd import (
    InterleavedPhasedDMD,
    PhasedDMD,
)
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.objectives import score
from jaxdistill.run import loop
from jaxdistill.run.checkpoint import load_params
from jaxdistill.run.experiment import Experiment, abstract_params
from jaxdistill.run.programs import make_programs
from jaxdistill.samplers.fewstep import simulate
from tools.first_steps import first_steps

FOUR = (1.0, 0.75, 0.5, 0.25)
ALL_TIMES = Uniform(low=0.02, high=0.98)
TWO_EXPERTS = dict(process=Flow(shift=7.0), teacher_bounds=(0.5,))


def phase(k, **fields):
    return dataclasses.replace(PhasedDMD(**fields), phase=k)


def ranges(method, k):
    return [(r.fake, r.teacher, r.low, r.high) for r in method.phases[k].intervals]


def test_two_phases_of_a_single_teacher():
    method = PhasedDMD()
    assert method.exports == ("expert0", "student") and method.ema == ()
    assert method.inits == {
        "expert0": "teacher",
        "fake0": "teacher",
        "student": "teacher",
        "fake1": "teacher",
    }
    first, second = (stage.method for stage in method.stages(1000))
    assert (first.frozen, tuple(first.inits)) == (
        ("teacher",),
        ("expert0", "fake0"),
    )
    assert (second.frozen, tuple(second.inits)) == (
        ("teacher", "expert0"),
        ("student", "fake1"),
    )
    # reverse nested: both reach up to pure noise
    assert ranges(method, 0) == [("fake0", "teacher", 0.5, 1.0)] and ranges(
        method, 1
    ) == [("fake1", "teacher", 0.0, 1.0)]


def test_disjoint_intervals_end_where_the_phase_begins():
    disjoint = PhasedDMD(nested=False)
    assert ranges(disjoint, 0) == [("fake0", "teacher", 0.5, 1.0)] and ranges(
        disjoint, 1
    ) == [("fake1", "teacher", 0.0, 0.5)]
    assert ranges(PhasedDMD(nested=False, **TWO_EXPERTS), 1) == [
        ("fake1_1", "teacher", 0.0, 0.5)
    ]


def test_a_phase_for_each_step():
    method = PhasedDMD(phase_steps=(1, 1, 1, 1))
    assert method.exports == ("expert0", "expert1", "expert2", "student")
    assert [(phase.first, phase.last, phase.end) for phase in method.phases] == [
        (0, 1, 0.75),
        (1, 2, 0.5),
        (2, 3, 0.25),
        (3, 4, 0.0),
    ]
    assert method.stages(8)[3].method.frozen == (
        "teacher",
        "expert0",
        "expert1",
        "expert2",
    )


def test_a_teacher_of_two_experts_has_a_fake_score_for_each_range():
    """Phase k trains k fake scores; its generator starts from the teacher of its own noise."""
    method = PhasedDMD(**TWO_EXPERTS)
    assert ranges(method, 0) == [("fake0", "teacher0", 0.5, 1.0)]
    assert ranges(method, 1) == [
        ("fake1_0", "teacher0", 0.5, 1.0),
        ("fake1_1", "teacher", 0.0, 0.5),
    ]
    assert method.inits == {
        "expert0": "teacher0",
        "fake0": "teacher0",
        "student": "teacher",
        "fake1_0": "teacher0",
        "fake1_1": "teacher",
    }
    # where the boundary lies above the end of the phase, its times are clamped to the noisier
    # expert's (.875 at a shift of 5)
    clamped = PhasedDMD(process=Flow(shift=5.0), teacher_bounds=(0.875 / 1.5,))
    assert ranges(clamped, 0) == [("fake0", "teacher0", 0.875 / 1.5, 1.0)]
    np.testing.assert_allclose(
        Flow(shift=5.0).alpha_sigma(jnp.asarray(0.875 / 1.5))[1], 0.875, rtol=1e-6
    )
    four = PhasedDMD(phase_steps=(1, 1, 1, 1), teacher_bounds=(0.5,))
    assert [
        [interval.teacher for interval in phase.intervals] for phase in four.phases
    ] == [["teacher0"]] * 2 + [["teacher0", "teacher"]] * 2


def test_grid_and_boundary_after_the_warp():
    for shift, want in (
        (5.0, (1, 0.938, 0.833, 0.625)),
        (3.0, (1, 0.9, 0.75, 0.5)),
        (7.0, (1, 0.955, 0.875, 0.7)),
    ):
        np.testing.assert_allclose(
            Flow(shift=shift).alpha_sigma(jnp.asarray(FOUR))[1], want, atol=5e-4
        )


def test_stages_share_the_steps_and_drop_earlier_fakes():
    assert [s.steps for s in PhasedDMD(phase_steps=(1, 1, 2)).stages(100)] == [
        33,
        34,
        33,
    ]
    stages = PhasedDMD(shares=(3.0, 1.0)).stages(100)
    assert [s.steps for s in stages] == [75, 25] and stages[0].surgery is None
    params = {role: {} for role in ("teacher", "expert0", "fake0")}
    assert set(stages[1].surgery({}, params, {})[1]) == {"teacher", "expert0"}


def pattern(method, steps):
    return [tuple(t.moves for t in method.turns if t.when(i)) for i in range(steps)]


def test_a_generator_update_then_five_of_the_fakes():
    want = [(("expert0",), ("fake0",))] + [(("fake0",),)] * 4
    assert pattern(phase(0), 10) == want * 2
    assert [
        i
        for i, taken in enumerate(
            pattern(phase(1, **TWO_EXPERTS, critic_steps=3), 12)
        )
        if len(taken) == 2
    ] == [0, 3, 6, 9]
    assert pattern(phase(1, **TWO_EXPERTS), 1) == [
        (("student",), ("fake1_0", "fake1_1"))
    ]


def test_intervals_take_turns_at_the_generator():
    high, low, _ = phase(1, **TWO_EXPERTS, critic_steps=3).turns
    assert [i for i in range(12) if high.when(i)] == [0, 6] and [
        i for i in range(12) if low.when(i)
    ] == [3, 9]
    assert (
        high.loss.keywords["interval"].teacher == "teacher0"
        and low.loss.keywords["interval"].teacher == "teacher"
    )


def test_interleaved_phases_take_turns():
    """Iterations alternate; each is one generator update and five of that phase's fakes, and the
    other phase rests.
    """
    method = InterleavedPhasedDMD(critic_steps=2)
    one = [(("expert0",), ("fake0",)), (("fake0",),)]
    two = [(("student",), ("fake1",)), (("fake1",),)]
    assert pattern(method, 8) == (one + two) * 2
    assert len(method.stages(8)) == 1 and method.frozen == ("teacher",)
    _, _, high, low, _ = InterleavedPhasedDMD(**TWO_EXPERTS, critic_steps=2).turns
    assert [i for i in range(16) if high.when(i)] == [2, 10] and [
        i for i in range(16) if low.when(i)
    ] == [6, 14]


def test_refuses_what_does_not_fit():
    for fields, message in [
        (dict(phase_steps=(2, 3)), "phase_steps=.*sum is 4"),
        (dict(phase_steps=(4, 0)), "phase_steps"),
        (dict(student_times=(1.0, 0.5, 0.75, 0.25)), "student_times=.*falling"),
        (dict(teacher_bounds=(1.5,)), "teacher_bounds=.*at most 1.0"),
        (dict(shares=(1.0,)), "shares=.*expected 2"),
        (dict(weight="kll"), "weight='kll': did you mean 'kl'"),
    ]:
        with pytest.raises(Refused, match=message):
            PhasedDMD(**fields)


def experts_of(gaussian, process, n):
    return [gaussian(process, 0.7 - 0.5 * i, 0.4 + 0.1 * i) for i in range(n)]


def manual(experts, sizes, process, noise, count, end):
    """Euler in the warped time, x + (tau' - tau) (eps - x0)."""
    owner = [k for k, size in enumerate(sizes) for _ in range(size)]
    x = noise
    for i in range(count):
        t = FOUR[i]
        s = (*FOUR, end)[i + 1]
        pred = experts[owner[i]].denoise(x, jnp.full(len(x), t))
        tau, sigma = (process.alpha_sigma(jnp.asarray(u))[1] for u in (t, s))
        x = x + (sigma - tau) * (pred.eps - pred.x0)
    return x


@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 1, 1), (4,)])
def test_roll_outs_are_eulers_through_the_experts(x64, gaussian, context, sizes):
    """Complete for the fakes, cut at a shared step of the phase for the generator; from the same
    noise.
    """
    process = Flow(shift=5.0)
    complete = PhasedDMD(process=process, phase_steps=sizes)
    experts = experts_of(gaussian, process, len(sizes))
    net = SimpleNamespace(
        **{name: e.denoise for name, e in zip(complete.exports, experts)}
    )
    ctx = context(jnp.zeros((6, 2)))
    noise = jax.random.normal(ctx.key("noise"), (6, 2))
    for method in complete.by_phase:
        first, last = method.current.first, method.current.last
        xs = method.complete_rollout(net, ctx)["xs"]
        np.testing.assert_allclose(
            xs,
            manual(experts, sizes, process, noise, last, 0.0),
            rtol=1e-9,
            atol=1e-10,
        )
        batch = method.truncated_rollout(net, ctx)
        index = FOUR.index(float(batch["t"][0]))
        assert first <= index < last and np.ptp(batch["t"]) == 0
        np.testing.assert_allclose(
            batch["xt"],
            manual(experts, sizes, process, noise, index, 0.0),
            rtol=1e-9,
            atol=1e-10,
        )
    out = complete.sample(
        complete.generator(net), noise, None, jax.random.key(0), 4
    )
    np.testing.assert_allclose(
        out, manual(experts, sizes, process, noise, 4, 0.0), rtol=1e-9, atol=1e-10
    )


def test_the_steps_of_a_phase_are_drawn_alike(context):
    """Uniform over the phase's own steps, one draw for the batch."""
    net = SimpleNamespace(teacher=lambda x, t, cond=None: Flow().from_v(x, x, t))
    at = context(jnp.zeros((3, 2)))
    method = phase(1)
    draw = jax.jit(
        lambda key: method.truncated_rollout(net, dataclasses.replace(at, rng=key))[
            "t"
        ]
    )
    drawn = np.array(
        [draw(key) for key in jax.random.split(jax.random.key(0), 200)]
    )
    assert np.all(np.ptp(drawn, axis=1) == 0) and set(drawn[:, 0].tolist()) == {
        0.5,
        0.25,
    }
    assert abs(np.mean(drawn[:, 0] == 0.5) - 0.5) < 4 * 0.5 / 200**0.5


def test_before_its_phase_an_expert_is_its_teacher():
    said = lambda value: (
        lambda x, t, cond=None: Flow().from_x0(jnp.full_like(x, value), x, t)
    )
    method = PhasedDMD(**TWO_EXPERTS)
    x = jnp.zeros((2, 1))
    at = lambda net, t: float(method.generator(net)(x, jnp.full(2, t)).x0[0, 0])
    net = SimpleNamespace(teacher0=said(0.0), teacher=said(1.0), expert0=said(2.0))
    assert [at(net, t) for t in FOUR] == [2.0, 2.0, 1.0, 1.0]
    net.student = said(3.0)
    assert [at(net, t) for t in FOUR] == [2.0, 2.0, 3.0, 3.0]
    assert [
        at(SimpleNamespace(teacher0=said(0.0), teacher=said(1.0)), t) for t in FOUR
    ] == [
        0.0,
        0.0,
        1.0,
        1.0,
    ]


def test_sampling_refuses_more_steps():
    with pytest.raises(Refused, match="steps=5: expected 1 to 4"):
        PhasedDMD().sample(
            lambda x, t, cond=None: Flow().from_v(x, x, t),
            jnp.zeros((2, 1)),
            None,
            jax.random.key(0),
            5,
        )


def scored(gaussian, process, shift=0.0):
    """Nets of phase 0 with a generator that says x0 = .3 + shift, and exact scores of two
    Gaussians.
    """
    student = lambda x, t, cond=None: process.from_x0(
        jnp.full_like(x, 0.3) + shift, x, t
    )
    real = gaussian(process, 0.7, 0.4)
    fake = gaussian(process, -0.2, 0.6)
    return SimpleNamespace(
        expert0=student,
        student=student,
        teacher=real.denoise,
        fake0=fake.denoise,
        fake1=fake.denoise,
    )


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("weight", ["kl", "normalised"])
def test_gradient_at_the_end_of_the_phase(x64, gaussian, context, k, weight):
    """kl: w (v_phi - v_psi) . d x_s, w = alpha_t alpha_{t|s} / (alpha_t sigma_t + sigma_t^2);
    normalised: on the extrapolated x0.
    """
    process = Flow(shift=5.0)
    n = 64
    method = phase(k, process=process, weight=weight)
    s = method.current.end
    interval = method.current.intervals[0]
    tau = 0.75 - 0.5 * k
    ctx = context(
        jnp.zeros((n, 1)),
        xt=jax.random.normal(jax.random.key(5), (n, 1)),
        t=jnp.full(n, tau),
    )
    grad = jax.grad(
        lambda m: (
            method.student_loss(scored(gaussian, process, m), ctx, interval).loss
        )
    )(0.0)

    pred = scored(gaussian, process).student(ctx.batch["xt"], ctx.batch["t"])
    xs = process.add_noise(pred.x0, pred.eps, jnp.asarray(s))
    xt, t, _ = method.renoise(xs, interval, method.match_times, ctx, "match")
    assert np.all((t >= s + 0.02) & (t <= 0.98))
    net = scored(gaussian, process)
    v = lambda pred: pred.eps - pred.x0
    real = net.teacher(xt, t)
    fake = getattr(net, interval.fake)(xt, t)
    (a, sigma), (a_s, s_s), (_, s_tau) = (
        process.alpha_sigma(jnp.asarray(u)) for u in (t[:, None], s, tau)
    )
    if weight == "kl":
        w = a * (a / a_s) / (a * sigma + sigma**2)
        # d x_s / d x0 = (tau - s) / tau
        want = np.mean(w * (v(real) - v(fake))) * (s_tau - s_s) / s_tau
    else:
        want = np.mean(
            (fake.x0 - real.x0) / np.maximum(np.abs(pred.x0 - real.x0), 1e-4)
        )
    np.testing.assert_allclose(grad, want, rtol=1e-9)


@pytest.mark.parametrize("weight", ["kl", "normalised"])
def test_equal_scores_leave_the_expert_alone(x64, gaussian, context, weight):
    def loss(m):
        net = scored(gaussian, Flow(), m)
        net.fake0 = net.teacher
        ctx = context(
            jnp.zeros((16, 1)),
            xt=jax.random.normal(jax.random.key(5), (16, 1)),
            t=jnp.full(16, 0.75),
        )
        return method.student_loss(net, ctx, method.current.intervals[0]).loss

    method = phase(0, weight=weight)
    assert jax.grad(loss)(0.0) == 0


def test_the_fake_score_learns_the_students_score_from_within(
    x64, gaussian, context
):
    """x_s of a Gaussian: its exact denoiser is the minimiser of the loss on samples at s alone, in
    both weights.
    """
    process = Flow()
    student = gaussian(Flow(), -0.2, 0.6)
    n = 200_000
    x0 = student.draw(n, 1)
    xs = process.add_noise(
        x0,
        jnp.asarray(np.random.default_rng(1).standard_normal((n, 1))),
        jnp.asarray(0.5),
    )
    for clamp in (10.0, np.inf):
        method = phase(0, fake_clamp=clamp, fake_times=Uniform(low=0.1, high=0.98))
        ctx = context(x0, xs=xs)

        def loss(w):
            fake0 = lambda x, t, cond=None: process.from_x0(
                w[0] * student.denoise(x, t).x0 + w[1], x, t
            )
            return method.critic_loss(SimpleNamespace(fake0=fake0), ctx).loss

        at = jax.grad(loss)(jnp.array([1.0, 0.0]))
        away = jax.grad(loss)(jnp.array([0.8, 0.2]))
        # sampling noise of the draws
        assert jnp.all(jnp.abs(at) < 0.05 * jnp.abs(away).max()), (
            at,
            away,
        )


def key_of(role):
    return jax.random.key(zlib.crc32(role.encode()))


def networks(method, adapters=()):
    net = make_net(
        MLP(width=8, depth=2),
        wrap=functools.partial(Denoiser().wrap, process=method.process),
    )
    return {
        r: lora.adapt(net, base=method.inits[r], rank=2) if r in adapters else net
        for r in (*method.frozen, *method.inits)
    }


def follow(method, steps, adapters=(), alike=()):
    """[(weights before, weights after, metrics)] of the engine's first steps; every role its own
    weights but those of `alike`.
    """
    nets = networks(method, adapters)
    start = {
        role: nets[role].init(key_of(dict(alike).get(role, role)))
        for role in nets
        if role not in adapters
    }
    states, metrics = first_steps(
        method,
        nets,
        optax.sgd(1e-2),
        start,
        {"x": jax.random.normal(jax.random.key(0), (16, 2))},
        steps,
    )
    weights = [jax.device_get(all_weights(state)) for state in states]
    return list(zip(weights, weights[1:], metrics))


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGTS(DiffInstruct):
    """DMD with stochastic gradient truncation along an ODE: one generator, matched at x0. Complete
    roll-outs for the fake score.
    """

    match_times: Uniform = ALL_TIMES
    fake_times: Uniform = ALL_TIMES

    @property
    def turns(self):
        fake, student = super().turns
        return (
            student,
            dataclasses.replace(
                fake, gather=functools.partial(self.simulate, complete=True)
            ),
        )

    def simulate(self, net, ctx, complete=False):
        noise = jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape)
        n = len(self.student_times)
        index = (
            n - 1 if complete else jax.random.randint(ctx.key("index"), (), 0, n)
        )
        xt, t = simulate(
            self.process,
            net.student,
            noise,
            jnp.array(self.student_times),
            ctx.key("chain"),
            index,
            "ddim",
        )
        return {**ctx.batch, "xt": xt, "t": t}

    def direction(self, x0, real, fake, t):
        return score.dmd_gradient(x0, real.x0, fake.x0, floor=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("times", [(1.0,), FOUR], ids=["one_step_dmd", "sgts"])
def test_a_single_phase_follows_dmd_with_gradient_truncation(x64, times):
    """Draw for draw over five steps: one step is DMD's one-step generator, more are random
    truncation at x0.
    """
    ours = follow(
        phase(
            0,
            student_times=times,
            phase_steps=(len(times),),
            fake_clamp=np.inf,
            critic_steps=2,
        ),
        5,
        alike={"fake0": "fake"}.items(),
    )
    host = follow(SGTS(student_times=times, critic_steps=2), 5)
    for (_, mine, got), (_, theirs, want) in zip(ours, host, strict=True):
        close(mine["student"], theirs["student"])
        close(mine["fake0"], theirs["fake"])
        np.testing.assert_allclose(
            got["fake0/denoise"], want["fake/denoise"], rtol=1e-6
        )
        if "student/match" in want:
            np.testing.assert_allclose(
                got["student/match"], want["student/match"], rtol=1e-6
            )


def test_two_phases_are_not_one():
    """The same draws with the boundary left out: the first phase's expert goes elsewhere."""
    one = follow(
        phase(0, phase_steps=(4,)), 1, alike={"student": "expert0"}.items()
    )[-1]
    two = follow(phase(0), 1)[-1]
    assert same(one[0]["student"], two[0]["expert0"]) and not same(
        one[1]["student"], two[1]["expert0"]
    )


@pytest.mark.full
def test_exactly_the_phase_s_own_networks_move():
    method = InterleavedPhasedDMD(**TWO_EXPERTS, critic_steps=1)
    for i, (before, after, metrics) in enumerate(follow(method, 4)):
        moving = (
            {"expert0", "fake0"}
            if i % 2 == 0
            else {"student", "fake1_0", "fake1_1"}
        )
        assert {
            role for role in before if not same(before[role], after[role])
        } == moving
        assert all(np.isfinite(v) for v in metrics.values())


def test_no_gradient_leaves_the_phase(context):
    """In phase k the loss has a zero gradient in every other network: other experts, teachers and
    fake scores.
    """
    method = InterleavedPhasedDMD(**TWO_EXPERTS)
    nets = networks(method)
    params = {role: net.init(key_of(role)) for role, net in nets.items()}
    batch = jax.random.normal(jax.random.key(5), (8, 2))
    for one, t in zip(method.by_phase, (0.75, 0.25)):
        for interval in one.current.intervals:
            ctx = context(batch, xt=batch, t=jnp.full(8, t))
            grads = jax.jit(
                jax.grad(
                    lambda params: (
                        one.student_loss(bind(nets, params), ctx, interval).loss
                    )
                )
            )(params)
            assert {
                role
                for role, g in grads.items()
                if any(np.any(w) for w in jax.tree.leaves(g))
            } == {one.current.expert}


def test_the_fakes_gradient_stays_with_the_fakes(context):
    method = InterleavedPhasedDMD(**TWO_EXPERTS)
    nets = networks(method)
    params = {role: net.init(key_of(role)) for role, net in nets.items()}
    ctx = context(
        jnp.zeros((8, 2)), xs=jax.random.normal(jax.random.key(5), (8, 2))
    )
    late = method.by_phase[1]
    grads = jax.jit(
        jax.grad(lambda params: late.critic_loss(bind(nets, params), ctx).loss)
    )(params)
    assert {
        role
        for role, g in grads.items()
        if any(np.any(w) for w in jax.tree.leaves(g))
    } == {
        "fake1_0",
        "fake1_1",
    }


@pytest.mark.full
def test_experts_as_adapters_of_their_teachers():
    """Low-rank generators and full fake scores: the teachers stay, each expert adapts the teacher
    of its range.
    """
    method = InterleavedPhasedDMD(**TWO_EXPERTS, critic_steps=1)
    assert {
        role: net.adapts
        for role, net in networks(method, method.exports).items()
        if net.adapts
    } == {
        "expert0": "teacher0",
        "student": "teacher",
    }
    for before, after, metrics in follow(method, 4, adapters=method.exports):
        assert same(before["teacher0"], after["teacher0"]) and same(
            before["teacher"], after["teacher"]
        )
        assert all(np.isfinite(v) for v in metrics.values())


def test_the_fake_follows_the_expert_where_they_are_coupled():
    """After a generator update: fake <- d fake + (1 - d) expert, with the updated expert; the step
    of the fake comes after.
    """
    # the fake's own loss is switched off
    settings = dict(critic_steps=1, fake_clamp=0.0)
    (before, after, _), (_, later, _) = follow(
        phase(0, coupling=0.97, **settings), 2
    )
    mix = lambda f, g: jax.tree.map(lambda f, g: 0.97 * f + 0.03 * g, f, g)
    close(after["fake0"], mix(before["fake0"], after["expert0"]))
    close(later["fake0"], mix(after["fake0"], later["expert0"]))
    alone = follow(phase(0, **settings), 1)[0]
    assert same(alone[0]["fake0"], alone[1]["fake0"])
    # with two intervals, the fake of the expert's own range
    turns = phase(1, coupling=0.97, **TWO_EXPERTS).turns
    assert turns[0].after is None
    role = {"kernel": np.ones(2)}
    assert set(turns[1].after({"student": role, "fake1_1": role}, 0)) == {"fake1_1"}
    with pytest.raises(Refused, match=r"roles.fake0: .*roles.expert0; .*adapters"):
        follow(phase(0, coupling=0.97), 1, adapters=("expert0",))


@pytest.mark.parametrize("k", [0, 1])
def test_trains_in_every_phase(three_steps, k):
    three_steps(phase(k, critic_steps=1, weight="kl"))


def tiny():
    net = dict(model=MLP(width=8, depth=1), denoiser=Denoiser())
    data = Mixture(batch_size=16, labelled=False)
    common = dict(data=data, tensorboard=False, log_every=5)
    base = build.experiment(
        **common,
        steps=5,
        method=FlowMatching(),
        roles=dict(student=build.Role(**net)),
    )
    method = PhasedDMD(critic_steps=2)
    return build.experiment(
        **common,
        steps=8,
        method=method,
        roles=dict(teacher=build.Role(init="@base")),
        runs=dict(base=base),
        evaluation=PointEval(
            samples=100, batch=100, student_steps=(4,), teacher_steps=(4,)
        ),
        eval_every=2,
    )


@pytest.mark.full
def test_a_run_of_two_stages(tmp_path):
    """Each stage trains and keeps its own roles; the earlier expert stays bit-equal, the later fake
    starts from the teacher.
    """
    report = loop.run(tiny(), tmp_path, progress=False)
    assert [row["name"] for row in report["models"]] == ["teacher", "student"]
    trained = loop.load(tmp_path)
    assert set(trained.params) == {"teacher", "expert0", "student", "fake1"}
    stored = lambda stage, role: load_params(
        tmp_path / "stages" / str(stage),
        {
            role: abstract_params(
                trained.experiment.mesh,
                trained.experiment.roles[role].rules,
                trained.nets[role],
            )
        },
    )[role]
    assert sorted(p.name for p in (tmp_path / "stages").iterdir()) == ["0", "1"]
    assert same(stored(0, "expert0"), trained.params["expert0"]) and same(
        stored(1, "student"), trained.params["student"]
    )
    assert not same(stored(0, "fake0"), trained.params["teacher"])
    # five updates of a fake from the teacher's weights at Adam's 1e-4, none of the first stage's
    # drift carried over
    gap = lambda a, b: max(
        np.abs(x - y).max()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert 0 < gap(trained.params["fake1"], trained.params["teacher"]) <= 4 * 1.2e-4


def lowered(config, lowers_for_tpu):
    """Every program of every stage lowers for TPU; role -> number of weights of what moves, by
    stage.
    """
    config.mesh = build.plain(MeshShape(data=2, fsdp=2, tensor=2))
    config.steps = 2 * 2 * config.method.critic_steps
    run = Experiment(config, Path("unused"))
    moved = []
    with sharding.use(run.mesh, run.settings.rules):
        start = {
            role: abstract_params(run.mesh, run.roles[role].rules, net)
            for role, net in run.nets.items()
        }
        for stage in run.method.stages(config.steps):
            mine = {role: start[role] for role in stage.method.frozen}
            programs = make_programs(run, run.nets, stage, mine, run.data.spec())
            lowers_for_tpu(programs)
            moved.append(
                {
                    role: sum(w.size for w in jax.tree.leaves(p))
                    for role, p in programs.abstract.params.items()
                }
            )
    return moved


@pytest.mark.full
@pytest.mark.parametrize(
    "variant",
    [
        "",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("wan21", "released")
        ),
    ],
)
def test_every_stage_of_the_video_recipe_lowers_with_small_networks(
    variant, lowers_for_tpu
):
    """Adapters on the teacher of their range and full fake scores, or full weights, on
    text-conditioned video latents.
    """
    config = recipe.get_config(variant)
    small = dict(channels=4, dim=32, mlp=64, heads=2, depth=2, text_dim=16)
    record = {
        "x": "normal 2 4 4 4",
        **{
            f"{c}/{k}": v
            for c in ("cond", "null_cond")
            for k, v in (("text", "normal 6 16"), ("mask", "constant 1 6"))
        },
    }
    with config.unlocked():
        config.data = build.plain(Synthetic(batch_size=8, arrays=record))
    for role in config.roles:
        if "teacher" in role:
            config.roles[role].model.update(small)
        elif config.roles[role].lora.rank:
            config.roles[role].lora.rank = 2
    moved = lowered(config, lowers_for_tpu)
    roles = {
        "": [{"expert0", "fake0"}, {"student", "fake1_0", "fake1_1"}],
        "wan21": [{"expert0", "fake0"}, {"student", "fake1"}],
        "released": [{"expert0", "fake0", "student", "fake1_0", "fake1_1"}],
    }[variant]
    assert [set(m) for m in moved] == roles
    assert (moved[0]["expert0"] < moved[0]["fake0"]) == (variant != "released")


def test_the_recipe_refuses_other_variants():
    with pytest.raises(Refused, match="did you mean 'wan21'"):
        recipe.get_config("wan")
    with pytest.raises(Refused, match="expected one of released, wan21"):
        recipe.get_config("xx")
