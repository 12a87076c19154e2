"""RLAD: the ratio with the teacher in it, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.methods.language.grpo import GRPO
from jaxdistill.methods.language.rlad import KDRL, RLAD
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.policy import clipped_surrogate, group_advantages
from jaxdistill.objectives.reward import Share
from tools.first_steps import first_steps

RNG = np.random.default_rng(0)
NET = make_net(LM(vocab=7, dim=8, mlp=8, heads=2, depth=1))
PARAMS = {
    r: jax.tree.map(
        lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype),
        NET.shapes,
    )
    for r in ("student", "teacher")
}
TOKENS = jnp.asarray(RNG.integers(0, 7, (2, 8)), jnp.int32)
BATCH = {
    "tokens": TOKENS,
    "mask": jnp.tile(jnp.float32(np.arange(8) >= 3), (2, 1)),
    "prompt": TOKENS[:, :3],
}
SAME = dict(reward=Share(), group=4, updates=4, clip_high=0.28, eos=(6,))


def train(method, teacher="teacher", steps=5):
    """Losses and weights of five steps; GRPO has the teacher as a role that it does not look at."""
    nets = dict.fromkeys(("student", "old", "teacher"), NET)
    txs = {"student": optax.sgd(0.5), "old": optax.sgd(0.0)}
    start = {"student": PARAMS["student"], "teacher": PARAMS[teacher]}
    states, metrics = first_steps(method, nets, txs, start, BATCH, steps)
    return [row["student/loss"] for row in metrics], states[-1].params["student"]


@pytest.fixture(scope="module")
def grpo():
    return train(GRPO(kl_weight=0.0, **SAME))


def test_alpha_1_is_grpo(grpo):
    losses, params = train(RLAD(alpha=1.0, **SAME))
    np.testing.assert_allclose(losses, grpo[0], rtol=1e-6, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        params,
        grpo[1],
    )


def test_the_teacher_matters_otherwise(grpo):
    losses, _ = train(RLAD(**SAME))
    assert abs(losses[0] - grpo[0][0]) > 1e-3


LOG = {
    name: jnp.asarray(-RNG.random(64) * 2, jnp.float32)
    for name in ("q", "old", "teacher")
}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_a_teacher_that_is_the_old_policy_changes_nothing(alpha):
    near = {"log_old": LOG["old"], "log_teacher": LOG["old"]}
    q = LOG["old"] + jnp.linspace(-0.9, 0.9, 64)  # inside the clamp
    grad = lambda method: jax.jacobian(lambda q: method.log_ratio(q, near))(q)
    np.testing.assert_allclose(
        RLAD(alpha=alpha).log_ratio(q, near), GRPO().log_ratio(q, near), atol=1e-6
    )
    np.testing.assert_allclose(grad(RLAD(alpha=alpha)), jnp.eye(64), atol=1e-6)


def test_ratio_at_the_first_inner_step():
    """q = old: (old / p)^(1 - alpha) within the clamp, never beyond e^(+-(1 - alpha)); not 1."""
    batch = {"log_old": LOG["old"], "log_teacher": LOG["teacher"]}
    ratio = jnp.exp(RLAD().log_ratio(LOG["old"], batch))
    gap = LOG["old"] - LOG["teacher"]
    inside = jnp.abs(gap) < 1
    assert inside.any() and (~inside).any() and jnp.abs(ratio - 1).max() > 0.3
    np.testing.assert_allclose(ratio[inside], jnp.exp(0.5 * gap)[inside], rtol=1e-5)
    np.testing.assert_allclose(
        ratio[~inside], jnp.exp(0.5 * jnp.sign(gap))[~inside], rtol=1e-5
    )
    assert ratio.min() >= 0.606 and ratio.max() <= 1.649


@pytest.mark.parametrize("clamp", ["literal", "straight_through"])
@pytest.mark.parametrize(
    ("advantage", "to_old", "to_teacher", "open_"),
    [
        (
            1,
            0.1,
            0.9,
            False,
        ),  # the teacher dislikes what would be raised: r = e^0.5 > 1.28
        (1, 0.1, 3.0, False),
        (1, 0.1, -0.9, True),
        (1, 0.1, -3.0, True),
        (-1, -0.1, -0.9, False),  # it likes what would be suppressed: r < 0.8
        (-1, -0.1, -3.0, False),
        (-1, 0.1, 0.9, True),  # no upper clip
        (-1, 0.1, 3.0, True),
    ],
)
def test_which_tokens_get_a_gradient(clamp, advantage, to_old, to_teacher, open_):
    method = RLAD(clamp=clamp)
    batch = {
        "log_old": jnp.float32(-1 - to_old),
        "log_teacher": jnp.float32(-1 - to_teacher),
    }
    gain = lambda q: (
        -clipped_surrogate(
            method.log_ratio(q, batch),
            jnp.float32(advantage),
            method.clip_low,
            method.clip_high,
        )
    )
    ratio = np.exp(0.5 * to_old + 0.5 * np.clip(to_teacher, -1, 1))
    factor = 0.5 if clamp == "literal" and abs(to_teacher) > 1 else 1.0
    np.testing.assert_allclose(
        jax.grad(gain)(jnp.float32(-1)),
        factor * ratio * advantage if open_ else 0.0,
        rtol=1e-5,
    )


def test_linear_in_alpha_and_in_the_teacher():
    batch = {"log_old": LOG["old"], "log_teacher": LOG["teacher"]}
    at = lambda alpha, batch=batch: RLAD(alpha=alpha).log_ratio(LOG["q"], batch)
    np.testing.assert_allclose(
        at(0.0), jnp.clip(LOG["q"] - LOG["teacher"], -1, 1), atol=1e-6
    )
    np.testing.assert_allclose(at(1.0), LOG["q"] - LOG["old"], atol=1e-6)
    np.testing.assert_allclose(at(0.3), 0.3 * at(1.0) + 0.7 * at(0.0), atol=1e-6)
    inside = jnp.abs(LOG["q"] - LOG["teacher"]) < 0.8
    shifted = at(0.3, {**batch, "log_teacher": LOG["teacher"] + 0.2})
    np.testing.assert_allclose((shifted - at(0.3))[inside], -0.7 * 0.2, atol=1e-6)
    # DPO's logit
    np.testing.assert_allclose(
        RLAD(alpha=0.0, limit=np.inf).log_ratio(LOG["q"], batch),
        LOG["q"] - LOG["teacher"],
        atol=1e-6,
    )


def test_the_trust_region_is_around_the_mixture():
    """r inside the clip range: log(1 - low) <= log q - log anchor <= log(1 + high)."""
    batch = {"log_old": LOG["old"], "log_teacher": LOG["teacher"]}
    method = RLAD(limit=np.inf)
    log_ratio = method.log_ratio(LOG["q"], batch)
    np.testing.assert_allclose(
        log_ratio, LOG["q"] - 0.5 * (LOG["old"] + LOG["teacher"]), atol=1e-6
    )
    moved = (
        jax.vmap(
            jax.grad(lambda x: clipped_surrogate(x, jnp.float32(1), 0.2, 0.28))
        )(log_ratio)
        != 0
    )
    np.testing.assert_array_equal(moved, log_ratio <= 0.247)
    moved = (
        jax.vmap(
            jax.grad(lambda x: clipped_surrogate(x, jnp.float32(-1), 0.2, 0.28))
        )(log_ratio)
        != 0
    )
    np.testing.assert_array_equal(moved, log_ratio >= -0.223)


@pytest.fixture(scope="module")
def record():
    method = RLAD(**SAME)
    params = {**PARAMS, "old": PARAMS["student"]}
    ctx = Ctx(BATCH, jax.random.key(5), jnp.int32(0), {})
    return jax.jit(lambda p: method.rollout(bind(dict.fromkeys(p, NET), p), ctx))(
        params
    )


def value_and_grad(method, record):
    run = lambda p: (
        method.loss(
            bind({"student": NET}, {"student": p}),
            Ctx(record, jax.random.key(0), 0, {}),
        ).loss
    )
    return jax.jit(jax.value_and_grad(run))(PARAMS["student"])


def test_without_advantage_the_teacher_has_no_influence(record):
    value, grads = value_and_grad(
        RLAD(**SAME), {**record, "advantage": group_advantages(jnp.full(8, 0.3), 4)}
    )
    assert value == 0 and not any(g.any() for g in jax.tree.leaves(grads))


def test_padding_changes_nothing(record):
    padding = record["mask"][:, 1:] == 0
    wild = {
        **record,
        "tokens": jnp.where(record["segments"] > 0, record["tokens"], 3),
    }
    wild |= {
        k: jnp.where(padding, 1e4, record[k]) for k in ("log_old", "log_teacher")
    }
    for a, b in zip(
        jax.tree.leaves(value_and_grad(RLAD(**SAME), record)),
        jax.tree.leaves(value_and_grad(RLAD(**SAME), wild)),
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_kdrl_is_grpo_with_the_kl_to_the_teacher(record):
    kdrl = value_and_grad(KDRL(kl_weight=0.3, **SAME), record)
    reference = {**record, "log_reference": record["log_teacher"]}
    other = value_and_grad(GRPO(kl_weight=0.3, kl_kind="k2", **SAME), reference)
    jax.tree.map(np.testing.assert_array_equal, kdrl, other)
    assert (
        KDRL().frozen == ("teacher",)
        and RLAD().frozen == ("teacher",)
        and RLAD(kl_weight=0.1).frozen == ("teacher", "reference")
    )


def tabular(method, seeds=3, steps=120):
    """Exact probability that all tokens are right, mean over prompts and seeds, of a policy that is
    a table [prompt, position, token] under plain ascent; the teacher is right at 0.9 to 0.97 a
    token, the reward asks for three of six.
    """
    pick = lambda log_p, tokens: jnp.take_along_axis(
        jnp.broadcast_to(log_p[:, None], (8, 8, 6, 8)), tokens[..., None], -1
    )[..., 0]

    def run(key):
        keys = jax.random.split(key, 4)
        gold = jax.random.randint(keys[0], (8, 6), 0, 8)
        sure = jax.random.uniform(keys[1], (8, 6, 1), minval=0.9, maxval=0.97)
        teacher = jnp.log(
            jnp.where(jax.nn.one_hot(gold, 8) > 0, sure, (1 - sure) / 7)
        )

        def outer(z, key):
            tokens = jax.random.categorical(
                key, jnp.broadcast_to(z[:, None], (8, 8, 6, 8))
            )
            reward = ((tokens == gold[:, None]).sum(-1) >= 3).astype(jnp.float32)
            advantage = group_advantages(reward.ravel(), 8).reshape(8, 8, 1)
            batch = {
                "log_old": pick(jax.nn.log_softmax(z), tokens),
                "log_teacher": pick(teacher, tokens),
            }

            def loss(z):  # mean over group and positions, sum over prompts
                log_ratio = method.log_ratio(
                    pick(jax.nn.log_softmax(z), tokens), batch
                )
                return (
                    clipped_surrogate(
                        log_ratio, advantage, method.clip_low, method.clip_high
                    ).sum()
                    / 48
                )

            return jax.lax.fori_loop(
                0, 4, lambda _, z: z - 2.0 * jax.grad(loss)(z), z
            ), None

        z, _ = jax.lax.scan(
            outer,
            0.3 * jax.random.normal(keys[2], (8, 6, 8)),
            jax.random.split(keys[3], steps),
        )
        return (
            jnp.take_along_axis(jax.nn.softmax(z), gold[..., None], -1)
            .prod((1, 2))
            .mean()
        )

    return float(
        jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), seeds)).mean()
    )


@pytest.fixture(scope="module")
def table():
    methods = {"grpo": GRPO(clip_high=0.28), "literal": RLAD()}
    methods |= {a: RLAD(alpha=a, clamp="straight_through") for a in (0.3, 0.5, 0.7)}
    return {name: tabular(m) for name, m in methods.items()}


@pytest.mark.full
def test_a_tabular_policy_learns_faster_than_with_grpo(table, record_property):
    """A teacher that is right where the reward is lenient."""
    record_property("table", table)
    assert (
        table["literal"] >= 1.1 * table["grpo"]
        and table[0.5] >= 1.3 * table["grpo"]
    )


def test_alpha_hardly_matters_in_the_middle(table):
    middle = [table[a] for a in (0.3, 0.5, 0.7)]
    assert max(middle) <= 1.25 * min(middle)


def test_refusals():
    with pytest.raises(Refused, match=r"method.alpha=1.5"):
        RLAD(alpha=1.5)
    with pytest.raises(
        Refused,
        match=r"method.clamp='hard': expected one of literal, straight_through",
    ):
        RLAD(clamp="hard")
    with pytest.raises(Refused, match=r"KDRL without its teacher is GRPO"):
        KDRL(kl_weight=0.0)
    assert dataclasses.replace(KDRL(), kl_weight=1.0).kl_weight == 1.0
