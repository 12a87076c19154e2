import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.patterns import Patterns
from jaxdistill.methods.language.ernie_tiny import STAGES, ErnieTiny, FineTune
from jaxdistill.models.heads import Projection
from jaxdistill.models.language.bert import BertClassifier
from tools.first_steps import first_steps

SIZES = dict(vocab=8, heads=2, max_length=16, classes=2)
TEACHER = make_net(BertClassifier(dim=8, mlp=8, depth=4, **SIZES))
SMALL = make_net(BertClassifier(dim=4, mlp=8, depth=2, **SIZES))
NETS = {
    "pretrained": TEACHER,
    "teacher": TEACHER,
    "student": SMALL,
    "projection": make_net(Projection(inputs=4, outputs=8)),
}


def weights(net, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), s.dtype),
        net.shapes,
    )


PARAMS = {role: weights(net, i) for i, (role, net) in enumerate(NETS.items())}
BATCH = {
    k: jnp.asarray(v)
    for k, v in Patterns(vocab=8, length=8, batch_size=4)
    .batch(0, slice(None))
    .items()
}
BATCH["mask"] = BATCH["mask"].at[1, 6:].set(False)
METHOD = ErnieTiny(student_depth=2, teacher_depth=4)
STAGE = {name: part.method for name, part in zip(METHOD.plan, METHOD.stages(100))}
TWINS = {
    **NETS,
    "student": TEACHER,
    "projection": make_net(Projection(inputs=8, outputs=8)),
}
TWIN_PARAMS = {
    **PARAMS,
    "student": PARAMS["teacher"],
    "projection": {"map": {"kernel": jnp.eye(8)}},
}


@functools.partial(jax.jit, static_argnums=(0, 3))
def loss(method, params=PARAMS, batch=BATCH, twins=False):
    return method.loss(
        bind(TWINS if twins else NETS, params), Ctx(batch, jax.random.key(0), 0, {})
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def gradient(method, params=PARAMS, twins=False):
    return jax.grad(lambda p: loss(method, p, BATCH, twins).loss)(params)


@functools.partial(jax.jit, static_argnums=0)
def logits(role, params):
    return NETS[role].apply(params, BATCH["tokens"], mask=BATCH["mask"])


def probabilities(role):
    """softmax of a network's logits, in numpy."""
    z = np.asarray(logits(role, PARAMS[role]), np.float64)
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def size(tree):
    return max(float(np.abs(w).max()) for w in jax.tree.leaves(tree))


def test_one_ingredient_changes_at_a_time():
    chain = [STAGES[name] for name in METHOD.plan]
    assert [
        sum(a != b for a, b in zip(x, y)) for x, y in zip(chain, chain[1:])
    ] == [
        1,
        1,
        1,
    ]
    assert [STAGE[name].frozen for name in METHOD.plan] == [
        ("pretrained",),
        ("teacher",),
        ("teacher",),
        ("teacher",),
    ]
    assert METHOD.frozen == ("pretrained", "teacher") and [
        p.steps for p in METHOD.stages(100)
    ] == [
        60,
        6,
        17,
        17,
    ]


@pytest.mark.full
def test_a_twin_has_nothing_to_learn():
    same = ErnieTiny(student_depth=4, teacher_depth=4, stage="TSD", hard_weight=0.0)
    out = loss(same, TWIN_PARAMS, twins=True)
    assert out.metrics["hidden"] <= 1e-10 and abs(out.metrics["attention"]) <= 1e-5
    p = probabilities("teacher")
    entropy = -np.mean(np.sum(p * np.log(p), -1))
    np.testing.assert_allclose(out.metrics["soft"], entropy, rtol=1e-5)
    latent = ErnieTiny(student_depth=4, teacher_depth=4, stage="TAD")
    assert size(gradient(latent, TWIN_PARAMS, True)["student"]) <= 1e-5


@pytest.mark.full
def test_without_labels_the_last_stage_is_the_third():
    plain = ErnieTiny(
        student_depth=2,
        teacher_depth=4,
        stage="TSD",
        soft_weight=0.0,
        hard_weight=0.0,
    )
    np.testing.assert_allclose(loss(plain).loss, loss(STAGE["TAD"]).loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        gradient(plain)["student"],
        gradient(STAGE["TAD"])["student"],
    )


@pytest.mark.full
def test_latent_losses_never_touch_the_classifier():
    head = lambda g: {k: g["student"][k] for k in ("pooler", "classifier")}
    assert size(head(gradient(STAGE["TAD"]))) == 0
    both = gradient(STAGE["TSD"])
    assert size(head(both)) > 0

    def labels(params):
        metrics = loss(STAGE["TSD"], params).metrics
        return metrics["soft"] + metrics["hard"]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        head(both),
        head(jax.jit(jax.grad(labels))(PARAMS)),
    )


@pytest.mark.full
def test_teachers_and_labels_of_general_text_get_no_gradient():
    for method in STAGE.values():
        grads = gradient(method)
        assert (
            size(grads["teacher"]) == size(grads["pretrained"]) == 0
            and size(grads["projection"]) > 0
        )
    unlabelled = {
        k: v for k, v in BATCH.items() if k in ("general_tokens", "general_mask")
    }
    assert loss(STAGE["GD"], PARAMS, unlabelled).loss == loss(STAGE["GD"]).loss


@pytest.mark.full
def test_stages_read_their_own_teacher_and_text():
    plain = {name: float(loss(STAGE[name]).loss) for name in METHOD.plan}
    # not rounding
    changed = lambda name, **other: (
        abs(float(loss(STAGE[name], {**PARAMS, **other}).loss) / plain[name] - 1)
        > 1e-5
    )
    new = weights(TEACHER, 9)
    assert [changed(name, pretrained=new) for name in METHOD.plan] == [
        True,
        False,
        False,
        False,
    ]
    assert [changed(name, teacher=new) for name in METHOD.plan] == [
        False,
        True,
        True,
        True,
    ]
    swapped = {**BATCH, "tokens": (BATCH["tokens"] + 1) % 8}
    apart = [
        abs(float(loss(STAGE[n], PARAMS, swapped).loss) / plain[n] - 1)
        for n in METHOD.plan
    ]
    assert [gap > 1e-5 for gap in apart] == [False, False, True, True]
    one = {**PARAMS, "teacher": PARAMS["pretrained"]}
    # with one teacher the first stages coincide
    np.testing.assert_allclose(
        loss(STAGE["GD"], one).loss, loss(STAGE["GED"], one).loss, rtol=1e-5
    )


def test_padding_is_invisible():
    pad = {"tokens": 0, "mask": False}
    wide = {
        k: jnp.pad(v, ((0, 0), (0, 3)), constant_values=pad[k]) if k in pad else v
        for k, v in BATCH.items()
    }
    a = loss(STAGE["TSD"])
    b = loss(STAGE["TSD"], PARAMS, wide)
    for name in ("hidden", "attention", "soft", "hard"):
        np.testing.assert_allclose(
            a.metrics[name], b.metrics[name], rtol=1e-4, atol=1e-6
        )


@pytest.mark.full
def test_micro_batches_do_not_move_the_update():
    uneven = {
        **BATCH,
        "mask": BATCH["mask"].at[1::2, 3:].set(False),
        "general_mask": BATCH["general_mask"].at[::2, 4:].set(False),
    }
    start = {role: PARAMS[role] for role in ("teacher", "student", "projection")}
    runs = [
        first_steps(
            STAGE["TSD"], NETS, optax.sgd(0.1), start, uneven, 1, accumulate=n
        )
        for n in (1, 2)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        *(states[-1].params for states, _ in runs),
    )
    for name, value in runs[0][1][0].items():
        np.testing.assert_allclose(
            runs[1][1][0][name], value, rtol=1e-4, err_msg=name
        )


def test_soft_labels_differ_from_kl_by_the_entropy():
    p = probabilities("teacher")
    q = probabilities("student")
    kl = np.mean(np.sum(p * np.log(p / q), -1))
    entropy = -np.mean(np.sum(p * np.log(p), -1))
    np.testing.assert_allclose(
        loss(STAGE["TSD"]).metrics["soft"] - entropy, kl, rtol=1e-3, atol=1e-5
    )
    assert kl >= 0


@pytest.mark.full
def test_student_and_projection_go_on():
    """A stage starts from the weights that the one before ended with, and moves both roles."""
    params = PARAMS
    nets = NETS
    for method in (STAGE["GD"], STAGE["GED"]):
        start = {
            role: params[role] for role in (*method.frozen, "student", "projection")
        }
        (first, last), _ = first_steps(
            method, nets, optax.adam(1e-2), start, BATCH, 1
        )
        jax.tree.map(
            np.testing.assert_array_equal,
            first.params,
            {r: params[r] for r in first.params},
        )
        moved = last.params
        assert all(
            size(jax.tree.map(jnp.subtract, moved[r], params[r])) > 0 for r in moved
        )
        params = {**params, **moved}


def test_fine_tuning_is_cross_entropy():
    q = probabilities("student")
    expected = -np.mean(
        np.log(np.take_along_axis(q, np.asarray(BATCH["label"])[:, None], 1))
    )
    np.testing.assert_allclose(loss(FineTune()).loss, expected, rtol=1e-5)
    np.testing.assert_allclose(
        loss(STAGE["TSD"]).metrics["hard"], expected, rtol=1e-5
    )


def test_data(check_rows=8):
    data = Patterns(vocab=8, length=8, batch_size=check_rows, size=5)
    one = data.batch(0, slice(None))
    two = data.batch(0, slice(4, 8))
    for name in one:
        np.testing.assert_array_equal(one[name][4:], two[name])
    # labelled texts go round
    assert len({row.tobytes() for row in one["tokens"]}) == 5
    held = data.evaluation(40)
    has = lambda row, p: any((row[i : i + 3] == p).all() for i in range(6))
    assert all(
        has(row, [[3, 1, 2], [2, 1, 3]][label])
        for row, label in zip(held["tokens"], held["label"])
    )
    assert held["domain"].sum() == 20


def test_refusals():
    with pytest.raises(Refused, match=r"method\.plan='GEDD': did you mean 'GED'"):
        ErnieTiny(plan=("GD", "GEDD"), shares=(1.0, 1.0))
    with pytest.raises(
        Refused, match="expected a positive share for each of GD, TSD"
    ):
        ErnieTiny(plan=("GD", "TSD"))
