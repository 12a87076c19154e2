"""MSD: banks whose members are trained side by side, each as it would be alone on the conditions of
its cell.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.bank import bank
from jaxdistill.core.net import make_net
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import EDM, Flow
from jaxdistill.diffusion.regression import denoising_error
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution._members import Members
from jaxdistill.methods.distribution.dmd import DMD, PerceptualDMD
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.multi_student import TSM, MultiStudent
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import Discriminator
from jaxdistill.objectives.partition import Consecutive
from jaxdistill.objectives.pixels import Preprocess
from tools.first_steps import first_steps

CLASSES = 8
K = 4
N = 32
DATA = Mixture(batch_size=N, modes=CLASSES)
ONE = make_net(
    MLP(width=8, depth=2, classes=CLASSES),
    wrap=functools.partial(Denoiser().wrap, process=Flow()),
)
DISC = make_net(Discriminator(taps=1, dim=8, width=8, classes=CLASSES))
TEACHER = DATA.net(Flow())
CELLS = Consecutive(cells=K, classes=CLASSES)
HOSTS = {
    "dm": DMD(),
    "adm": DMD2(critic_steps=2, gan_weight=0.1),
    "tsm": TSM(times=Uniform(), target="v"),
}


def batch(pairs=True, seed=0):
    rng = np.random.default_rng(seed)
    made = {k: jnp.asarray(v) for k, v in DATA.draw(rng, N).items()}
    # every cell has its share
    made["cond"] = jnp.asarray(rng.permutation(np.arange(N) % CLASSES), jnp.int32)
    noise = {
        "pair_noise": jnp.asarray(rng.standard_normal((N, 2)), jnp.float32),
        "pair_x": made["x"][::-1],
        "pair_cond": made["cond"],
    }
    return {**made, **(noise if pairs else {})}


def weights(members, role, key):
    """Weights away from zero for one network, the same for each member of a bank."""
    single = jax.tree.map(
        lambda w: w + 0.05,
        (DISC if role == "disc" else ONE).init(jax.random.key(key)),
    )
    return (
        bank(DISC if role == "disc" else ONE, members).from_source(single)
        if members
        else single
    )


def follow(method, steps=5, members=0, data=None, optimizer=None):
    """(weights before, state after, metrics by step) of the engine's own step."""
    grow = lambda net: bank(net, members) if members else net
    nets = {
        "teacher": TEACHER,
        **{role: grow(DISC if role == "disc" else ONE) for role in method.inits},
    }
    txs = {
        role: optimizer.make(steps, bank=bool(members))
        if optimizer
        else optax.sgd(1e-2)
        for role in method.inits
    }
    start = {
        "teacher": {},
        **{
            role: weights(members, role, 7 + i)
            for i, role in enumerate(method.inits)
        },
    }
    states, metrics = first_steps(
        method, nets, txs, start, batch() if data is None else data, steps
    )
    return states[0].params, states[-1], metrics


def member(params, k):
    return jax.tree.map(lambda w: w[k], params)


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.full
@pytest.mark.parametrize("name", HOSTS)
def test_one_member_is_the_host_step_by_step(name):
    """Clipping by norm included."""
    host = HOSTS[name]
    optimizer = Optimizer(algorithm="sgd", lr=1e-2, clip=0.05)
    _, alone, theirs = follow(host, optimizer=optimizer)
    _, banked, ours = follow(
        Members(host=host, partition=Consecutive(cells=1, classes=CLASSES)),
        members=1,
        optimizer=optimizer,
    )
    for role in host.inits:
        close(
            member(banked.params[role], 0), alone.params[role], rtol=1e-6, atol=1e-6
        )
        close(
            member(banked.ema["student"], 0),
            alone.ema["student"],
            rtol=1e-6,
            atol=1e-6,
        )
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.keys() - wanted.keys() == {
            f"{name.split('/')[0]}/diverged"
            for name in wanted
            if name.endswith("/loss")
        }
        for key in wanted:
            np.testing.assert_allclose(
                mine[key], wanted[key], rtol=1e-5, atol=1e-6, err_msg=key
            )
    assert any(
        m["student/grad_norm"] > 0.05 for m in theirs if "student/grad_norm" in m
    )


@pytest.fixture(scope="module")
def four():
    """Four members on ADM with Adam: function of what is changed in the data, if anything."""
    method = Members(host=HOSTS["adm"], partition=CELLS)
    run = functools.partial(
        follow, method, 3, K, optimizer=Optimizer(lr=1e-3, clip=1.0)
    )
    plain = functools.cache(run)
    return lambda data=None: plain() if data is None else run(data=data)


def changed(samples, value):
    data = batch()
    return {**data, "x": jnp.where(samples[:, None], value(data["x"]), data["x"])}


@pytest.mark.full
def test_a_member_depends_on_its_own_cell_alone(four):
    """Other data for cell 1: its member changes, no other one by a bit."""
    mine = CELLS.assign(batch()["cond"]) == 1
    before, one, _ = four()
    _, other, _ = four(data=changed(mine, lambda x: x + 1.0))
    for role in one.params:
        for k in range(K):
            assert same(
                member(one.params[role], k), member(other.params[role], k)
            ) == (k != 1), (
                role,
                k,
            )
            assert not same(member(one.params[role], k), member(before[role], k))
    # they started as one
    assert not same(
        member(one.params["student"], 0), member(one.params["student"], 2)
    )


def test_a_diverging_member_stands_still_and_the_rest_go_on(four):
    """Not a number in cell 2's data: the run's numbers stay finite, its critics keep their weights,
    others their bits.
    """
    _, alone, _ = four()
    before, hurt, metrics = four(
        data=changed(CELLS.assign(batch()["cond"]) == 2, lambda x: jnp.nan * x)
    )
    assert all(np.isfinite(v) for m in metrics for v in m.values())
    assert [m["fake/diverged"] for m in metrics] == [1.0, 1.0, 1.0]
    for role in alone.params:
        for k in (0, 1, 3):
            assert same(
                member(alone.params[role], k), member(hurt.params[role], k)
            ), (
                role,
                k,
            )
        assert all(np.isfinite(w).all() for w in jax.tree.leaves(hurt.params[role]))
    for role in ("fake", "disc"):
        assert same(member(hurt.params[role], 2), member(before[role], 2))


def test_without_any_finite_member_the_loss_is_no_number():
    method = Members(host=HOSTS["adm"], partition=CELLS)
    _, _, metrics = follow(
        method, 1, K, data=changed(jnp.ones(N, bool), lambda x: jnp.nan * x)
    )
    assert np.isnan(metrics[0]["fake/loss"]) and metrics[0]["fake/diverged"] == K


def test_an_absent_cell_stands_still():
    data = batch()
    data = {
        **data,
        "cond": jnp.where(CELLS.assign(data["cond"]) == 3, 0, data["cond"]),
    }
    before, after, metrics = follow(
        Members(host=HOSTS["dm"], partition=CELLS), 2, K, data=data
    )
    for role in before:
        assert [
            same(member(before[role], k), member(after.params[role], k))
            for k in range(K)
        ] == [
            False,
            False,
            False,
            True,
        ]
    assert metrics[0]["student/diverged"] == 0


@pytest.mark.parametrize("members", [0, 2])
def test_roles_that_are_no_banks_of_the_partitions_size_are_refused(members):
    with pytest.raises(Refused, match=f"bank={members}: expected 4"):
        follow(Members(host=HOSTS["tsm"], partition=CELLS), 1, members)


def test_hosts_with_a_memory_are_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Remembers(DMD):
        def memory(self):
            return {"queue": jnp.zeros(3)}

    with pytest.raises(Refused, match="Remembers has a memory"):
        Members(host=Remembers(), partition=CELLS)


def test_conditions_are_of_the_cell_but_pairs_of_all():
    method = Members(host=HOSTS["dm"], partition=CELLS)
    nets = SimpleNamespace(teacher=TEACHER.bind("teacher", {"teacher": {}}))
    nets.student = nets.fake = bank(ONE, K).bind(
        "student", {"student": weights(K, "student", 1)}
    )
    data = batch()
    gathered = jax.jit(
        lambda: method.turns[1].gather(
            nets, Ctx(data, jax.random.key(0), jnp.int32(0), {})
        )
    )()
    np.testing.assert_array_equal(
        CELLS.assign(gathered["cond"]), np.repeat(np.arange(K), N // K)
    )
    for cond in gathered["pair_cond"].reshape(K, -1):
        assert len(np.unique(CELLS.assign(cond))) > 1
    for name in ("pair_noise", "pair_x", "pair_cond"):
        np.testing.assert_array_equal(gathered[name], data[name])
    # members draw apart
    assert (
        gathered["xt"].shape == (N, 2) and len(np.unique(gathered["xt"][:, 0])) == N
    )


def test_pairs_are_the_teachers_samples():
    """The stored sample lies where the teacher's ODE ends: within its condition's mode."""
    nets = SimpleNamespace(teacher=TEACHER.bind("teacher", {"teacher": {}}))
    made = jax.jit(
        lambda b: DMD(solver_steps=32).pairs(
            nets, Ctx(b, jax.random.key(0), jnp.int32(0), {})
        )
    )(batch(pairs=False))
    _, means, stds = DATA.components
    np.testing.assert_array_equal(made["pair_cond"], batch()["cond"])
    assert np.all(
        np.linalg.norm(made["pair_x"] - means[made["pair_cond"]], axis=1)
        < 5 * stds[made["pair_cond"]]
    )
    assert abs(float(made["pair_noise"].std()) - 1) < 4 / (2 * 2 * N) ** 0.5


def test_regression_is_an_extra_term():
    """Weight 0 reads no pairs; otherwise the loss grows by weight times the mean square."""
    nets = SimpleNamespace(teacher=TEACHER.bind("teacher", {"teacher": {}}))
    nets.student = nets.fake = ONE.bind(
        "student", {"student": weights(0, "student", 1)}
    )
    data = {
        **batch(),
        "xt": jax.random.normal(jax.random.key(3), (N, 2)),
        "t": jnp.ones(N),
    }
    loss = lambda w, data=data: DMD(regression_weight=w).student_loss(
        nets, Ctx(data, jax.random.key(0), jnp.int32(0), {})
    )
    plain = loss(0.0, {k: v for k, v in data.items() if not k.startswith("pair_")})
    full = loss(0.25)
    made = nets.student(data["pair_noise"], jnp.ones(N), data["pair_cond"]).x0
    np.testing.assert_allclose(
        full.metrics["regression"], np.mean((made - data["pair_x"]) ** 2), rtol=1e-5
    )
    np.testing.assert_allclose(
        full.loss - plain.loss, 0.25 * full.metrics["regression"], rtol=1e-4
    )


def test_the_distance_of_a_frozen_network():
    """Regression by `perceptual`, of both sides preprocessed, here sum |2 a - 2 b|; the role is
    frozen in every stage that has it.
    """
    nets = SimpleNamespace(perceptual=lambda a, b: jnp.sum(jnp.abs(a - b), -1))
    host = PerceptualDMD(preprocess=Preprocess(std=(0.25,)))
    a = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    b = jnp.zeros((2, 2))
    np.testing.assert_allclose(host.distance(nets, a, b), [6.0, 2.0], rtol=1e-6)
    method = MultiStudent(partition=CELLS, dm=host)
    assert method.frozen == ("teacher", "perceptual") and [
        s.method.frozen for s in method.stages(10)
    ] == [method.frozen, ("teacher",)]


def test_a_cell_of_one_condition_is_distilled_from_that_conditions_law():
    """K = C: under member k's conditions the teacher is the exact denoiser of mode k alone,
    whatever the label says.
    """
    data = {
        **batch(),
        "cond": jnp.full(N, 5),
        "xt": jax.random.normal(jax.random.key(3), (N, 2)),
        "t": jnp.ones(N),
    }
    params = weights(0, "student", 1)
    _, means, stds = DATA.components

    def alone(x, t, cond=None):
        a, s = Flow().alpha_sigma(t[:, None])
        gain = a * stds[5] ** 2 / ((a * stds[5]) ** 2 + s**2)
        return Flow().from_x0(means[5] + gain * (x - a * means[5]), x, t)

    def grad(teacher):
        nets = SimpleNamespace(
            teacher=teacher, fake=ONE.bind("fake", {"fake": weights(0, "fake", 2)})
        )

        def loss(p):
            nets.student = ONE.bind("student", {"student": p})
            return (
                DMD(regression_weight=0.0)
                .student_loss(nets, Ctx(data, jax.random.key(0), jnp.int32(0), {}))
                .loss
            )

        return jax.jit(jax.grad(loss))(params)

    close(
        grad(TEACHER.bind("teacher", {"teacher": {}})),
        grad(alone),
        rtol=1e-3,
        atol=1e-5,
    )


def test_the_router_runs_each_sample_through_its_own_student():
    method = MultiStudent(partition=CELLS)
    params = jax.vmap(ONE.init)(jax.random.split(jax.random.key(0), K))
    params = jax.tree.map(lambda w: w + 0.05, params)
    net = method.generator(
        SimpleNamespace(student=bank(ONE, K).bind("student", {"student": params}))
    )
    noise = jax.random.normal(jax.random.key(1), (N, 2))
    cond = batch()["cond"]
    made = jax.jit(lambda: method.sample(net, noise, cond, jax.random.key(2), 1))()
    cell = CELLS.assign(cond)
    for k in range(K):
        mine = cell == k
        alone = ONE.apply(
            member(params, k), noise[mine], jnp.ones(int(mine.sum())), cond[mine]
        ).x0
        np.testing.assert_allclose(made[mine], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["v", "edm"])
def test_teacher_matching_vanishes_at_the_teacher(x64, gaussian, context, target):
    """Value and gradient are 0 there, whatever the data; plain denoising keeps the data's own
    variance.
    """
    process = EDM() if target == "edm" else Flow()
    teacher = gaussian(process, 0.7, 0.4)
    method = TSM(process=process, target=target)
    ctx = context(teacher.draw(512))

    def loss(w, teacher=teacher):
        student = lambda x, t, cond=None: process.from_x0(
            teacher.denoise(x, t).x0 * (1 + w[0]) + w[1], x, t
        )
        return method.loss(
            SimpleNamespace(student=student, teacher=teacher.denoise), ctx
        ).loss

    value, grad = jax.value_and_grad(loss)(jnp.zeros(2))
    assert value < 1e-20 and jnp.abs(grad).max() < 1e-12
    assert loss(jnp.array([0.1, 0.0])) > 1e-5 and loss(jnp.array([0.0, 0.1])) > 1e-5


def test_teacher_matching_is_denoising_only_for_the_exact_teacher(
    x64, gaussian, context
):
    """Gradients agree in expectation where the teacher is the data's posterior mean, and differ
    where it is that of another distribution.
    """
    process = Flow()
    n = 100_000
    data = gaussian(Flow(), 0.7, 0.4)
    method = TSM(times=Uniform(low=0.2, high=0.8), target="v")
    ctx = context(data.draw(n, dim=1))

    def grads(teacher):
        student = lambda w: (
            lambda x, t, cond=None: process.from_v(w[0] * x + w[1], x, t)
        )
        matching = lambda w: (
            method.loss(
                SimpleNamespace(student=student(w), teacher=teacher.denoise), ctx
            ).loss
        )

        def denoising(w):
            x0 = ctx.batch["x"]
            t = method.times.draw(process, ctx.key("t"), n)
            eps = jax.random.normal(ctx.key("eps"), x0.shape)
            return jnp.mean(
                denoising_error(
                    process,
                    student(w)(process.add_noise(x0, eps, t), t),
                    x0,
                    eps,
                    t,
                    "v",
                )
            )

        return jnp.stack(
            [
                jax.grad(loss)(jnp.array([0.3, 0.1]))
                for loss in (matching, denoising)
            ]
        )

    exact, wrong = jax.jit(
        lambda: (grads(data), grads(gaussian(process, -0.3, 0.4)))
    )()
    # both are means of n terms of order 1
    np.testing.assert_allclose(exact[0], exact[1], atol=5 * 2 / n**0.5)
    assert jnp.abs(wrong[0] - wrong[1]).max() > 0.1


def test_stages_by_shares():
    method = MultiStudent(partition=CELLS, shares=(1.0, 2.0, 2.0), tsm=HOSTS["tsm"])
    tsm, dm, adm = method.stages(50)
    assert (tsm.steps, dm.steps, adm.steps) == (10, 20, 20)
    assert (
        tsm.collect is None and adm.collect is None and dm.collect.batches == 1000
    )
    assert [set(s.method.inits) for s in (tsm, dm, adm)] == [
        {"student"},
        {"student", "fake"},
        {"student", "fake", "disc"},
    ]
    assert set(method.inits) == {"student", "fake", "disc"} and method.frozen == (
        "teacher",
    )
    only = MultiStudent(
        partition=CELLS,
        shares=(0.0, 1.0, 0.0),
        dm=DMD(critic_steps=5, regression_weight=0.0),
    )
    assert (
        len(only.stages(10)) == 1
        and only.stages(10)[0].collect is None
        and set(only.inits) == {"student", "fake"}
    )
    assert len(MultiStudent().stages(10)) == 2 and MultiStudent().partition.assign(
        jnp.asarray([0, 249, 250, 999])
    ).tolist() == [0, 0, 1, 3]


@pytest.mark.parametrize("shares", [(1.0, 0.0, 0.0), (1.0, 1.0), (0.0, -1.0, 2.0)])
def test_shares_that_train_no_student_are_refused(shares):
    with pytest.raises(Refused, match="expected three numbers"):
        MultiStudent(shares=shares)


def test_hosts_of_different_processes_are_refused():
    with pytest.raises(Refused, match="different processes"):
        MultiStudent(dm=DMD(process=EDM()))
    assert (
        MultiStudent(dm=DMD(process=EDM()), shares=(0.0, 1.0, 0.0)).process == EDM()
    )
    assert dataclasses.replace(
        MultiStudent(), shares=(0.0, 1.0, 0.0)
    ).sampling_times(1).tolist() == [1.0]
