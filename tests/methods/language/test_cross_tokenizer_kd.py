import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.needs import check_needs
from jaxdistill.core.net import fixed_net, make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.language import Markov
from jaxdistill.data.two_tokenizers import Blocks
from jaxdistill.methods.language.cross_tokenizer_kd import (
    ULD,
    CrossTokenizerKD,
    SpacedKD,
    SpanULD,
)
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.divergence import (
    ForwardKL,
    JensenShannon,
    sorted_distance,
)
from tools.first_steps import first_steps

DATA = Blocks(vocab=3, branch=2, length=10, batch_size=6)
BATCH = {k: jnp.asarray(v) for k, v in DATA.batch(0, slice(None)).items()}
NETS = {
    "teacher": make_net(LM(vocab=9, dim=12, mlp=16, heads=2, depth=1)),
    "student": make_net(LM(vocab=3, dim=8, mlp=8, heads=2, depth=1, tied=True)),
}
RNG = np.random.default_rng(0)
PARAMS = {
    role: jax.tree.map(
        lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype),
        net.shapes,
    )
    for role, net in NETS.items()
}
CTX = Ctx(BATCH, jax.random.key(0), 0, {})


def value(method, nets=NETS, params=PARAMS, batch=BATCH):
    """(Out, gradient in the student's weights)"""

    def loss(student):
        ctx = Ctx(batch, jax.random.key(0), 0, {})
        out = method.loss(bind(nets, {**params, "student": student}), ctx)
        return out.loss, out

    grad, out = jax.jit(jax.grad(loss, has_aux=True))(params["student"])
    return out, grad


@functools.partial(jax.jit, static_argnums=0)
def logits(role, params, tokens):
    return NETS[role].apply(params, tokens)


def test_spans_by_hand():
    """Sums over each block's two symbols, then the two-outcome KL at tau = 1."""
    out, _ = value(CrossTokenizerKD(temperature=1.0))

    def log_probs(role, name):
        z = np.asarray(logits(role, PARAMS[role], BATCH[name]), np.float64)[:, :-1]
        log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
        labels = np.asarray(BATCH[name])[:, 1:, None]
        return np.take_along_axis(log_q, labels, -1)[..., 0]

    log_p = log_probs("teacher", "teacher_tokens")
    log_q = log_probs("student", "tokens")[:, 1:].reshape(6, 4, 2).sum(-1)
    p = np.exp(log_p)
    q = np.exp(log_q)
    wanted = p * (log_p - log_q) + (1 - p) * (np.log1p(-p) - np.log1p(-q))
    np.testing.assert_allclose(out.loss, wanted.sum(), rtol=1e-4)
    assert out.count == 6 * 8 and out.metrics["divergence"][1] == 6 * 4


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_the_same_law_in_two_tokenizers_is_no_divergence(temperature):
    """The exact law symbol by symbol and in blocks: equal on every span, to rounding of
    log-probabilities of order 10.
    """
    method = CrossTokenizerKD(temperature=temperature)

    def loss(seed):
        chain = Markov(vocab=3, branch=2, length=10, seed=seed).logits
        nets = SimpleNamespace(teacher=DATA.logits, student=chain)
        return jax.jit(lambda: method.loss(nets, CTX).loss)()

    same = loss(0)
    other = loss(1)
    assert abs(same) <= 1e-3 * other and other > 1


def same_tokenizer():
    """Teacher and student with one tokenizer: every token is a span."""
    batch = {k: v for k, v in BATCH.items() if not k.startswith("teacher_")}
    span = jnp.where(batch["mask"] > 0, jnp.arange(10), -1)
    batch |= {
        "span": span,
        "teacher_span": span,
        "teacher_tokens": batch["tokens"],
        "teacher_mask": batch["mask"],
    }
    return {"teacher": NETS["student"], "student": NETS["student"]}, batch


@pytest.mark.parametrize(
    "method",
    [
        CrossTokenizerKD(),
        CrossTokenizerKD(temperature=1.0, divergence=JensenShannon()),
        ULD(hard_weight=0.0),
        SpanULD(hard_weight=0.0),
    ],
)
def test_nothing_to_learn_from_an_equal_teacher(method):
    nets, batch = same_tokenizer()
    out, grad = value(
        method,
        nets,
        {"teacher": PARAMS["student"], "student": PARAMS["student"]},
        batch,
    )
    assert abs(out.loss) <= 1e-4
    if not isinstance(method, ULD):  # which has a kink there
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grad)) <= 1e-3


def test_tokens_as_spans_say_less_than_whole_laws():
    nets, batch = same_tokenizer()
    other = jax.tree.map(lambda w: 2 * w[::-1], PARAMS["student"])
    out, _ = value(
        CrossTokenizerKD(temperature=1.0),
        nets,
        {"teacher": other, "student": PARAMS["student"]},
        batch,
    )
    p = logits("student", other, batch["tokens"])
    q = logits("student", PARAMS["student"], batch["tokens"])
    kl = np.asarray(jax.jit(ForwardKL())(p, q))[:, :-1]
    full = kl[np.asarray(batch["mask"])[:, 1:] > 0].sum()
    assert 0 < out.loss < full


@pytest.mark.full
@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_chunks_change_nothing(hard_weight):
    whole, grad = value(method := CrossTokenizerKD(hard_weight=hard_weight))
    parts, again = value(dataclasses.replace(method, chunk=2))
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(again)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [CrossTokenizerKD, ULD])
def test_hard_labels_alone_are_fine_tuning(method):
    out, grad = value(method(hard_weight=1.0))
    plain, expected = value(SFT())
    np.testing.assert_allclose(out.loss, plain.loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        grad,
        expected,
    )


def test_uld_pairs_targets_by_their_number_and_by_their_text():
    """Rows with as many pairs each: 48 targets times the mean over 24 pairs."""
    theirs = np.asarray(
        logits("teacher", PARAMS["teacher"], BATCH["teacher_tokens"])
    )
    ours = np.asarray(logits("student", PARAMS["student"], BATCH["tokens"]))
    distance = jax.jit(sorted_distance)
    out, _ = value(ULD(hard_weight=0.0))  # targets: teacher's 1-4, student's 2-9
    np.testing.assert_allclose(
        out.loss, 48 * distance(theirs[:, :4], ours[:, 1:5]).mean(), rtol=1e-5
    )
    out, _ = value(SpanULD(hard_weight=0.0))  # blocks begin at symbols 2, 4, 6, 8
    np.testing.assert_allclose(
        out.loss, 48 * distance(theirs[:, :4], ours[:, 1:9:2]).mean(), rtol=1e-5
    )
    assert out.metrics["divergence"][1] == 24 and out.count == 48


SPACED = {
    "tokens": jnp.asarray([[0, 1, 2, 0, 1, 2, 2, 1], [2, 2, 1, 0, 0, 1, 2, 0]]),
    "mask": jnp.asarray(
        [[0, 0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1]], jnp.float32
    ),
    "span": jnp.asarray([[-1, -1, 0, 0, 1, 2, 3, -1], [-1, -1, 0, 1, 1, 1, 2, 3]]),
    "teacher_tokens": jnp.asarray([[0, 4, 3, 2, 1, 0], [1, 2, 3, 4, 0, 2]]),
    "teacher_mask": jnp.asarray(
        [[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]], jnp.float32
    ),
    "teacher_span": jnp.asarray([[-1, 0, 1, 2, 3, -1], [-1, 0, 1, 2, 2, 3]]),
    "space": jnp.tile(jnp.asarray(np.packbits([1, 0, 0])), (2, 1)),
    "teacher_space": jnp.tile(jnp.asarray(np.packbits([0, 1, 0, 1, 0])), (2, 1)),
}


def chunk_log_probs(logits, tokens, span, mask, space):
    """In NumPy: log-probability of every span's tokens, and of a token of `space` after it where
    the text goes on.
    """
    law = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    out = np.zeros((len(law), 4))
    for row, number, t in np.ndindex(len(law), 4, tokens.shape[1]):
        if span[row, t] == number:
            out[row, number] += law[row, t - 1, tokens[row, t]]
            ends = t + 1 == tokens.shape[1] or span[row, t + 1] != number
            if ends and t + 1 < tokens.shape[1] and mask[row, t + 1]:
                out[row, number] += np.log(np.exp(law[row, t])[space].sum())
    return out


@pytest.mark.parametrize("chunk", [0, 2])
def test_a_word_ends_where_white_space_follows(x64, chunk):
    """ALM's binary cross-entropy at tau = 100 with the white space appended, in float64: its value
    is that of the divergence and the teacher's own entropy.
    """
    rng = np.random.default_rng(4)
    tau = 100.0
    theirs = rng.standard_normal((2, 6, 5))
    ours = rng.standard_normal((2, 8, 3))
    out = {k: np.asarray(v) for k, v in SPACED.items()}
    log_p = chunk_log_probs(
        theirs, *(out[f"teacher_{k}"] for k in ("tokens", "span", "mask")), [1, 3]
    )
    log_q = chunk_log_probs(
        ours, *(out[k] for k in ("tokens", "span", "mask")), [0]
    )
    p = np.exp(log_p / tau)
    q = np.exp(log_q / tau)
    official = -(p * np.log(q) + (1 - p) * np.log1p(-q)).sum()
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-p)).sum()

    def model(logits):
        return lambda *args, method="__call__", **_: (
            jnp.eye(logits.shape[-1])
            if method == "unembedding"
            else jnp.asarray(logits)
        )

    nets = SimpleNamespace(teacher=model(theirs), student=model(ours))
    value = lambda method: jax.jit(
        lambda: method.loss(nets, Ctx(SPACED, jax.random.key(0), 0, {})).loss
    )()
    loss = value(SpacedKD(chunk=chunk))
    np.testing.assert_allclose(loss / tau + entropy, official, rtol=1e-12)
    np.testing.assert_allclose(loss / tau, official - entropy, rtol=1e-9)
    plain = value(CrossTokenizerKD(chunk=chunk))
    assert abs(plain / loss - 1) > 0.01


def test_white_space_has_to_be_known():
    with pytest.raises(Refused, match=r"config.data: SpacedKD needs 'space' array"):
        check_needs(DATA.spec(), SpacedKD.needs, "SpacedKD", "config.data")


def uld(teacher, student, teacher_mask, mask, labels):
    """The authors' loss in NumPy: cross-entropy over all targets, and 1.5 times the mean over rows
    of the mean over a row's pairs of the distance of sorted probabilities.
    """
    softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    p = softmax(teacher)
    q = softmax(student)
    rows = []
    for i in range(len(q)):
        first = p[i, :-1][teacher_mask[i, 1:] > 0]
        second = q[i, :-1][mask[i, 1:] > 0]
        pairs = min(len(first), len(second))
        a, b = (np.sort(law[:pairs], -1)[:, ::-1] for law in (first, second))
        rows.append(
            np.abs(a - np.pad(b, ((0, 0), (0, a.shape[-1] - b.shape[-1]))))
            .sum(-1)
            .mean()
        )
    nll = -np.log(np.take_along_axis(q[:, :-1], labels[:, 1:, None], -1)[..., 0])
    return nll[mask[:, 1:] > 0].mean() + 1.5 * np.mean(rows)


def test_uld_is_the_mean_over_pairs(x64):
    """Samples of different lengths, the teacher's shorter in one and longer in the other."""
    rng = np.random.default_rng(3)
    theirs = rng.standard_normal((3, 6, 9))
    ours = rng.standard_normal((3, 10, 4))
    masks = {
        "teacher_mask": np.arange(6) >= np.array([[2], [1], [4]]),
        "mask": np.arange(10) >= np.array([[3], [8], [5]]),
    }
    tokens = rng.integers(0, 4, (3, 10))
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in masks.items()} | {
        "tokens": jnp.asarray(tokens)
    }
    batch["teacher_tokens"] = jnp.zeros((3, 6), jnp.int32)
    method = ULD()

    def mean(logits):
        nets = SimpleNamespace(
            teacher=lambda *_, **__: jnp.asarray(theirs),
            student=lambda *_, **__: logits,
        )
        out = method.loss(nets, Ctx(batch, jax.random.key(0), 0, {}))
        return out.loss / out.count / method.hard_weight

    wanted = uld(theirs, ours, masks["teacher_mask"], masks["mask"], tokens)
    found, grad = jax.jit(jax.value_and_grad(mean))(jnp.asarray(ours))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    step = np.zeros_like(ours)
    step[1, 7, 2] = 1e-6
    slope = [
        uld(
            theirs, ours + sign * step, masks["teacher_mask"], masks["mask"], tokens
        )
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(
        grad[1, 7, 2], (slope[0] - slope[1]) / 2e-6, rtol=1e-7
    )


def test_uld_ignores_names_of_tokens():
    renamed = {
        **NETS,
        "teacher": fixed_net(
            lambda tokens, **_: NETS["teacher"].apply(PARAMS["teacher"], tokens)[
                ..., ::-1
            ]
        ),
    }
    np.testing.assert_allclose(
        value(ULD(), renamed, {**PARAMS, "teacher": {}})[0].loss,
        value(ULD())[0].loss,
        rtol=1e-6,
    )


@pytest.mark.parametrize("method", [CrossTokenizerKD(), ULD(), SpanULD()])
def test_five_steps(method):
    states, metrics = first_steps(method, NETS, optax.adam(1e-2), PARAMS, BATCH)
    losses = [row["student/loss"] for row in metrics]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    jax.tree.map(
        np.testing.assert_array_equal,
        states[-1].frozen["teacher"],
        PARAMS["teacher"],
    )


def test_refusals():
    CrossTokenizerKD().check(NETS, DATA)
    needs = CrossTokenizerKD.needs
    check_needs(DATA.spec(), needs, "CrossTokenizerKD", "config.data")
    with pytest.raises(
        Refused, match=r"config.data: CrossTokenizerKD needs 'span' int \[B T\]"
    ):
        check_needs(Markov().spec(), needs, "CrossTokenizerKD", "config.data")
    with pytest.raises(Refused, match=r"method.chunk=2: expected 0"):
        ULD(chunk=2)
    with pytest.raises(Refused, match=r"method.top_k=2: expected 0"):
        CrossTokenizerKD(top_k=2)
