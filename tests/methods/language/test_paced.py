import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data import arrayrecord
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.language.paced import Paced, SelfPaced
from jaxdistill.models.language.lm import LM, context
from jaxdistill.objectives.divergence import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    sequence_mean,
    token_divergence,
)
from jaxdistill.objectives.pacing import signal_to_noise
from jaxdistill.objectives.schedule import Linear
from jaxdistill.samplers.prompts import solution_first
from jaxdistill.samplers.text import respond
from tools.first_steps import first_steps

RNG = np.random.default_rng(0)
P, Q = (jnp.asarray(RNG.standard_normal((3, 6, 7)), jnp.float32) for _ in range(2))
BATCH = {
    "tokens": jnp.asarray(RNG.integers(0, 7, (3, 6)), jnp.int32),
    "mask": jnp.array(
        [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]], jnp.float32
    ),
    "weight": jnp.array([0.5, 2.0, 0.0]),
}


def loss(method, student=Q, teacher=P, batch=BATCH):
    nets = SimpleNamespace(
        teacher=lambda tokens, **_: teacher, student=lambda tokens, **_: student
    )
    return method.loss(nets, Ctx(batch, jax.random.key(0), 0, {}))


@pytest.mark.parametrize("kind", [ForwardKL(), ReverseKL(), JensenShannon()])
def test_weights_multiply_the_responses_mean_divergence(kind):
    method = Paced(divergence=kind)
    mask = BATCH["mask"][:, 1:] > 0
    each = lambda z: sequence_mean(token_divergence(kind, P, z)[:, :-1], mask)
    out = loss(method)
    np.testing.assert_allclose(
        out.loss, jnp.sum(BATCH["weight"] * each(Q)), rtol=1e-6
    )
    assert out.count == 3
    rows = jax.jacobian(each)(Q)
    grad = jax.grad(lambda z: loss(method, z).loss)(Q)
    np.testing.assert_allclose(
        grad, jnp.einsum("b,bxyz->xyz", BATCH["weight"], rows), atol=1e-6
    )
    assert not jax.grad(lambda w: loss(method, batch={**BATCH, "weight": w}).loss)(
        BATCH["weight"]
    ).any()


def test_weights_are_capped():
    capped = loss(Paced(most=1.0)).loss
    np.testing.assert_allclose(
        capped,
        loss(Paced(), batch={**BATCH, "weight": jnp.array([0.5, 1.0, 0.0])}).loss,
        rtol=1e-6,
    )


@pytest.mark.parametrize("kind", [ForwardKL(), ReverseKL()])
def test_nothing_to_learn_from_an_equal_teacher(kind):
    value, grad = jax.value_and_grad(
        lambda z: loss(Paced(divergence=kind), z, P + 2).loss
    )(P)
    assert abs(value) <= 1e-6 and jnp.abs(grad).max() <= 1e-6


def test_a_solved_choice_gives_no_signal():
    """Two tokens, a teacher that is certain: the forward KL's gradient in the logit is q - 1."""
    z = jnp.linspace(-6, 12, 10)
    student = lambda z: jnp.stack([z, 0 * z], -1)[:, None].repeat(2, 1)
    teacher = student(jnp.full(10, 80.0))
    batch = {"tokens": jnp.zeros((10, 2), int), "mask": jnp.ones((10, 2))}
    grad = jax.grad(lambda z: loss(Paced(), student(z), teacher, batch).loss)(z)
    np.testing.assert_allclose(-grad, 1 - jax.nn.sigmoid(z), atol=1e-6)


def test_equal_lengths_and_weights_are_plain_distillation():
    plain = {**BATCH, "mask": jnp.ones((3, 6)), "weight": jnp.ones(3)}
    paced, kd = (loss(m, batch=plain) for m in (Paced(a=0.0, b=0.0), KD()))
    np.testing.assert_allclose(
        paced.loss / paced.count, kd.loss / kd.count, rtol=1e-6
    )


def test_stages():
    first, second = Paced(batches=7).stages(11)
    assert (first.steps, second.steps) == (
        6,
        5,
    ) and first.collect.batches == second.collect.batches == 7
    assert (first.method.divergence, first.method.reference) == (
        ForwardKL(),
        "teacher",
    )
    assert (second.method.divergence, second.method.reference) == (
        ReverseKL(),
        "student",
    )
    assert [t.when(0) for t in first.method.turns] == [False, True] and [
        t.when(0) for t in second.method.turns
    ] == [True, False]
    one = Paced(
        divergences=(JensenShannon(beta=0.9),), references=("dataset",)
    ).stages(4)
    assert len(one) == 1 and one[0].method.divergence == JensenShannon(beta=0.9)


def fixed(*rows):
    """A model that writes these rows, whatever it is asked: one for each prompt, which is its
    number.
    """
    table = jnp.asarray(rows)

    def net(tokens, *_, cache=None, method="__call__", **__):
        if method == "init_cache":
            return {"at": 0, "row": None}
        row = tokens[:, 0] if cache["row"] is None else cache["row"]
        at = cache["at"]
        return 40.0 * jax.nn.one_hot(table[row, at], 7)[:, None], {
            "at": at + 1,
            "row": row,
        }

    return net


PROBLEMS = {
    "tokens": jnp.array([[0, 3, 6], [1, 4, 6], [2, 5, 6]]),
    "mask": jnp.array([[0.0, 1, 1]] * 3),
    "prompt": jnp.array([[0], [1], [2]]),
}


def coin(tokens, *_, cache=None, method="__call__", **__):
    """Writes 3 or 4 with equal chance, then 6."""
    if method == "init_cache":
        return {"at": jnp.int32(0)}
    law = jnp.where(
        cache["at"] == 0,
        jnp.log(jnp.array([1e-9, 1e-9, 1e-9, 0.5, 0.5, 1e-9, 1e-9])),
        40.0 * jax.nn.one_hot(6, 7),
    )
    return jnp.broadcast_to(law, (len(tokens), 1, 7)), {"at": cache["at"] + 1}


@pytest.mark.parametrize("reference", ["teacher", "student", "dataset"])
def test_what_is_measured(reference):
    """The coin solves problems 0 and 1 half of the time, and never problem 2."""
    method = Paced(attempts=64, reference=reference)
    nets = SimpleNamespace(student=coin, teacher=fixed([1, 6], [2, 6], [3, 6]))
    batch = method.measure(nets, Ctx(PROBLEMS, jax.random.key(0), jnp.int32(0), {}))
    rate = np.asarray(batch["pass_rate"])
    assert rate[2] == 0 and (abs(rate[:2] - 0.5) <= 5 * 0.5 / 8).all()
    np.testing.assert_allclose(batch["worth"], rate * (1 - rate), rtol=1e-6)
    assert not batch["failed"].any()
    expected = (
        [[0, 1, 6], [1, 2, 6], [2, 3, 6]]
        if reference == "teacher"
        else PROBLEMS["tokens"]
    )
    np.testing.assert_array_equal(batch["tokens"], expected)
    if reference == "teacher":
        np.testing.assert_array_equal(batch["answer"], PROBLEMS["tokens"])


def pool(folder, worth):
    grads = np.random.default_rng(1).standard_normal(len(worth))
    arrayrecord.write(
        folder / "a.arrayrecord",
        (
            {"worth": np.float32(w), "grad": np.float32(g)}
            for w, g in zip(worth, grads)
        ),
    )
    return grads


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_a_pool_is_filtered_and_weighted(tmp_path, memory):
    """Over the kept records the mean weight is 1, and the expected gradient is that of the whole
    pool with its own mean.
    """
    worth = np.array([0.0, 0.25, 0.1, 0.0, 0.0, 0.05, 0.2, 0.0])
    grads = pool(tmp_path, worth)
    data = arrayrecord.stored(tmp_path, batch_size=4, seed=0, memory=memory)
    batch = next(data.loader())
    np.testing.assert_allclose(
        np.sort(batch["weight"]),
        np.sort(worth[worth > 0] / worth[worth > 0].mean()),
        rtol=1e-6,
    )
    np.testing.assert_allclose(batch["weight"].mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(
        np.mean(batch["weight"] * batch["grad"]),
        np.mean(worth / worth.mean() * grads),
        rtol=1e-5,
    )
    (tmp_path / "scaled").mkdir()
    pool(tmp_path / "scaled", 7 * worth)
    again = next(
        arrayrecord.stored(
            tmp_path / "scaled", batch_size=4, seed=0, memory=memory
        ).loader()
    )
    np.testing.assert_allclose(again["weight"], batch["weight"], rtol=1e-6)
    assert data.spec()["weight"].shape == (4,)


def test_a_pool_without_worth_is_uniform(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda message, *args: lines.append(message % args)
    )
    pool(tmp_path, np.zeros(8))
    batch = next(arrayrecord.stored(tmp_path, batch_size=8, seed=0).loader())
    assert (
        (batch["weight"] == 1).all()
        and len(lines) == 1
        and "no record is worth anything" in lines[0]
    )


NETS = dict.fromkeys(
    ("teacher", "student"), make_net(LM(vocab=7, dim=8, mlp=8, heads=2, depth=1))
)
PARAMS = {
    role: jax.tree.map(
        lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype),
        net.shapes,
    )
    for role, net in NETS.items()
}


def train(method, batch, steps=5):
    states, metrics = first_steps(
        method, NETS, optax.sgd(0.1), PARAMS, batch, steps
    )
    return [row["student/loss"] for row in metrics], states[-1].params["student"]


def test_uniform_weights_follow_the_host():
    """GKD on its own writing, where all responses are equally long."""
    batch = {
        "tokens": BATCH["tokens"],
        "mask": BATCH["mask"],
        "prompt": BATCH["tokens"][:, :2],
    }
    paced = train(Paced(divergence=JensenShannon(), reference="student"), batch)
    gkd = train(GKD(on_policy=1.0), batch)
    np.testing.assert_allclose(paced[0], gkd[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        paced[1],
        gkd[1],
    )


@pytest.mark.parametrize("kind", [ForwardKL(), ReverseKL(), JensenShannon()])
def test_chunks_change_nothing(kind):
    whole = Paced(divergence=kind)
    run = lambda m: jax.jit(
        lambda: (
            m.loss(bind(NETS, PARAMS), Ctx(BATCH, jax.random.key(0), 0, {})).loss
        )
    )()
    np.testing.assert_allclose(
        run(dataclasses.replace(whole, chunk=3)), run(whole), rtol=1e-6, atol=1e-6
    )


def test_exponents_0_keep_every_problem():
    """0^0 = 1, so that those which are never or always solved stay in the pool, with weight 1."""
    np.testing.assert_array_equal(
        Paced(a=0.0, b=0.0).worth(jnp.array([0.0, 0.5, 1.0])), 1
    )
    np.testing.assert_allclose(
        Paced().worth(jnp.array([0.0, 0.5, 1.0])), [0, 0.25, 0]
    )


def test_the_end_of_a_response_is_learnt_and_nothing_after_it():
    """A student that writes one token and the end, on rows with room for three: two targets a row,
    the end among them.
    """
    data = {
        "tokens": jnp.zeros((3, 5), int),
        "mask": jnp.ones((3, 5)),
        "prompt": jnp.zeros((3, 2), int),
    }
    method = Paced(reference="student", divergence=ReverseKL(), eos=(6,))
    nets = SimpleNamespace(student=coin)
    batch = method.rollout(nets, Ctx(data, jax.random.key(0), 0, {}))
    np.testing.assert_array_equal(batch["mask"], [[0, 0, 1, 1, 0]] * 3)
    each = lambda z: token_divergence(ReverseKL(), P[:, :5], z)[:, 1:3].mean(1)
    np.testing.assert_allclose(
        loss(method, Q[:, :5], P[:, :5], batch).loss,
        each(Q[:, :5]).sum(),
        rtol=1e-6,
    )


def test_a_student_without_weights_is_measured_as_it_begins():
    surgery = Paced().stages(2)[0].surgery
    _, params = surgery(NETS, {"teacher": PARAMS["teacher"]}, {})
    assert jax.tree.map(jnp.shape, params["student"]) == jax.tree.map(
        jnp.shape, PARAMS["student"]
    )
    assert (
        surgery(NETS, PARAMS, {})[1]["student"] is PARAMS["student"]
        and Paced().stages(2)[1].surgery is None
    )


def test_refusals():
    with pytest.raises(Refused, match="one of each for every stage"):
        Paced(divergences=(JensenShannon(),))
    with pytest.raises(
        Refused, match="'techer', expected teacher, student or dataset"
    ):
        Paced(references=("techer", "student"))
    with pytest.raises(Refused, match=r"a=-1"):
        Paced(a=-1.0)
    with pytest.raises(
        Refused,
        match="expected 'student', for a teacher that has read the solution",
    ):
        SelfPaced(references=("dataset",))


SOLVED = {  # prompts of 2 and 1 tokens, solutions of 2, 1 and 0, responses of 1, 3 and 2
    "tokens": jnp.array([[1, 2, 3, 6, 0], [0, 4, 5, 1, 6], [2, 5, 3, 6, 0]]),
    "mask": jnp.array([[0.0, 0, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 0]]),
    "segments": jnp.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
    "positions": jnp.array([[0, 1, 2, 2, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3]]),
    "prompt": jnp.array([[1, 2], [0, 4], [2, 5]]),
    "prompt_mask": jnp.array([[1, 1], [0, 1], [1, 1]], bool),
    "answer": jnp.array([[1, 2, 5, 6, 0], [0, 4, 6, 0, 0], [2, 5, 1, 1, 1]]),
    "answer_mask": jnp.array([[0.0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]),
}
# what the teacher reads, and the response
SEEN = [
    ([1, 2, 5, 6, 1, 2], [3]),
    ([4, 6, 4], [5, 1, 6]),
    ([2, 5], [3, 6]),
]


def counting(tokens, segments, positions, **_):
    """A network whose answer at a token depends on its position and on the order of all that is
    visible before it.
    """
    real = segments > 0
    step = lambda state, x: (
        (jnp.where(x[1], 0.7 * state + jnp.sin(1.0 + x[0]), state),) * 2
    )
    _, states = jax.lax.scan(step, jnp.zeros(len(tokens)), (tokens.T, real.T))
    return jnp.sin(states.T[..., None] * jnp.arange(1, 8) + positions[..., None])


@pytest.mark.parametrize("kind", ["counting", "attention"])
def test_responses_keep_their_places_after_the_solution(kind):
    """At every target the teacher's law is that of the tokens in a row, without padding."""
    net = (
        counting
        if kind == "counting"
        else lambda tokens, **how: NETS["teacher"].apply(
            PARAMS["teacher"], tokens, **how
        )
    )
    shown = solution_first(SOLVED)
    logits = net(shown["tokens"], **context(shown))[:, -5:]
    for row, (before, response) in enumerate(SEEN):
        tokens = jnp.array([before + response])
        plain = net(
            tokens,
            segments=jnp.ones_like(tokens),
            positions=jnp.arange(tokens.shape[1])[None],
        )[0]
        np.testing.assert_allclose(
            logits[row, 1 : 1 + len(response)],
            plain[len(before) - 1 : -1],
            rtol=1e-5,
            atol=1e-5,
        )
    np.testing.assert_array_equal(shown["mask"][:, -5:], SOLVED["mask"])
    assert not shown["mask"][:, :-5].any()


def test_the_solution_is_the_datas_own():
    """Before and after the student has written over it; without prompts of its own a row opens with
    one.
    """
    data = {"tokens": SOLVED["answer"], "mask": SOLVED["answer_mask"]}
    written = respond(coin, data, jax.random.key(0), prompt_length=2)
    for batch in (data, written):
        shown = solution_first(batch, 2)
        # T + P = 7 columns, one of them padding
        np.testing.assert_array_equal(shown["tokens"][0, 1:7], [1, 2, 5, 6, 1, 2])
        np.testing.assert_array_equal(shown["prompt_mask"][:, 0], [False] * 3)
        np.testing.assert_array_equal(shown["prompt_mask"].sum(1), [6, 5, 2])
        np.testing.assert_array_equal(
            shown["tokens"][:, 7:], batch["tokens"][:, 2:]
        )


@pytest.mark.parametrize("chunk", [0, 3])
def test_without_a_solution_the_teacher_is_the_plain_one(chunk):
    nothing = {
        **SOLVED,
        "answer_mask": jnp.zeros((3, 5)),
        "weight": BATCH["weight"],
    }
    run = lambda method, batch: (
        method.loss(bind(NETS, PARAMS), Ctx(batch, jax.random.key(0), 0, {})).loss
    )
    plain = run(Paced(divergence=ReverseKL(), chunk=chunk), nothing)
    np.testing.assert_allclose(
        run(SelfPaced(chunk=chunk), nothing), plain, rtol=1e-5
    )
    assert (
        abs(
            run(SelfPaced(chunk=chunk), {**SOLVED, "weight": BATCH["weight"]})
            - plain
        )
        > 1e-3
    )


@pytest.mark.parametrize("kind", [ForwardKL(), ReverseKL(), JensenShannon()])
def test_a_student_that_needs_no_solution_learns_nothing(kind):
    """Its law equals the one of the teacher that reads it."""
    shown = solution_first(SOLVED)
    told = counting(shown["tokens"], **context(shown))

    def value(z):
        nets = SimpleNamespace(
            teacher=lambda tokens, **_: told, student=lambda tokens, **_: z
        )
        return (
            SelfPaced(divergence=kind)
            .loss(nets, Ctx(SOLVED, jax.random.key(0), 0, {}))
            .loss
        )

    loss, grad = jax.value_and_grad(value)(told[:, -5:])
    assert abs(loss) <= 1e-6 and jnp.abs(grad).max() <= 1e-6


def test_schedules_reach_the_loss_of_self_distillation():
    value = lambda beta: (
        SelfPaced(divergence=JensenShannon(beta=beta))
        .loss(
            bind(NETS, PARAMS),
            Ctx({**SOLVED, "weight": BATCH["weight"]}, jax.random.key(0), 5, {}),
        )
        .loss
    )
    np.testing.assert_allclose(
        value(Linear(start=0.0, end=0.8, steps=10)), value(0.4), rtol=1e-6
    )


def test_self_distillation_starts_from_the_teacher():
    surgery = SelfPaced().stages(2)[0].surgery
    _, params = surgery(NETS, {"teacher": PARAMS["teacher"]}, {})
    jax.tree.map(
        np.testing.assert_array_equal, params["student"], PARAMS["teacher"]
    )
    assert surgery(NETS, PARAMS, {})[1]["student"] is PARAMS["student"]
    assert SelfPaced.inits == {"student": "teacher"} and SelfPaced().is_on_policy(0)


@pytest.mark.full
@pytest.mark.parametrize("method", [Paced(), SelfPaced()])
def test_the_probe_is_of_each_problems_own_gradient(method):
    """By hand: one gradient of the unweighted loss after another, binned by pass rate."""
    twice = {k: jnp.concatenate([v, v]) for k, v in SOLVED.items()}
    tokens = twice["tokens"].at[3:, 2].set(4)
    batch = {
        **twice,
        "tokens": tokens,
        "pass_rate": jnp.array([0.0, 0.1, 0.5, 0.6, 0.5, 1.0]),
        "weight": jnp.arange(6.0),
    }

    @jax.jit
    def gradient(row):
        def value(student):
            bound = bind(NETS, {**PARAMS, "student": student})
            return method.loss(bound, Ctx(row, jax.random.key(0), 0, {})).loss

        parts = jax.tree.leaves(jax.grad(value)(PARAMS["student"]))
        return jnp.concatenate([x.ravel() for x in parts])

    problem = lambda i: {k: v[i : i + 1] for k, v in batch.items() if k != "weight"}
    every = [gradient(problem(i)) for i in range(6)]
    snr, count = jax.jit(lambda p: method.snr(NETS, p, batch, bins=4))(PARAMS)
    np.testing.assert_array_equal(count, [2, 0, 3, 1])
    plain = [
        signal_to_noise(jnp.stack([every[i] for i in bin]))
        for bin in ([0, 1], [2, 3, 4])
    ]
    expected = [(plain[0] - 1) / 2, (2 * plain[1] - 1) / 3]
    np.testing.assert_allclose(snr[jnp.array([0, 2])], expected, rtol=1e-4)
    assert np.isnan(snr[jnp.array([1, 3])]).all()
