import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.rationales import Sums
from jaxdistill.methods.language.sft import SFT
from jaxdistill.methods.language.step_by_step import StepByStep
from jaxdistill.models.language.lm import LM
from jaxdistill.samplers.text import generate
from tools.first_steps import first_steps

NET = make_net(LM(vocab=15, dim=8, mlp=8, heads=2, depth=1))
PARAMS = {"student": NET.init(jax.random.key(0))}
BATCH = {
    k: jnp.asarray(v) for k, v in Sums(batch_size=6).batch(0, slice(None)).items()
}


@functools.partial(jax.jit, static_argnums=0)
def loss(method, batch=BATCH, params=PARAMS):
    return method.loss(
        bind({"student": NET}, params), Ctx(batch, jax.random.key(0), 0, {})
    )


def gradient(method, batch=BATCH):
    mean = lambda out: out.loss / (1 if out.count is None else out.count)
    return jax.grad(lambda p: mean(loss(method, batch, p)))(PARAMS)


def close(a, b, **tol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tol), a, b)


def test_the_label_alone_is_fine_tuning():
    sft = loss(SFT())
    np.testing.assert_allclose(
        loss(StepByStep(alpha=1.0)).loss, sft.loss / sft.count, rtol=1e-6
    )
    close(gradient(StepByStep(alpha=1.0)), gradient(SFT()), atol=1e-6)


def test_five_steps_follow_fine_tuning():
    weights = []
    for method in (StepByStep(alpha=1.0), SFT()):
        states, metrics = first_steps(
            method, {"student": NET}, optax.adam(1e-2), PARAMS, BATCH
        )
        weights.append((states[-1].params, metrics[-1]["student/loss"]))
    close(*weights, atol=1e-5)


@pytest.mark.full
def test_micro_batches_do_not_move_the_update():
    """Each term is a mean over the complete batch's tokens, however these fall on its halves."""
    uneven = {
        k: v.at[1::2, -4:].set(False) if k.endswith("mask") else v
        for k, v in BATCH.items()
    }
    uneven["mask"] = uneven["mask"].at[3].set(False)
    runs = [
        first_steps(
            StepByStep(alpha=0.3),
            {"student": NET},
            optax.sgd(1.0),
            PARAMS,
            uneven,
            1,
            accumulate=n,
        )
        for n in (1, 2)
    ]
    (one, _), (two, _) = ([states[-1].params, metrics] for states, metrics in runs)
    close(one, two, atol=2e-6)
    for name, value in runs[0][1][0].items():
        np.testing.assert_allclose(
            runs[1][1][0][name], value, rtol=1e-5, err_msg=name
        )
    halves = [
        gradient(StepByStep(alpha=0.3), {k: v[i::2] for k, v in uneven.items()})
        for i in range(2)
    ]
    # what a mean of means would be
    mean = jax.tree.map(lambda w, a, b: w - (a + b) / 2, PARAMS, *halves)
    assert (
        max(
            float(jnp.abs(a - b).max())
            for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(one))
        )
        > 1e-3
    )


def test_weights_are_shared_by_two_tasks():
    both, label, rationale = (
        gradient(StepByStep(alpha=a)) for a in (0.3, 1.0, 0.0)
    )
    close(
        both,
        jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, label, rationale),
        atol=1e-6,
    )
    # L_label + lambda L_rationale
    paper = jax.tree.map(lambda a, b: a + 0.7 / 0.3 * b, label, rationale)
    close(jax.tree.map(lambda g: g / 0.3, both), paper, atol=1e-5)


def test_each_loss_sees_its_own_target():
    out = loss(StepByStep()).metrics
    apart = lambda other, name: abs(
        float(loss(StepByStep(), other).metrics[name] / out[name]) - 1
    )
    other = {
        **BATCH,
        "explain_tokens": BATCH["explain_tokens"].at[:, 6:9].add(1) % 10,
    }
    # rounding of float32, and more than that
    assert apart(other, "label") < 1e-6 and apart(other, "rationale") > 1e-4
    other = {**BATCH, "tokens": BATCH["tokens"].at[:, 6].add(1) % 10}
    assert apart(other, "rationale") < 1e-6 and apart(other, "label") > 1e-4


def test_padding_and_longer_reasons_leave_the_rest_alone():
    widen = lambda v: jnp.pad(
        v,
        ((0, 0), (0, 3)),
        constant_values=14
        if v is BATCH["tokens"] or v is BATCH["explain_tokens"]
        else 0,
    )
    wide = {k: v if k.startswith("prompt") else widen(v) for k, v in BATCH.items()}
    out = loss(StepByStep())
    padded = loss(StepByStep(), wide)
    for name in ("label", "rationale"):
        np.testing.assert_allclose(
            padded.metrics[name], out.metrics[name], rtol=1e-5
        )
    twice = {
        k: jnp.concatenate([v, v]) if k.startswith("explain_") else v
        for k, v in BATCH.items()
    }
    # means, whatever the number of targets
    np.testing.assert_allclose(loss(StepByStep(), twice).loss, out.loss, rtol=1e-5)


def test_rows_without_reasons_count_for_the_label_alone():
    out = loss(
        StepByStep(),
        {**BATCH, "explain_mask": jnp.zeros_like(BATCH["explain_mask"])},
    )
    assert out.metrics["rationale"] == 0
    np.testing.assert_allclose(
        out.loss, 0.5 * loss(StepByStep()).metrics["label"], rtol=1e-6
    )


@pytest.mark.slow
def test_a_trained_student_answers_in_one_token():
    method = StepByStep()
    data = Sums(size=50, batch_size=50, wrong=0.0)
    net = make_net(LM(vocab=15, dim=32, mlp=64, heads=2, depth=1))
    batches = [data.batch(i, slice(None)) for i in range(300)]
    states, _ = first_steps(
        method, {"student": net}, optax.adam(3e-3), {}, batches, len(batches)
    )
    call = functools.partial(net.apply, states[-1].params["student"])
    _, alive = generate(
        call,
        jnp.asarray(data.arrays("train")["prompt"]),
        12,
        jax.random.key(0),
        temperature=0.0,
        eos=13,
        pad=14,
    )
    assert (
        np.asarray(alive).sum(1) - 6 == 2
    ).mean() > 0.95  # the digit and the end: no rationale is written


def test_refused():
    with pytest.raises(Refused, match=r"method\.alpha=1\.5: expected 0 to 1"):
        StepByStep(alpha=1.5)
