"""Supervised fine-tuning: the loss is the mean cross-entropy of the marked targets, and nothing else counts."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Ctx
from jaxdistill.methods.language.sft import SFT

TOKENS = jnp.array([[1, 2, 0, 3], [2, 2, 1, 0]])
MASK = jnp.array([[0, 1, 1, 1], [0, 0, 1, 0]])


def out(logits, mask=MASK, **batch):
    ctx = Ctx({"tokens": TOKENS, "mask": mask, **batch}, jax.random.key(0), jnp.int32(0), {})
    return SFT().loss(SimpleNamespace(student=lambda tokens, **kw: logits), ctx)


@pytest.fixture
def logits():
    return jax.random.normal(jax.random.key(0), (2, 4, 5))


def test_loss_is_the_sum_over_targets_and_their_count(logits):
    logp = jax.nn.log_softmax(logits)
    expected = -sum(logp[b, t - 1, TOKENS[b, t]] for b in range(2) for t in range(1, 4) if MASK[b, t])
    got = out(logits)
    np.testing.assert_allclose(got.loss, expected, rtol=1e-6)
    assert got.count == 4


def test_gradient_is_q_minus_one_hot_on_targets_and_zero_elsewhere(logits):
    grad = jax.grad(lambda z: out(z).loss)(logits)
    for b in range(2):
        for t in range(4):
            target = t < 3 and MASK[b, t + 1]
            expected = jax.nn.softmax(logits[b, t]) - jax.nn.one_hot(TOKENS[b, min(t + 1, 3)], 5) if target else jnp.zeros(5)
            np.testing.assert_allclose(grad[b, t], expected, atol=1e-6)


def test_a_certain_model_has_no_loss_and_full_accuracy():
    sure = jnp.roll(jax.nn.one_hot(TOKENS, 5), -1, axis=1) * 100.0
    got = out(sure)
    assert got.loss < 1e-6 and got.metrics["accuracy"] == got.count


def test_packing_reaches_the_network():
    seen = {}

    def student(tokens, **kw):
        seen.update(kw)
        return jnp.zeros((2, 4, 5))

    segments, positions = jnp.ones((2, 4), jnp.int32), jnp.zeros((2, 4), jnp.int32)
    batch = {"tokens": TOKENS, "mask": MASK, "segments": segments, "positions": positions}
    SFT().loss(SimpleNamespace(student=student), Ctx(batch, jax.random.key(0), jnp.int32(0), {}))
    assert seen["segments"] is segments and seen["positions"] is positions
