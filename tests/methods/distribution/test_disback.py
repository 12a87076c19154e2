"""DisBack: a path from the teacher to the distribution of the student's own samples, recorded, and
followed back as the host's real score.
"""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.bank import bank
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.net import make_net
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import Flow
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.disback import (
    DisBack,
    DisBackDiffInstruct,
    Recording,
)
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import Discriminator
from jaxdistill.run import loop
from tools.first_steps import first_steps

AT = 0.6
FIXED = Uniform(low=AT, high=AT)
ONE = make_net(
    MLP(width=8, depth=2), wrap=functools.partial(Denoiser().wrap, process=Flow())
)
DISC = make_net(Discriminator(taps=1, dim=8, width=8))
BATCH = {"x": jax.random.normal(jax.random.key(0), (16, 2))}


def apart(key):
    """Weights whose last layer is not zero."""
    return jax.tree.map(lambda w: w + 0.05, ONE.init(jax.random.key(key)))


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def follow(method, steps, members=1, lr=1e-2, **start):
    """(state before, state after, metrics of each step) of the engine's own step; the path starts
    as teachers.
    """
    nets = {
        role: {"disc": DISC, "path": bank(ONE, members)}.get(role, ONE)
        for role in (*method.inits, *method.frozen)
    }
    start = {"teacher": apart(7), **start}
    start.setdefault("path", start["teacher"])
    states, metrics = first_steps(
        method,
        nets,
        optax.sgd(lr),
        {r: p for r, p in start.items() if r in nets},
        BATCH,
        steps,
    )
    return states[0], states[-1], metrics


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "host"),
    [
        (
            DisBackDiffInstruct(checkpoints=0, critic_steps=2),
            DiffInstruct(critic_steps=2),
        ),
        (
            DisBack(checkpoints=0, critic_steps=2),
            DMD2(critic_steps=2, gan_weight=5e-3),
        ),
    ],
    ids=["diff_instruct", "dmd2"],
)
def test_without_checkpoints_it_is_its_host(method, host):
    (stage,) = method.stages(5)
    _, params = stage.surgery({}, {"teacher": "weights"}, None)
    assert (
        stage.method is method and params["path"] == "weights" and stage.steps == 5
    )
    _, ours, losses = follow(method, 5, fake=apart(8))
    _, theirs, others = follow(host, 5, fake=apart(8))
    for role in theirs.params:
        for a, b in zip(
            jax.tree.leaves(ours.params[role]),
            jax.tree.leaves(theirs.params[role]),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for mine, wanted in zip(losses, others, strict=True):
        assert mine.keys() == wanted.keys() and ("student/loss" in mine) == (
            mine is losses[0] or mine is losses[2] or mine is losses[4]
        )
        for name in wanted:
            np.testing.assert_allclose(
                mine[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name
            )


def affine_path(gaussian, context, mu, spread, m, small, steps=2000, lr=0.02):
    """Weights (w, b) of an affine denoiser at one time, from the teacher's optimum by descent of
    stage 1's own loss.
    """
    process = Flow()
    n = 20_000
    a, s = process.alpha_sigma(AT)
    teacher = gaussian(process, mu, spread**0.5)
    student = gaussian(process, m, small**0.5)
    z = jax.random.normal(jax.random.key(5), (n // 2, 1))
    # the sample's mean is m exactly
    ctx = context(jnp.zeros((n, 1)), xt=jnp.concatenate([z, -z]), t=jnp.ones(n))
    host = DisBackDiffInstruct(fake_times=FIXED, fake_target="x0")
    net = SimpleNamespace(
        student=lambda x, t, cond=None: process.from_x0(
            student.mean + student.std * x, x, t
        ),
        teacher=teacher.denoise,
    )
    (turn,) = Recording(host=host, every=1).turns

    def loss(w):
        fake = lambda x, t, cond=None: process.from_x0(w[0] * x + w[1], x, t)
        return turn.loss(SimpleNamespace(**vars(net), fake=fake), ctx).loss

    gain = lambda var: a * var / (a**2 * var + s**2)
    first = jnp.array([gain(spread), mu * (1 - a * gain(spread))])

    def body(w, _):
        value, grad = jax.value_and_grad(loss)(w)
        return w - lr * grad, (w, value)

    _, (ws, values) = jax.lax.scan(body, first, None, steps)
    x = a * (student.mean + student.std * ctx.batch["xt"]) + s * jax.random.normal(
        jax.random.key(6), (n, 1)
    )
    best = jnp.array([gain(small), m * (1 - a * gain(small))])
    fisher = jax.vmap(lambda w: jnp.mean(((w - best)[0] * x + (w - best)[1]) ** 2))(
        ws[::10]
    )
    return ws, values, ws[:, 1] / (1 - a * ws[:, 0]), fisher, best


@pytest.mark.parametrize(
    ("mu", "spread", "m", "small"),
    [(3.0, 1.0, 0.0, 0.05), (0.0, 1.0, 3.0, 1.0), (-2.0, 1.0, 1.0, 0.3)],
)
def test_the_path_of_a_gaussian_leads_from_the_teacher_to_the_student(
    x64, gaussian, context, mu, spread, m, small
):
    """Loss and distance to the student's score fall, and the mean that the denoiser implies moves,
    all monotonically.
    """
    ws, losses, means, fisher, best = jax.jit(
        lambda: affine_path(gaussian, context, mu, spread, m, small)
    )()
    assert jnp.all(jnp.diff(losses) <= 1e-12)
    np.testing.assert_allclose(means[0], mu, atol=1e-12)
    # sampling moves the optimum by as much
    assert jnp.all(jnp.diff(means) * np.sign(m - mu) >= -1e-3)
    # five standard deviations of the fit to so many draws
    np.testing.assert_allclose(ws[-1], best, atol=0.08)
    np.testing.assert_allclose(means[-1], m, atol=0.1)
    falling = fisher[fisher > 1e-2 * fisher[0]]
    assert (
        len(falling) > 3
        and jnp.all(jnp.diff(falling) < 0)
        and fisher[-1] < 1e-2 * fisher[0]
    )


def test_recording():
    """Theta stands still; member i is the fake score after i I_1 updates; the loss on fixed draws
    falls along the path.
    """
    host = DisBackDiffInstruct(checkpoints=3, record_every=4)
    method = host.stages(100)[0].method
    before, after, _ = follow(method, 12, members=4, lr=0.05)
    _, shorter, _ = follow(method, 8, members=4, lr=0.05)
    assert (
        same(before.params["student"], after.params["student"])
        and after.count["student"] == 0
    )
    assert same(before.frozen, after.frozen)
    member = lambda state, i: jax.tree.map(lambda w: w[i], state.params["path"])
    assert same(member(after, 0), before.frozen["teacher"])
    assert same(member(after, 3), after.params["fake"])
    assert same(member(after, 2), shorter.params["fake"])
    ctx = Ctx(BATCH, jax.random.key(3), jnp.int32(0), {})

    @jax.jit
    def loss(fake):
        net = SimpleNamespace(
            student=ONE.bind("student", before.params),
            fake=ONE.bind("fake", {"fake": fake}),
        )
        draw = lambda key: dataclasses.replace(ctx, rng=key)
        one = lambda key: (
            host.critic_loss(
                net,
                dataclasses.replace(draw(key), batch=host.simulate(net, draw(key))),
            ).loss
        )
        return jnp.mean(jax.vmap(one)(jax.random.split(ctx.rng, 64)))

    values = [float(loss(member(after, i))) for i in range(4)]
    assert all(b < a for a, b in zip(values, values[1:])), values


def test_a_path_of_another_size_is_refused():
    with pytest.raises(Refused, match="expected a bank of method"):
        follow(
            DisBackDiffInstruct(checkpoints=3).stages(1000)[0].method, 1, members=3
        )


@pytest.mark.parametrize(("n", "interval"), [(10, 1000), (5, 7), (1, 3), (0, 3)])
def test_the_pointer_walks_the_whole_path(n, interval):
    """N - 1 for the first I_2 iterations, then one less at each multiple, 0 from (N - 1) I_2 on; as
    the loop counts it.
    """
    method = DisBackDiffInstruct(checkpoints=n, interval=interval)
    target = jax.jit(jax.vmap(method.target))
    p = max(n - 1, 0)
    wanted = []
    for i in range(n * interval + 20):
        if i > 0 and i % interval == 0:
            p = max(p - 1, 0)
        wanted.append(p)
    found = target(jnp.arange(len(wanted)))
    assert found.dtype == jnp.int32 and found.tolist() == wanted
    assert wanted[-1] == 0 and (n < 2 or wanted.index(0) == (n - 1) * interval)


def test_stages_share_the_steps():
    method = DisBack(checkpoints=10, record_every=100)
    recording, backtracking = method.stages(5000)
    assert (recording.steps, backtracking.steps) == (
        1000,
        4000,
    ) and backtracking.method is method
    assert set(recording.method.inits) == {
        "student",
        "fake",
        "disc",
        "path",
    } and recording.method.frozen == ("teacher",)
    assert set(method.inits) == {"student", "fake", "disc"} and method.frozen == (
        "teacher",
        "path",
    )
    assert [s.steps for s in method.stages(300)] == [300, 0]
    # the host's fields keep the host's values
    assert DisBack().critic_steps == 5 and DisBack().gan_weight == 5e-3


@pytest.mark.full
def test_backtracking_moves_two_roles_and_compiles_once(compilations):
    """While the pointer goes 2, 1, 0 the path keeps its bits, and each pattern of turns stays one
    program.
    """
    path = jax.vmap(ONE.init)(jax.random.split(jax.random.key(3), 4))
    path = jax.tree.map(lambda w: w + 0.05, path)
    method = DisBackDiffInstruct(checkpoints=3, interval=2, critic_steps=2)
    before, after, metrics = follow(
        method, 8, members=4, path=path, fake=jax.tree.map(lambda w: w[3], path)
    )
    assert same(before.frozen, after.frozen) and set(after.params) == {
        "student",
        "fake",
    }
    assert not same(before.params["student"], after.params["student"]) and not same(
        before.params["fake"], after.params["fake"]
    )
    assert compilations["train_step"] == 2
    later = dataclasses.replace(method, interval=100)
    _, _, others = follow(
        later, 4, members=4, path=path, fake=jax.tree.map(lambda w: w[3], path)
    )
    assert (
        metrics[0] == others[0]
        and metrics[2]["student/match"] != others[2]["student/match"]
    )


def test_no_gradient_where_target_and_fake_score_are_one():
    """The fake score starts as the last network; were that the target too, nothing would move."""
    path = jax.tree.map(
        lambda w: w + 0.05,
        jax.vmap(ONE.init)(jax.random.split(jax.random.key(3), 3)),
    )
    params = {
        "student": apart(1),
        "fake": jax.tree.map(lambda w: w[1], path),
        "path": path,
    }
    method = DisBackDiffInstruct(checkpoints=2)  # its first target is member 1
    net = lambda student: SimpleNamespace(
        student=ONE.bind("student", {"student": student}),
        fake=ONE.bind("fake", params),
        path=bank(ONE, 3).bind("path", params),
    )
    ctx = Ctx(
        {**BATCH, "xt": BATCH["x"], "t": jnp.ones(16)},
        jax.random.key(0),
        jnp.int32(0),
        {},
    )
    size = jax.jit(
        lambda student, step: optax.tree.norm(
            jax.grad(
                lambda p: (
                    method.student_loss(
                        net(p), dataclasses.replace(ctx, step=step)
                    ).loss
                )
            )(student)
        )
    )
    assert (
        size(params["student"], jnp.int32(0))
        < 1e-6
        < 1e-3
        < size(params["student"], jnp.int32(method.interval))
    )


def test_the_gradient_after_a_switch_is_the_distance_of_the_targets(
    x64, gaussian, context
):
    """Equal variances, exact fake score, student converged to the last target: |grad| = c |m_{i+1}
    - m_i|.
    """
    means = jnp.array([0.7, 0.5, 0.1, -0.2])
    std = 0.4
    process = Flow()
    a, s = process.alpha_sigma(AT)
    c = s**2 / (a**2 * std**2 + s**2)
    method = DisBackDiffInstruct(checkpoints=4, interval=10, match_times=FIXED)
    ctx = context(
        jnp.zeros((2000, 1)),
        xt=jax.random.normal(jax.random.key(0), (2000, 1)),
        t=jnp.ones(2000),
    )

    def grad(step):
        index = method.target(step)
        here = means[jnp.minimum(index + 1, 3)]
        net = SimpleNamespace(fake=gaussian(process, here, std).denoise)
        net.path = lambda x, t, cond=None, *, member: gaussian(
            process, means[member], std
        ).denoise(x, t)

        def loss(m):
            net.student = lambda x, t, cond=None: process.from_x0(
                here + m + std * x, x, t
            )
            return method.student_loss(
                net, dataclasses.replace(ctx, step=step)
            ).loss

        return jax.grad(loss)(0.0)

    # targets 2, 1, 0
    found = np.array([grad(jnp.int32(step)) for step in (10, 20, 30)])
    np.testing.assert_allclose(
        found, c * np.array([-0.2 - 0.1, 0.1 - 0.5, 0.5 - 0.7]), rtol=1e-6
    )
    np.testing.assert_allclose(-found.sum() / c, 0.7 - -0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("guided_targets", "scales"),
    [(1_000_000, [2.5, 2.5, 2.5]), (1, [1.0, 1.0, 2.5])],
)
def test_which_targets_are_guided(x64, gaussian, context, guided_targets, scales):
    """Conditional mean 1, null mean 0: guidance w makes the mean w."""
    plain = gaussian(Flow(), 0.0, 0.5)
    n = 8

    def path(x, t, cond, member):
        pred = plain.denoise(x, t)
        return dataclasses.replace(pred, x0=pred.x0 + cond[:, None])

    method = DisBackDiffInstruct(
        checkpoints=3, interval=10, guidance=2.5, guided_targets=guided_targets
    )
    xt = jnp.zeros((n, 1))
    t = jnp.full(n, AT)
    read = lambda step: method.real(
        SimpleNamespace(path=path),
        xt,
        t,
        context(xt, step, cond=jnp.ones(n), null_cond=jnp.zeros(n)),
    )
    for step, scale in zip((0, 10, 20), scales, strict=True):
        np.testing.assert_allclose(
            read(step).x0 - plain.denoise(xt, t).x0, scale, rtol=1e-12
        )


def tiny():
    net = dict(model=MLP(width=8, depth=1), denoiser=Denoiser())
    return experiment(
        steps=20,
        checkpoint_every=7,
        log_every=5,
        tensorboard=False,
        mesh=MeshShape(data=1, fsdp=1, tensor=1),
        data=Mixture(batch_size=8, labelled=False),
        method=DisBackDiffInstruct(
            checkpoints=2,
            record_every=4,
            interval=4,
            critic_steps=2,
        ),
        roles=dict(
            teacher=Role(**net, init="random"),
            path=Role(init="teacher", bank=3),
            student=Role(optimizer=Optimizer(lr=1e-2)),
            fake=Role(optimizer=Optimizer(lr=1e-2)),
        ),
    )


@pytest.mark.full
def test_a_run_goes_on_from_its_recorded_path(tmp_path):
    """The path is a result of stage 1, and frozen in stage 2: not in its checkpoints, the same bits
    after resumption.
    """
    loop.run(tiny(), tmp_path / "full", progress=False)
    shutil.copytree(tmp_path / "full", tmp_path / "again")
    for gone in ("report.json", "stages/1", "checkpoints/step_20"):
        path = tmp_path / "again" / gone
        path.unlink() if path.is_file() else shutil.rmtree(path)
    loop.run(tiny(), tmp_path / "again", progress=False)
    full, again = (loop.load(tmp_path / name) for name in ("full", "again"))
    assert set(full.params) == {"teacher", "path", "student", "fake"}
    for role in full.params:
        assert same(full.params[role], again.params[role]), role
    assert same(
        jax.tree.map(lambda w: w[0], full.params["path"]), full.params["teacher"]
    )
    assert not same(
        jax.tree.map(lambda w: w[2], full.params["path"]), full.params["teacher"]
    )
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps)) and steps[-1] == 20
