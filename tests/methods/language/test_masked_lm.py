"""Masked-token prediction: which tokens are hidden, by what, and that only those count."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.methods.language.masked_lm import MaskedLM
from jaxdistill.models.heads import Projection
from jaxdistill.models.language.bert import BertClassifier

MASK = 7
VOCAB = 7
TOKENS = jax.random.randint(jax.random.key(3), (400, 50), 0, VOCAB)
# rows of 1 to 50 real tokens
REAL = jnp.arange(50) < jnp.arange(400)[:, None] % 50 + 1


def corrupt(**fields):
    return MaskedLM(mask_token=MASK, vocab=VOCAB, **fields).corrupt(
        TOKENS, REAL, jax.random.key(0)
    )


def share(what, among) -> tuple[float, float]:
    """(share, five standard errors at a probability of a half) of `what` among the tokens of
    `among`.
    """
    n = int(jnp.sum(among))
    return float(jnp.sum(what & among)) / n, 2.5 * n**-0.5


def test_shares_are_those_of_the_paper():
    shown, chosen = corrupt()
    assert not jnp.any(chosen & ~REAL)
    for what, among, expected in [
        (chosen, REAL, 0.15),
        (shown == MASK, chosen, 0.8),
        (shown == TOKENS, chosen, 0.1 + 0.1 / VOCAB),  # kept, or replaced by itself
    ]:
        found, error = share(what, among)
        assert abs(found - expected) < error
    other = chosen & (shown != MASK) & (shown != TOKENS)
    assert set(np.unique(shown[other])) == set(range(VOCAB))


def test_what_is_not_chosen_stays():
    shown, chosen = corrupt()
    assert jnp.all(jnp.where(chosen, True, shown == TOKENS))
    shown, chosen = corrupt(rate=1.0, masked=1.0, random=0.0)
    assert jnp.all(chosen == REAL) and jnp.all((shown == MASK) == REAL)
    shown, chosen = corrupt(rate=1.0, masked=0.0, random=0.0)
    assert jnp.all(shown == TOKENS) and jnp.all(chosen == REAL)


def test_loss_is_the_sum_over_the_chosen_and_their_count():
    """With states that say the true token, the loss is 0; with states that say nothing, log V for
    each chosen token.
    """
    method = MaskedLM(mask_token=MASK, vocab=VOCAB)
    ctx = Ctx({"tokens": TOKENS, "mask": REAL}, jax.random.key(0), jnp.int32(0), {})
    student = lambda shown, *, mask, method: jax.nn.one_hot(TOKENS, VOCAB)
    sure, flat = (
        method.loss(
            SimpleNamespace(student=student, head=lambda x, scale=scale: scale * x),
            ctx,
        )
        for scale in (100.0, 0.0)
    )
    assert sure.loss < 1e-3 and sure.count == flat.count > 0
    np.testing.assert_allclose(flat.loss, flat.count * np.log(VOCAB), rtol=1e-5)


@pytest.mark.full
def test_filler_is_invisible_and_a_prefix_names_other_fields():
    """Two tokens more that the mask leaves out change nothing; the classifier's own head has no
    gradient.
    """
    nets = {
        "student": make_net(
            BertClassifier(
                vocab=VOCAB + 1,
                dim=8,
                mlp=8,
                heads=2,
                depth=2,
                max_length=16,
                classes=2,
            )
        ),
        "head": make_net(Projection(inputs=8, outputs=VOCAB)),
    }
    params = {
        name: net.init(jax.random.key(i))
        for i, (name, net) in enumerate(nets.items())
    }
    tokens = TOKENS[:4, :8]
    real = jnp.ones((4, 8), bool)
    method = MaskedLM(
        mask_token=MASK,
        vocab=VOCAB,
        rate=1.0,
        masked=1.0,
        random=0.0,
        prefix="general_",
    )
    pad = lambda x, value: jnp.pad(x, ((0, 0), (0, 2)), constant_values=value)
    loss = lambda p, t, m: method.loss(
        bind(nets, p),
        Ctx({"general_tokens": t, "general_mask": m}, jax.random.key(0), 0, {}),
    )
    plain = loss(params, tokens, real)
    padded = loss(params, pad(tokens, 3), pad(real, False))
    np.testing.assert_allclose(padded.loss, plain.loss, rtol=1e-5)
    assert padded.count == plain.count == 32
    grads = jax.grad(lambda p: loss(p, tokens, real).loss)(params)
    size = lambda tree: max(float(jnp.abs(w).max()) for w in jax.tree.leaves(tree))
    assert (
        size(grads["student"]["classifier"])
        == size(grads["student"]["pooler"])
        == 0
        < size(grads["head"])
    )


@pytest.mark.parametrize(
    "fields", [dict(rate=0.0), dict(masked=0.8, random=0.3), dict(random=-0.1)]
)
def test_refusals(fields):
    with pytest.raises(Refused, match="expected shares"):
        MaskedLM(mask_token=MASK, vocab=VOCAB, **fields)
