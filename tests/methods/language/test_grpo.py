import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.methods.language.grpo import GRPO
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.reward import Share, Verified
from tools.first_steps import first_steps

RNG = np.random.default_rng(0)
NET = make_net(LM(vocab=7, dim=8, mlp=8, heads=2, depth=1))
ROLES = ("student", "old", "reference")
PARAMS = {
    role: jax.tree.map(
        lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype),
        NET.shapes,
    )
    for role in ROLES
}
TOKENS = jnp.asarray(RNG.integers(0, 7, (2, 8)), jnp.int32)
BATCH = {
    "tokens": TOKENS,
    "mask": jnp.tile(jnp.float32(np.arange(8) >= 3), (2, 1)),
    "prompt": TOKENS[:, :3],
}
METHOD = GRPO(reward=Share(), group=4, updates=2, eos=(6,))


def ctx(batch, step=0):
    return Ctx(batch, jax.random.key(5), jnp.int32(step), {})


@pytest.fixture(scope="module")
def record():
    return jax.jit(
        lambda params: METHOD.rollout(
            bind(dict.fromkeys(ROLES, NET), params), ctx(BATCH)
        )
    )(PARAMS)


def test_what_a_rollout_carries(record):
    assert (
        record["tokens"].shape == (8, 8)
        and (record["group"] == jnp.repeat(jnp.arange(2), 4)).all()
    )
    np.testing.assert_array_equal(
        record["tokens"][:, :3], jnp.repeat(TOKENS[:, :3], 4, 0)
    )
    # the responses of a group differ
    assert len({tuple(row) for row in np.asarray(record["tokens"][:4])}) > 1
    for role in ("old", "reference"):
        logits = jax.jit(NET.apply)(
            PARAMS[role],
            record["tokens"],
            segments=record["segments"],
            positions=record["positions"],
        )
        each = jnp.take_along_axis(
            jax.nn.log_softmax(logits)[:, :-1], record["tokens"][:, 1:, None], -1
        )[..., 0]
        real = np.asarray(record["mask"][:, 1:] > 0)
        np.testing.assert_allclose(
            record[f"log_{role}"][real], each[real], rtol=1e-5, atol=1e-5
        )
    hit = (record["tokens"] == jnp.repeat(TOKENS, 4, 0)) & (record["mask"] > 0)
    np.testing.assert_allclose(record["reward"], hit.sum(1) / 5, rtol=1e-6)
    r = np.asarray(record["reward"]).reshape(2, 4)
    expected = (r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(record["advantage"], expected.ravel(), atol=1e-5)


def test_the_standard_deviation_that_peers_take(record):
    """TRL's: over group - 1, and 1e-4 beside it."""
    method = dataclasses.replace(METHOD, ddof=1, std_eps=1e-4)
    again = jax.jit(
        lambda params: method.rollout(
            bind(dict.fromkeys(ROLES, NET), params), ctx(BATCH)
        )
    )(PARAMS)
    r = np.asarray(record["reward"]).reshape(2, 4)
    expected = (r - r.mean(1, keepdims=True)) / (
        r.std(1, ddof=1, keepdims=True) + 1e-4
    )
    np.testing.assert_allclose(again["advantage"], expected.ravel(), atol=1e-5)
    for bad in ({"ddof": 2}, {"std_eps": 0.0}):
        with pytest.raises(
            Refused,
            match=r"method\.ddof=.*, method\.std_eps=.*: expected 0 or 1, and a number above 0",
        ):
            GRPO(**bad)


def scripted(logits):
    """Networks that say these logits whatever they are asked."""
    return SimpleNamespace(student=lambda tokens, **_: logits)


@pytest.fixture(scope="module")
def logits():
    return jnp.asarray(RNG.standard_normal((8, 8, 7)), jnp.float32)


def test_equation_3(record, logits):
    method = dataclasses.replace(METHOD, kl_weight=0.3, clip_low=0.1, clip_high=0.5)
    out = method.loss(scripted(logits), ctx(record))
    log_q = jnp.take_along_axis(
        jax.nn.log_softmax(logits)[:, :-1], record["tokens"][:, 1:, None], -1
    )[..., 0]
    log_q, old, ref, mask = (
        np.asarray(x, np.float64)
        for x in (
            log_q,
            record["log_old"],
            record["log_reference"],
            record["mask"][:, 1:],
        )
    )
    ratio = np.exp(log_q - old)
    advantage = np.asarray(record["advantage"], np.float64)[:, None]
    gain = np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.5) * advantage)
    kl = np.exp(ref - log_q) - (ref - log_q) - 1
    total = np.sum(np.sum((gain - 0.3 * kl) * mask, 1) / mask.sum(1))
    np.testing.assert_allclose(out.loss, -total, rtol=1e-5)
    assert out.count == 8
    np.testing.assert_allclose(
        out.metrics["reward"], record["reward"].sum(), rtol=1e-6
    )
    np.testing.assert_allclose(
        out.metrics["clipped"][0], np.sum(((ratio > 1.5) | (ratio < 0.9)) * mask)
    )


def test_at_the_old_policy_it_is_reinforce(record):
    """Ratio 1: the gradient is -A grad log q, averaged over a response's tokens."""
    method = dataclasses.replace(METHOD, kl_weight=0.0)
    nets = lambda p: bind({"student": NET}, {"student": p})

    def plain(p):
        log_q = method.log_probs(nets(p).student, record)
        mask = record["mask"][:, 1:]
        return -jnp.sum(
            record["advantage"] * jnp.sum(log_q * mask, 1) / mask.sum(1)
        )

    grads = jax.jit(jax.grad(lambda p: method.loss(nets(p), ctx(record)).loss))(
        PARAMS["old"]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        grads,
        jax.jit(jax.grad(plain))(PARAMS["old"]),
    )


def test_padding_changes_nothing(record, logits):
    """Neither tokens nor log-probabilities beyond the end, however wild."""
    padding = record["mask"][:, 1:] == 0
    wild = {
        **record,
        "tokens": jnp.where(record["segments"] > 0, record["tokens"], 3),
    }
    wild |= {
        k: jnp.where(padding, -1e4, record[k]) for k in ("log_old", "log_reference")
    }
    value = jax.value_and_grad(
        lambda z, batch: METHOD.loss(scripted(z), ctx(batch)).loss
    )
    assert padding[:, 2:].any()
    for a, b in zip(value(logits, record), value(logits, wild)):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()


def test_chunks_change_nothing(record):
    nets = bind({"student": NET}, {"student": PARAMS["student"]})
    whole, parts = (
        jax.jit(
            lambda n=n: dataclasses.replace(METHOD, chunk=n).log_probs(
                nets.student, record
            )
        )()
        for n in (0, 3)
    )
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-5)
    hot = dataclasses.replace(METHOD, sample_temperature=2.0)
    flat = jax.nn.log_softmax(jnp.zeros((8, 8, 7)))[:, :-1, 0]
    np.testing.assert_allclose(
        hot.log_probs(lambda *_, **__: jnp.zeros((8, 8, 7)), record),
        flat,
        rtol=1e-6,
    )


@pytest.fixture
def train(compilations):
    def run(method, steps, roles, tx=None):
        nets = dict.fromkeys(("student", "old", *roles), NET)
        txs = {"student": tx or optax.sgd(0.1), "old": optax.sgd(0.0)}
        states, metrics = first_steps(
            method,
            nets,
            txs,
            {r: PARAMS[r] for r in ("student", *roles)},
            BATCH,
            steps,
        )
        assert compilations["train_step"] == 1
        return [
            (state.params, row)
            for state, row in zip(states[1:], metrics, strict=True)
        ]

    return run


def same(a, b):
    return all(
        (x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def test_the_old_policy_is_the_student_of_every_second_step(train):
    history = train(dataclasses.replace(METHOD, kl_weight=0.0), 4, ())
    params = [PARAMS, *(p for p, _ in history)]
    assert same(params[1]["old"], PARAMS["student"]) and not same(
        params[1]["student"], PARAMS["student"]
    )
    assert same(params[2]["old"], params[2]["student"]) and same(
        params[3]["old"], params[2]["student"]
    )
    assert same(params[4]["old"], params[4]["student"]) and not same(
        params[4]["old"], params[2]["old"]
    )
    assert (
        history[0][1]["student/clipped"] == 0
        and history[2][1]["student/clipped"] == 0
    )


def test_it_raises_the_reward(train):
    method = dataclasses.replace(METHOD, group=16, kl_weight=0.0, eos=())
    rewards = [
        m["student/reward"] for _, m in train(method, 60, (), optax.adam(5e-2))
    ]
    # two prompts to learn by heart; chance is 1 / 7
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2


def test_training_goes_on_where_the_verifier_fails(train):
    """pow(prompt, response, answer) of lists raises."""
    reward = Verified(function="builtins:pow", workers=1, timeout=60.0)
    history = train(dataclasses.replace(METHOD, reward=reward), 2, ("reference",))
    for _, metrics in history:
        assert (
            metrics["student/failed"] == 1
            and metrics["student/reward"] == 0
            and metrics["student/flat"] == 1
        )
        # of the KL
        assert (
            np.isfinite(metrics["student/loss"])
            and metrics["student/grad_norm"] > 0
        )
    reward.pool.close()


def test_without_a_kl_there_is_no_reference():
    assert GRPO().frozen == ("reference",) and GRPO(kl_weight=0.0).frozen == ()


def test_refusals():
    with pytest.raises(Refused, match=r"method.kl_kind='k4'"):
        GRPO(kl_kind="k4")
    with pytest.raises(Refused, match=r"method.group=1"):
        GRPO(group=1)
