import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.build import build
from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives import divergence
from tools.first_steps import first_steps

RNG = np.random.default_rng(0)
P, Q = (jnp.asarray(RNG.standard_normal((2, 5, 7)), jnp.float32) for _ in range(2))
BATCH = {
    "tokens": jnp.asarray(RNG.integers(0, 7, (2, 5))),
    "mask": jnp.array([[0, 0, 1, 1, 1], [0, 1, 0, 1, 0]], jnp.float32),
}
TARGETS = BATCH["mask"][:, 1:] > 0


def loss(method, teacher=P, student=Q, batch=BATCH):
    """The method's loss when the networks say these logits."""
    nets = SimpleNamespace(
        teacher=lambda tokens, **_: teacher, student=lambda tokens, **_: student
    )
    return method.turns[0].loss(nets, Ctx(batch, jax.random.key(0), 0, {}))


@pytest.mark.parametrize("kind", sorted(divergence.NAMES))
def test_sum_of_divergences_at_targets(kind):
    out = loss(KD(divergence=divergence.NAMES[kind](), temperature=2.0))
    each = divergence.token_divergence(
        divergence.NAMES[kind](), P, Q, temperature=2.0
    )[:, :-1]
    np.testing.assert_allclose(out.loss, each[TARGETS].sum(), rtol=1e-6)
    assert out.count == 5 and out.metrics["divergence"] == out.loss


def test_parameters_reach_the_kind():
    each = divergence.SkewKL(alpha=0.4)(P, Q)[:, :-1]
    np.testing.assert_allclose(
        loss(KD(divergence=divergence.SkewKL(alpha=0.4))).loss,
        each[TARGETS].sum(),
        rtol=1e-6,
    )


def test_gradient_in_the_students_logits():
    grad = jax.grad(lambda z: loss(KD(), student=z).loss)(Q)
    expected = (jax.nn.softmax(Q) - jax.nn.softmax(P))[:, :-1] * TARGETS[..., None]
    np.testing.assert_allclose(grad[:, :-1], expected, atol=1e-6)
    assert not grad[:, -1].any()


@pytest.mark.parametrize(
    "kind", sorted(divergence.NAMES.keys() - {"total_variation"})
)  # which has a kink there
def test_nothing_to_learn_from_an_equal_teacher(kind):
    value, grad = jax.value_and_grad(
        lambda z: (
            loss(
                KD(divergence=divergence.NAMES[kind]()), teacher=P + 3, student=z
            ).loss
        )
    )(P)
    assert abs(value) <= 1e-5 and jnp.abs(grad).max() <= 1e-5


def test_hard_labels_alone_are_fine_tuning():
    hard = loss(KD(hard_weight=1.0))
    plain = loss(SFT())
    np.testing.assert_allclose(hard.loss, plain.loss, rtol=1e-6)
    np.testing.assert_allclose(hard.metrics["cross_entropy"], plain.loss, rtol=1e-6)
    assert not jax.grad(lambda p: loss(KD(hard_weight=1.0), teacher=p).loss)(
        P
    ).any()


def test_terms_are_averaged_by_the_hard_weight():
    soft, hard, both = (loss(KD(hard_weight=w)).loss for w in (0.0, 1.0, 0.25))
    np.testing.assert_allclose(both, 0.75 * soft + 0.25 * hard, rtol=1e-6)


def test_top_k_forgets_only_inside_the_tail():
    full = loss(KD()).loss
    values = [loss(KD(top_k=k)).loss for k in (1, 3, 6)]
    # data processing: merging tokens loses divergence
    assert 0 < values[0] < values[1] < full
    # a tail of one token loses none
    np.testing.assert_allclose(values[2], full, rtol=1e-5)


def test_documents_of_a_row_are_passed_on():
    seen = {}
    batch = {**BATCH, "segments": BATCH["tokens"], "positions": BATCH["tokens"]}
    nets = SimpleNamespace(
        teacher=lambda tokens, **kw: seen.update(teacher=kw) or P,
        student=lambda tokens, **kw: seen.update(student=kw) or Q,
    )
    KD().turns[0].loss(nets, Ctx(batch, jax.random.key(0), 0, {}))
    for role in ("teacher", "student"):
        assert (
            seen[role]["segments"] is batch["segments"]
            and seen[role]["positions"] is batch["positions"]
        )


TEACHER = make_net(LM(vocab=7, dim=12, mlp=16, heads=2, depth=2))
STUDENT = make_net(LM(vocab=7, dim=8, mlp=8, heads=2, depth=1, tied=True))


def weights(net, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), s.dtype),
        net.shapes,
    )


@pytest.mark.full
@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_chunks_change_nothing(hard_weight):
    teacher = weights(TEACHER, 0)
    student = weights(STUDENT, 1)

    def value(method):
        run = lambda p: (
            method.loss(
                bind(
                    {"teacher": TEACHER, "student": STUDENT},
                    {"teacher": teacher, "student": p},
                ),
                ctx,
            ).loss
        )
        return jax.jit(jax.value_and_grad(run))(student)

    ctx = Ctx(BATCH, jax.random.key(0), 0, {})
    whole = KD(
        divergence=divergence.JensenShannon(),
        temperature=1.5,
        hard_weight=hard_weight,
    )
    for got, want in zip(
        jax.tree.leaves(value(dataclasses.replace(whole, chunk=3))),
        jax.tree.leaves(value(whole)),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def train(method, batches, accumulate=1, lr=1e-2):
    nets = {"teacher": TEACHER, "student": STUDENT}
    start = {"teacher": weights(TEACHER, 0), "student": weights(STUDENT, 1)}
    states, metrics = first_steps(
        method,
        nets,
        optax.adam(lr),
        start,
        batches,
        len(batches),
        accumulate=accumulate,
    )
    return states[-1], metrics[-1], [row["student/loss"] for row in metrics]


def test_five_steps():
    state, metrics, losses = train(
        KD(divergence=divergence.JensenShannon()), [BATCH] * 5
    )
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    assert metrics.keys() == {
        "student/loss",
        "student/divergence",
        "student/cross_entropy",
        "student/grad_norm",
    }
    jax.tree.map(
        np.testing.assert_array_equal, state.frozen["teacher"], weights(TEACHER, 0)
    )


def test_micro_batches_are_pooled_by_their_tokens():
    """Rows with 3 and 2 targets: their mean over tokens is not the mean of their means."""
    whole, _, (a,) = train(KD(), [BATCH])
    parts, _, (b,) = train(KD(), [BATCH], accumulate=2)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    moved = jax.tree.map(
        lambda new, old: new - old, whole.params["student"], weights(STUDENT, 1)
    )
    again = jax.tree.map(
        lambda new, old: new - old, parts.params["student"], weights(STUDENT, 1)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), moved, again
    )


def test_refusals():
    with pytest.raises(
        Refused, match=r"divergence='forward_l': did you mean 'forward_kl'\?"
    ):
        KD.upgraded({"kind": "forward_l"})
    old = {
        "name": "methods.language.kd:KD",
        "kind": "forward_kl",
        "params": {"beta": 0.5},
    }
    with pytest.raises(Refused, match=r"ForwardKL has no field 'beta'"):
        build(old)
    with pytest.raises(Refused, match="top_k=3 needs whole rows"):
        KD(top_k=3, chunk=2)
