import dataclasses
from math import log
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.tsd_kd import TSDKD, Released
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.divergence import JensenShannon
from jaxdistill.objectives.ranking import plackett_luce, reranked
from jaxdistill.objectives.selection import entropy
from tools.first_steps import first_steps

RNG = np.random.default_rng(0)
P, Q = (
    jnp.asarray(2 * RNG.standard_normal((2, 6, 7)), jnp.float32) for _ in range(2)
)
BATCH = {
    "tokens": jnp.asarray(RNG.integers(0, 7, (2, 6)), jnp.int32),
    "mask": jnp.array([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]], jnp.float32),
}
MASK = np.array(BATCH["mask"][:, 1:]) > 0
PLAIN = TSDKD(ranking_weight=0.0, gate_temperature=0.0, entropy_weight=0.0)


def loss(method, student=Q, teacher=P, batch=BATCH):
    nets = SimpleNamespace(
        teacher=lambda tokens, **_: teacher, student=lambda tokens, **_: student
    )
    return method.loss(nets, Ctx(batch, jax.random.key(0), 0, {}))


def test_without_its_components_it_is_gkd():
    for beta in (0.5, 0.9, 1.0):
        a = loss(dataclasses.replace(PLAIN, divergence=JensenShannon(beta=beta)))
        b = loss(GKD(divergence=JensenShannon(beta=beta)))
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
        assert a.count == b.count == 6


def test_the_three_terms():
    """By hand, in float64: the opener is one token a row here, and the uncertain ones are the
    batch's most uncertain.
    """
    method = TSDKD(candidates=3, share=0.2)
    p = np.asarray(P, np.float64)[:, :-1]
    q = np.asarray(Q, np.float64)[:, :-1]
    law = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    h = lambda z: -(law(z) * np.log(law(z))).sum(-1)
    gate = 1 / (1 + np.exp(h(p) - h(q)))
    direct = (np.asarray(JensenShannon(beta=0.9)(P, Q))[:, :-1] * gate)[MASK].mean()
    before = np.cumsum(np.where(MASK, h(q), 0), 1) - np.where(MASK, h(q), 0)
    opening = MASK & (
        before < 0.19999 * np.where(MASK, h(q), 0).sum(1, keepdims=True)
    )
    ranking = np.asarray(plackett_luce(reranked(P, Q, 3)))[:, :-1][opening].mean()
    least = h(q)[MASK & (h(q) >= np.quantile(h(q)[MASK], 0.8))].mean()
    out = loss(method)
    np.testing.assert_allclose(
        out.loss / out.count, direct + 0.1 * ranking + least, rtol=1e-5
    )
    share = lambda name: out.metrics[name][0] / out.metrics[name][1]
    np.testing.assert_allclose(
        [share("ranking"), share("uncertain")], [ranking, least], rtol=1e-5
    )
    np.testing.assert_allclose(share("opener"), opening.sum() / 6, rtol=1e-6)
    np.testing.assert_allclose(share("gate"), gate[MASK].mean(), rtol=1e-5)


def test_laws_are_matched_on_the_opener_only_where_asked():
    a, b = (
        loss(dataclasses.replace(PLAIN, direct_on=where))
        for where in ("all", "opener")
    )
    h = np.where(MASK, entropy(Q)[:, :-1], 0)
    opening = MASK & (np.cumsum(h, 1) - h < 0.09999 * h.sum(1, keepdims=True))
    np.testing.assert_allclose(
        b.loss,
        np.asarray(JensenShannon(beta=0.9)(P, Q))[:, :-1][opening].sum(),
        rtol=1e-5,
    )
    assert a.count == b.count and b.loss < a.loss


def test_the_gate_has_no_gradient():
    """The gradient is that of the JSD with the gate as a constant."""
    method = dataclasses.replace(PLAIN, gate_temperature=1.0)
    gate = jax.nn.sigmoid(entropy(Q) - entropy(P))[:, :-1]
    plain = lambda z: jnp.sum(
        jnp.where(MASK, gate * JensenShannon(beta=0.9)(P, z)[:, :-1], 0)
    )
    np.testing.assert_allclose(
        jax.grad(lambda z: loss(method, z).loss)(Q), jax.grad(plain)(Q), atol=1e-6
    )


def test_entropy_of_certain_and_ignorant_students():
    method = dataclasses.replace(PLAIN, entropy_weight=1.0)
    term = lambda z: (loss(method, z).loss - loss(PLAIN, z).loss) / 6
    np.testing.assert_allclose(term(jnp.zeros_like(Q)), log(7), rtol=1e-5)
    np.testing.assert_allclose(
        term(100 * jax.nn.one_hot(BATCH["tokens"], 7)), 0, atol=1e-5
    )
    assert term(Q - 0.1 * jax.grad(term)(Q)) < term(Q)


def test_one_candidate_teaches_nothing_and_the_rest_gets_no_gradient():
    term = lambda k: (
        lambda z: (
            loss(
                dataclasses.replace(PLAIN, ranking_weight=1.0, candidates=k), z
            ).loss
            - loss(PLAIN, z).loss
        )
    )
    value, grad = jax.value_and_grad(term(1))(Q)
    assert value == 0 and jnp.abs(grad).max() <= 1e-6
    grad = jax.grad(term(3))(Q)
    outside = jnp.sort(Q, -1)[..., -3:-2] > Q
    assert jnp.abs(jnp.where(outside, grad, 0)).max() <= 1e-6 < jnp.abs(grad).max()


def test_padding_changes_nothing():
    wild = lambda z: (
        jnp.where(jnp.asarray(BATCH["mask"]).at[:, 1].set(1)[..., None] > 0, z, 5.0)
        .at[1, 3:]
        .set(-3.0)
    )
    value = jax.value_and_grad(lambda z, t: loss(TSDKD(), z, t).loss)
    a = value(Q, P)
    b = value(wild(Q), wild(P))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    # position t predicts token t + 1
    assert not a[1][1, 3:].any() and not b[1][1, 3:].any()


def test_the_released_ranking_lowers_the_teachers_favourite():
    scores = jnp.zeros(5)
    published = jax.grad(TSDKD().ranking_loss)(scores)
    released = jax.grad(Released().ranking_loss)(scores)
    assert published[0] < 0 < released[0]
    s = jnp.asarray(RNG.standard_normal(5), jnp.float32)
    prefix = jnp.sum(jax.lax.cumlogsumexp(s) - s)  # what the code has
    np.testing.assert_allclose(Released().ranking_loss(s), prefix, rtol=1e-6)


NETS = {
    "teacher": make_net(LM(vocab=7, dim=12, mlp=16, heads=2, depth=2)),
    "student": make_net(LM(vocab=7, dim=8, mlp=8, heads=2, depth=1)),
}
PARAMS = {
    r: jax.tree.map(
        lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype),
        net.shapes,
    )
    for r, net in NETS.items()
}


def train(method, steps=5):
    states, metrics = first_steps(
        method,
        NETS,
        optax.sgd(0.1),
        PARAMS,
        {**BATCH, "prompt": BATCH["tokens"][:, :2]},
        steps,
    )
    return [row["student/loss"] for row in metrics], states[-1].params["student"]


def test_five_steps_follow_gkd_without_the_components():
    a = train(PLAIN)
    b = train(GKD(divergence=JensenShannon(beta=0.9), on_policy=1.0))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        a[1],
        b[1],
    )


def test_refusals():
    with pytest.raises(Refused, match=r"direct_on='start': expected all or opener"):
        TSDKD(direct_on="start")
    with pytest.raises(Refused, match=r"share=0"):
        TSDKD(share=0.0)
    with pytest.raises(Refused, match=r"chunk=4"):
        TSDKD(chunk=4)
