import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import fixed_net, make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.language import Markov
from jaxdistill.data.two_tokenizers import Blocks
from jaxdistill.methods.language.cross_tokenizer_kd import ULD, CrossTokenizerKD, SpanULD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.lm import LM
from jaxdistill.objectives.divergence import forward_kl, sorted_distance
from tools.first_steps import first_steps

DATA = Blocks(vocab=3, branch=2, length=10, batch_size=6)
BATCH = {k: jnp.asarray(v) for k, v in DATA.batch(0, slice(None)).items()}
NETS = {
    "teacher": make_net(LM(vocab=9, dim=12, mlp=16, heads=2, depth=1)),
    "student": make_net(LM(vocab=3, dim=8, mlp=8, heads=2, depth=1, tied=True)),
}
RNG = np.random.default_rng(0)
PARAMS = {role: jax.tree.map(lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype), net.shapes) for role, net in NETS.items()}
CTX = Ctx(BATCH, jax.random.key(0), 0, {})


def value(method, nets=NETS, params=PARAMS, batch=BATCH):
    """(Out, gradient in the student's weights)"""
    out = lambda p: method.loss(bind(nets, {**params, "student": p}), Ctx(batch, jax.random.key(0), 0, {}))
    return jax.jit(lambda p: (out(p), jax.grad(lambda p: out(p).loss)(p)))(params["student"])


def test_spans_by_hand():
    """Sums over each block's two symbols, then the two-outcome KL at tau = 1."""
    out, _ = value(CrossTokenizerKD(temperature=1.0))
    law = lambda role, name: jax.nn.log_softmax(NETS[role].apply(PARAMS[role], BATCH[name]))[:, :-1]
    own = lambda role, name: jnp.take_along_axis(law(role, name), BATCH[name][:, 1:, None], -1)[..., 0]
    log_p, log_q = own("teacher", "teacher_tokens"), own("student", "tokens")[:, 1:].reshape(6, 4, 2).sum(-1)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    wanted = p * (log_p - log_q) + (1 - p) * (jnp.log1p(-p) - jnp.log1p(-q))
    np.testing.assert_allclose(out.loss, wanted.sum(), rtol=1e-4)
    assert out.count == 6 * 8 and out.metrics["divergence"][1] == 6 * 4


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_the_same_law_in_two_tokenizers_is_no_divergence(temperature):
    """The exact law symbol by symbol and in blocks: equal on every span, to rounding of log-probabilities of order 10."""
    chain = lambda seed: Markov(vocab=3, branch=2, length=10, seed=seed).logits
    loss = lambda seed: CrossTokenizerKD(temperature=temperature).loss(SimpleNamespace(teacher=DATA.logits, student=chain(seed)), CTX).loss
    assert abs(loss(0)) <= 1e-3 * loss(1) and loss(1) > 1


def same_tokenizer():
    """Teacher and student with one tokenizer: every token is a span."""
    batch = {k: v for k, v in BATCH.items() if not k.startswith("teacher_")}
    span = jnp.where(batch["mask"] > 0, jnp.arange(10), -1)
    batch |= {"span": span, "teacher_span": span, "teacher_tokens": batch["tokens"], "teacher_mask": batch["mask"]}
    return {"teacher": NETS["student"], "student": NETS["student"]}, batch


@pytest.mark.parametrize(
    "method", [CrossTokenizerKD(), CrossTokenizerKD(temperature=1.0, kind="jsd"), ULD(hard_weight=0.0), SpanULD(hard_weight=0.0)]
)
def test_nothing_to_learn_from_an_equal_teacher(method):
    nets, batch = same_tokenizer()
    out, grad = value(method, nets, {"teacher": PARAMS["student"], "student": PARAMS["student"]}, batch)
    assert abs(out.loss) <= 1e-4
    if not isinstance(method, ULD):  # which has a kink there
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grad)) <= 1e-3


def test_tokens_as_spans_say_less_than_whole_laws():
    nets, batch = same_tokenizer()
    other = jax.tree.map(lambda w: 2 * w[::-1], PARAMS["student"])
    out, _ = value(CrossTokenizerKD(temperature=1.0), nets, {"teacher": other, "student": PARAMS["student"]}, batch)
    law = lambda params: NETS["student"].apply(params, batch["tokens"])
    full = jnp.where(batch["mask"][:, 1:] > 0, forward_kl(law(other), law(PARAMS["student"]))[:, :-1], 0).sum()
    assert 0 < out.loss < full


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
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grad, expected)


def test_uld_pairs_targets_by_their_number_and_by_their_text():
    law = lambda role, name: NETS[role].apply(PARAMS[role], BATCH[name])[:, :-1]
    theirs, ours = law("teacher", "teacher_tokens"), law("student", "tokens")
    out, _ = value(ULD(hard_weight=0.0))  # targets: teacher's 1-4, student's 2-9
    np.testing.assert_allclose(out.loss, sorted_distance(theirs[:, :4], ours[:, 1:5]).sum(), rtol=1e-5)
    out, _ = value(SpanULD(hard_weight=0.0))  # blocks begin at symbols 2, 4, 6, 8
    np.testing.assert_allclose(out.loss, sorted_distance(theirs[:, :4], ours[:, 1::2]).sum(), rtol=1e-5)
    assert out.metrics["divergence"][1] == 24 and out.count == 48


def test_uld_ignores_names_of_tokens():
    renamed = {**NETS, "teacher": fixed_net(lambda tokens, **_: NETS["teacher"].apply(PARAMS["teacher"], tokens)[..., ::-1])}
    np.testing.assert_allclose(value(ULD(), renamed, {**PARAMS, "teacher": {}})[0].loss, value(ULD())[0].loss, rtol=1e-6)


@pytest.mark.parametrize("method", [CrossTokenizerKD(), ULD(), SpanULD()])
def test_five_steps(method):
    states, metrics = first_steps(method, NETS, optax.adam(1e-2), PARAMS, BATCH)
    losses = [row["student/loss"] for row in metrics]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    jax.tree.map(np.testing.assert_array_equal, states[-1].frozen["teacher"], PARAMS["teacher"])


def test_refusals():
    CrossTokenizerKD().check(NETS, DATA)
    with pytest.raises(Refused, match="Markov has no span; expected text in both tokenizers"):
        CrossTokenizerKD().check(NETS, Markov())
    with pytest.raises(Refused, match=r"method.chunk=2: expected 0"):
        ULD(chunk=2)
    with pytest.raises(Refused, match=r"method.top_k=2: expected 0"):
        CrossTokenizerKD(top_k=2)
