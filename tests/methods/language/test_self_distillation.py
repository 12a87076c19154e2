import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.digits import LabelledDigits
from jaxdistill.methods.language.self_distillation import (
    EstimatedAlpha,
    SelfDistillation,
)
from jaxdistill.models.vision.perceptron import Perceptron
from jaxdistill.objectives.ridge import best_alpha

NET = make_net(Perceptron(width=8))
MODELS = {
    role: NET.init(jax.random.key(i))
    for i, role in enumerate(("student", "teacher", "first", "pure"))
}
NETS = dict.fromkeys(MODELS, NET)
BATCH = LabelledDigits(batch_size=20, heldout=0.5).batch(0, slice(None))
FIT = 1 - BATCH["heldout"]
LAW = {
    role: jax.nn.softmax(NET.apply(params, BATCH["x"]))
    for role, params in MODELS.items()
}
LABELS = jax.nn.one_hot(BATCH["cond"], 10)


def loss(method, batch=BATCH, params=MODELS, memory=None):
    run = lambda params: method.loss(
        bind(NETS, params),
        Ctx(batch, jax.random.key(0), 0, memory or method.memory()),
    )
    return jax.jit(run)(params)


def error(target, law=LAW["student"]):
    return float(jnp.sum(jnp.mean((law - target) ** 2, -1) * FIT))


def told(method):
    return method.predictions(
        bind(NETS, MODELS), Ctx(BATCH, jax.random.key(0), 0, {})
    )


def test_loss_is_a_mix_of_two_errors():
    for alpha in (0.0, 0.3, 1.0):
        method = SelfDistillation(alpha=alpha, penalty=0.0)
        out = loss(method, told(method))
        np.testing.assert_allclose(
            out.loss,
            alpha * error(LABELS) + (1 - alpha) * error(LAW["teacher"]),
            rtol=1e-5,
        )
        assert out.count == FIT.sum() == 10
    # the first has no teacher
    np.testing.assert_allclose(
        loss(SelfDistillation(penalty=0.0)).loss, error(LABELS), rtol=1e-6
    )


def test_gradient_is_that_of_the_mixed_target():
    method = SelfDistillation(alpha=0.3, penalty=0.0)
    batch = told(method)
    grad = jax.grad(lambda p: loss(method, batch, {**MODELS, "student": p}).loss)(
        MODELS["student"]
    )
    mixed = 0.3 * LABELS + 0.7 * batch["soft"]
    law = lambda p: jax.nn.softmax(NET.apply(p, BATCH["x"]))
    expected = jax.grad(
        lambda p: jnp.sum(jnp.mean((law(p) - mixed) ** 2, -1) * FIT)
    )(MODELS["student"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grad, expected
    )


def test_held_out_samples_are_not_fitted():
    other = {
        **BATCH,
        "cond": np.where(
            BATCH["heldout"] > 0, (BATCH["cond"] + 1) % 10, BATCH["cond"]
        ).astype(np.int32),
    }
    method = SelfDistillation()
    assert loss(method, other).loss == loss(method).loss


def test_penalty_is_the_sum_of_plain_norms():
    free, bound = (loss(SelfDistillation(penalty=p)) for p in (0.0, 0.1))
    norms = sum(
        float(jnp.linalg.norm(w)) for w in jax.tree.leaves(MODELS["student"])
    )
    np.testing.assert_allclose(
        (bound.loss - free.loss) / 10, 0.1 * norms, rtol=1e-4
    )
    grad = jax.grad(
        lambda p: loss(SelfDistillation(), params={**MODELS, "student": p}).loss
    )(MODELS["student"])
    # biases begin at 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_alpha_is_estimated_on_held_out_samples():
    method = EstimatedAlpha(penalty=0.0)
    batch = method.three_predictions(
        bind(NETS, MODELS), Ctx(BATCH, jax.random.key(0), 0, {})
    )
    rows = BATCH["heldout"] > 0
    expected = float(
        np.clip(
            best_alpha(LABELS[rows], LAW["first"][rows], LAW["pure"][rows]), 0, 1
        )
    )
    out = loss(method, batch)
    np.testing.assert_allclose(out.metrics["alpha"][0], expected, rtol=1e-5)
    np.testing.assert_allclose(
        out.loss,
        expected * error(LABELS) + (1 - expected) * error(LAW["teacher"]),
        rtol=1e-5,
    )
    again = loss(method, batch, memory=out.memory)  # sums over batches
    np.testing.assert_allclose(
        again.memory["above"], 2 * out.memory["above"], rtol=1e-6
    )
    np.testing.assert_allclose(again.metrics["alpha"][0], expected, rtol=1e-5)


def test_rounds():
    plain = SelfDistillation(rounds=3).stages(31)
    assert (
        [s.steps for s in plain] == [11, 10, 10]
        and plain[0].surgery is None
        and plain[0].collect is None
    )
    nets, params = plain[1].surgery(
        {"student": NET}, {"student": MODELS["student"]}, BATCH
    )
    assert (
        set(params) == {"teacher"}
        and params["teacher"] is MODELS["student"]
        and set(nets) == {"student", "teacher"}
    )
    chosen = EstimatedAlpha(rounds=3).stages(50)
    assert [getattr(s.method, "alpha", None) for s in chosen[1::2]] == [0.0, 0.0]
    assert [type(s.method) for s in chosen] == [
        EstimatedAlpha,
        SelfDistillation,
    ] * 2 + [EstimatedAlpha]
    nets = {"student": NET}
    params = {}
    held = []
    for stage, model in zip(chosen, ({"mark": i} for i in range(5))):
        if stage.surgery:
            nets, params = stage.surgery(nets, params, BATCH)
            held.append({role: p["mark"] for role, p in params.items()})
        params = {**params, "student": model}
    assert held == [
        {"first": 0, "teacher": 0},
        {"first": 0, "teacher": 0, "pure": 1},
        {"first": 0, "teacher": 2, "pure": 1},
        {"first": 0, "teacher": 2, "pure": 3},
    ]


def test_digits_with_wrong_labels():
    data = LabelledDigits(size=1000, noise=0.15, heldout=0.2, batch_size=10)
    noisy = data.arrays("train")
    clean = LabelledDigits(size=1000, noise=0.0).arrays("train")
    wrong = np.mean(noisy["cond"] != clean["cond"])
    assert (
        abs(wrong - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 1000)
        and noisy["heldout"].sum() == 200
    )
    assert (noisy["x"] == clean["x"]).all() and len(data.arrays("test")["x"]) == 797


def test_refusals():
    with pytest.raises(Refused, match=r"alpha=1\.5"):
        SelfDistillation(alpha=1.5)
    with pytest.raises(Refused, match="no samples are held out"):
        batch = {
            **BATCH,
            "soft": LAW["teacher"],
            "first": LAW["first"],
            "pure": LAW["pure"],
        }
        del batch["heldout"]
        loss(EstimatedAlpha(), batch)
