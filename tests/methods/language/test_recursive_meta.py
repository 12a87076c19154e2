import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.language.recursive_meta import RecursiveMeta
from jaxdistill.models.language.lm import LM
from tools.first_steps import first_steps

RNG = np.random.default_rng(0)
NETS = {
    role: make_net(LM(vocab=7, dim=dim, mlp=8, heads=2, depth=1))
    for role, dim in (("teacher", 12), ("teacher1", 8), ("student", 8))
}
PARAMS = {
    role: jax.tree.map(
        lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype),
        net.shapes,
    )
    for role, net in NETS.items()
}
BATCH = {
    "tokens": jnp.asarray(RNG.integers(0, 7, (3, 6))),
    "mask": jnp.ones((3, 6)),
}
LAW = {
    role: jax.nn.log_softmax(net.apply(PARAMS[role], BATCH["tokens"]))
    for role, net in NETS.items()
}
KL = lambda p, q: float(jnp.sum((jnp.exp(p) * (p - q))[:, :-1]))


def promoted(method, times=1):
    nets = NETS
    params = PARAMS
    for _ in range(times):
        nets, params = method.promote(
            nets, {**params, "student": PARAMS["student"]}, BATCH
        )
    return nets, params


def loss(method, nets=NETS, params=PARAMS):
    run = lambda params: method.loss(
        bind(nets, params), Ctx(BATCH, jax.random.key(0), 0, {})
    )
    return jax.jit(run)(params)


def stage(generation, **fields):
    method = RecursiveMeta(**fields)
    return method.stages(60)[generation].method


@pytest.mark.parametrize("pool", ["linear", "geometric"])
def test_target_is_the_base_and_the_last_student(pool):
    method = stage(1, gamma=(0.25,), pool=pool, restart=False)
    nets, params = promoted(method)
    other = jax.tree.map(lambda w: w + 0.1, PARAMS["student"])
    out = loss(method, nets, {**params, "student": other})
    now = jax.nn.log_softmax(NETS["student"].apply(other, BATCH["tokens"]))
    if pool == "linear":
        meta = jnp.log(
            0.25 * jnp.exp(LAW["teacher"]) + 0.75 * jnp.exp(LAW["student"])
        )
    else:
        meta = jax.nn.log_softmax(0.25 * LAW["teacher"] + 0.75 * LAW["student"])
    np.testing.assert_allclose(out.loss, KL(meta, now), rtol=1e-4)
    np.testing.assert_allclose(
        out.metrics["base_kl"], KL(LAW["teacher"], now), rtol=1e-4
    )


def test_a_student_that_realises_its_target_has_nothing_to_learn_without_an_anchor():
    method = stage(1, gamma=(0.0,), restart=False)
    assert abs(loss(method, *promoted(method)).loss) <= 1e-5


@pytest.mark.parametrize("generation", [0, 1])
def test_alone_the_base_makes_it_kd(generation):
    """Generation 0, and gamma = 1 later: five steps follow KD's."""
    method = stage(generation, gamma=(1.0,), restart=False)
    nets, params = promoted(method) if generation else (NETS, PARAMS)

    def train(method, nets, params):
        states, metrics = first_steps(method, nets, optax.adam(1e-2), params, BATCH)
        return [row["student/loss"] for row in metrics], states[-1].params[
            "student"
        ]

    mine = train(method, nets, params)
    theirs = train(KD(), NETS, PARAMS)
    np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), mine[1], theirs[1]
    )


def test_window_keeps_the_newest_students():
    method = stage(3, history=(0.6, 0.4))
    nets, params = promoted(method, 3)
    assert len(nets["teacher"].members) == 3 and set(params["teacher"]) == {
        "0",
        "1",
        "2",
    }
    marked = [
        jax.tree.map(lambda w, k=k: w + k, PARAMS["student"]) for k in range(3)
    ]
    nets = NETS
    params = PARAMS
    for student in marked:
        nets, params = method.promote(nets, {**params, "student": student}, BATCH)
    jax.tree.map(
        np.testing.assert_array_equal,
        params["teacher"],
        {"0": PARAMS["teacher"], "1": marked[2], "2": marked[1]},
    )
    assert "student" not in params  # fresh weights
    assert (
        "student"
        in dataclasses.replace(method, restart=False).promote(NETS, PARAMS, BATCH)[
            1
        ]
    )


def test_schedule_of_the_anchor():
    method = RecursiveMeta(gamma=(0.5, 0.2), generations=4)
    used = []
    mixed = lambda g: jnp.logaddexp(
        LAW["teacher"] + np.log(g), LAW["student"] + np.log1p(-g)
    )
    for s in method.stages(50)[1:]:
        nets, params = promoted(s.method)
        out = loss(s.method, nets, {**params, "student": PARAMS["student"]})
        used += [
            g
            for g in (0.5, 0.2)
            if np.isclose(out.loss, KL(mixed(g), LAW["student"]), rtol=1e-4)
        ]
    assert used == [0.5, 0.2, 0.2, 0.2]
    assert [s.steps for s in method.stages(52)] == [11, 11, 10, 10, 10]


def test_several_teachers_are_pooled():
    method = stage(0, teachers=(0.25, 0.75))
    assert method.frozen == ("teacher", "teacher1")
    base = jnp.log(0.25 * jnp.exp(LAW["teacher"]) + 0.75 * jnp.exp(LAW["teacher1"]))
    np.testing.assert_allclose(
        loss(method).loss, KL(base, LAW["student"]), rtol=1e-4
    )


def test_refusals():
    for fields, message in [
        (dict(gamma=(1.2,)), r"method.gamma=\(1.2,\)"),
        (dict(history=()), r"method.history=\(\)"),
        (dict(chunk=4), r"method.chunk=4"),
        (dict(pool="linar"), r"method.pool='linar': did you mean 'linear'"),
    ]:
        with pytest.raises(Refused, match=message):
            RecursiveMeta(**fields)
