import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.build import experiment
from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Method, Refused
from jaxdistill.data.language import Carry, Markov
from jaxdistill.data.text import PackedJson
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import LM, context
from jaxdistill.objectives.divergence import ForwardKL, JensenShannon, ReverseKL
from jaxdistill.run.experiment import Experiment, stopping
from jaxdistill.samplers.text import generate
from tools.first_steps import first_steps

RNG = np.random.default_rng(0)
NETS = {
    "teacher": make_net(LM(vocab=7, dim=12, mlp=16, heads=2, depth=2)),
    "student": make_net(LM(vocab=7, dim=8, mlp=8, heads=2, depth=1)),
}
PARAMS = {
    role: jax.tree.map(
        lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype),
        net.shapes,
    )
    for role, net in NETS.items()
}
PROMPT_MASK = jnp.array([[1, 1, 1], [0, 1, 1], [0, 0, 1]], bool)
BATCH = {
    "tokens": jnp.asarray(RNG.integers(0, 7, (3, 8)), jnp.int32),
    "mask": jnp.asarray(np.arange(8) >= 3, jnp.float32)[None].repeat(3, 0),
    "segments": jnp.concatenate(
        [PROMPT_MASK.astype(jnp.int32), jnp.ones((3, 5), jnp.int32)], 1
    ),
    "prompt_mask": PROMPT_MASK,
}
BATCH["prompt"] = BATCH["tokens"][:, :3]


@pytest.mark.parametrize("beta", [0.0, 1e-5, 1.0, 1 - 1e-5])
def test_limits_are_forward_and_reverse_kl(beta):
    with jax.enable_x64(True):
        p, q = (
            jnp.asarray(np.random.default_rng(i).standard_normal((3, 8, 7)))
            for i in range(2)
        )
        nets = SimpleNamespace(
            teacher=lambda tokens, **_: p, student=lambda tokens, **_: q
        )
        loss = lambda method: float(
            method.loss(nets, Ctx(BATCH, jax.random.key(0), 0, {})).loss
        )
        expected = loss(KD(divergence=ReverseKL() if beta > 0.5 else ForwardKL()))
        scale = 1.0 if beta in (0, 1) else min(beta, 1 - beta)
        np.testing.assert_allclose(
            loss(GKD(divergence=JensenShannon(beta=beta))) / scale,
            expected,
            rtol=1e-4,
        )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_batches_that_the_student_writes(share):
    method = GKD(on_policy=share)
    written = np.array([method.turns[0].when(step) for step in range(4000)])
    given = np.array([method.turns[1].when(step) for step in range(4000)])
    assert (written ^ given).all()
    assert abs(written.mean() - share) <= 5 * np.sqrt(share * (1 - share) / 4000)
    if 0 < share < 1:  # successive draws are independent
        pairs = (written[1:] & written[:-1]).mean()
        assert abs(pairs - share**2) <= 5 * np.sqrt(share**2 / 4000)


def rollout(method, batch=BATCH):
    ctx = Ctx(batch, jax.random.key(5), 0, {})
    return jax.jit(lambda params: method.rollout(bind(NETS, params), ctx))(PARAMS)


@pytest.fixture(scope="module")
def greedy():
    return rollout(GKD(sample_temperature=0.0))


def test_the_student_writes_after_the_prompt(greedy):
    net = functools.partial(NETS["student"].apply, PARAMS["student"])
    tokens, _ = jax.jit(
        lambda: generate(
            net,
            BATCH["prompt"],
            8,
            jax.random.key(0),
            prompt_mask=PROMPT_MASK,
            temperature=0.0,
        )
    )()
    np.testing.assert_array_equal(greedy["tokens"], tokens)
    np.testing.assert_array_equal(greedy["mask"], BATCH["mask"])
    np.testing.assert_array_equal(greedy["segments"], BATCH["segments"])
    np.testing.assert_array_equal(
        greedy["positions"],
        [
            [0, 1, 2, 3, 4, 5, 6, 7],
            [0, 0, 1, 2, 3, 4, 5, 6],
            [0, 0, 0, 1, 2, 3, 4, 5],
        ],
    )


def test_its_argmax_is_what_the_loss_sees(greedy):
    """The full pass of the loss and the cached pass of the rollout agree on the student."""
    logits = jax.jit(
        lambda p: NETS["student"].apply(p, greedy["tokens"], **context(greedy))
    )(PARAMS["student"])
    np.testing.assert_array_equal(
        jnp.argmax(logits, -1)[:, 2:-1], greedy["tokens"][:, 3:]
    )


def test_nothing_counts_after_eos(greedy):
    eos = int(greedy["tokens"][0, 4])
    batch = rollout(GKD(sample_temperature=0.0, eos=(eos,), pad=6))
    for row in range(3):
        written = np.asarray(greedy["tokens"][row, 3:])
        stop = 3 + int(np.argmax(written == eos)) if eos in written else 7
        np.testing.assert_array_equal(
            batch["tokens"][row, : stop + 1], greedy["tokens"][row, : stop + 1]
        )
        assert (batch["tokens"][row, stop + 1 :] == 6).all()
        for name in ("mask", "segments"):
            assert (
                not batch[name][row, stop + 1 :].any()
                and batch[name][row, 3 : stop + 1].all()
            )
    assert not batch["mask"][0, 5:].any()


def test_rows_of_text_are_cut_into_prompts():
    batch = rollout(
        GKD(prompt_length=2), {"tokens": BATCH["tokens"], "mask": BATCH["mask"]}
    )
    np.testing.assert_array_equal(batch["tokens"][:, :2], BATCH["tokens"][:, :2])
    np.testing.assert_array_equal(
        batch["mask"], jnp.asarray(np.arange(8) >= 2)[None].repeat(3, 0)
    )
    with pytest.raises(
        Refused, match=r"method.prompt_length=0: the data has no prompts"
    ):
        rollout(GKD(), {"tokens": BATCH["tokens"], "mask": BATCH["mask"]})


def train(method, steps, tx):
    states, metrics = first_steps(method, NETS, tx, PARAMS, BATCH, steps)
    return states[-1], [row["student/loss"] for row in metrics]


def test_no_gradient_through_sampling():
    """One step of plain descent on a written batch moves the student by the gradient on that batch
    as given text.
    """
    method = GKD(on_policy=1.0)
    state, _ = train(method, 1, optax.sgd(1.0))
    ctx = Ctx(
        BATCH,
        jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 0),
        0,
        {},
    )

    def gradient(params):
        batch = method.rollout(bind(NETS, params), ctx)
        loss = lambda p: method.loss(
            bind(NETS, {**params, "student": p}), Ctx(batch, ctx.rng, 0, {})
        )
        grads = jax.grad(lambda p: loss(p).loss)(params["student"])
        return jax.tree.map(lambda g: g / loss(params["student"]).count, grads)

    expected = jax.tree.map(
        jnp.subtract, PARAMS["student"], jax.jit(gradient)(PARAMS)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        state.params["student"],
        expected,
    )


def test_five_steps_of_both_kinds(compilations):
    state, losses = train(GKD(on_policy=0.5), 5, optax.adam(1e-2))
    assert {GKD(on_policy=0.5).is_on_policy(i) for i in range(5)} == {True, False}
    assert compilations["train_step"] == 2 and np.isfinite(losses).all()
    jax.tree.map(
        np.testing.assert_array_equal, state.frozen["teacher"], PARAMS["teacher"]
    )
    assert any(
        (a != b).any()
        for a, b in zip(
            jax.tree.leaves(state.params["student"]),
            jax.tree.leaves(PARAMS["student"]),
        )
    )


def test_without_its_own_writing_it_is_kd():
    a, losses = train(
        GKD(on_policy=0.0, divergence=JensenShannon(beta=0.3)), 3, optax.sgd(0.1)
    )
    b, others = train(KD(divergence=JensenShannon(beta=0.3)), 3, optax.sgd(0.1))
    np.testing.assert_allclose(losses, others, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        a.params["student"],
        b.params["student"],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Method):
    inner: Method


@pytest.mark.parametrize("eos", [(), (3,), (-1,)])
def test_it_stops_at_the_datas_end_token_by_default(eos, tmp_path):
    """Also where it is the host of another method; a method that names tokens keeps them, and data
    without one changes nothing.
    """
    make = lambda data, method: (
        Experiment(experiment(data=data, method=method, roles={}), tmp_path).method
    )
    gkd = GKD(eos=eos, pad=0)
    carry = Carry()
    markov = Markov()
    assert (make(carry, gkd).eos, make(carry, gkd).pad) == (
        eos or (12,),
        0 if eos else 13,
    )
    (tmp_path / "a.jsonl").write_text("")
    made = make(PackedJson(path=str(tmp_path / "a.jsonl")), gkd)
    assert (made.eos, made.pad) == (eos or (258,), 0 if eos else 256)
    assert make(markov, gkd) == gkd
    inside = stopping(Outer(inner=gkd), lambda: carry)
    assert inside.inner.eos == (eos or (12,)) and type(inside) is Outer
