"""Supervised fine-tuning: the loss is the mean cross-entropy of the marked targets, and nothing
else counts.
"""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx
from jaxdistill.methods.language.sequence_kd import SequenceKD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.methods.language.step_by_step import StepByStep
from jaxdistill.methods.language.universalner import UniversalNER
from jaxdistill.models.language.lm import LM

TOKENS = jnp.array([[1, 2, 0, 3], [2, 2, 1, 0]])
MASK = jnp.array([[0, 1, 1, 1], [0, 0, 1, 0]])


def out(logits, mask=MASK, **batch):
    ctx = Ctx(
        {"tokens": TOKENS, "mask": mask, **batch},
        jax.random.key(0),
        jnp.int32(0),
        {},
    )
    return SFT().loss(SimpleNamespace(student=lambda tokens, **kw: logits), ctx)


@pytest.fixture
def logits():
    return jax.random.normal(jax.random.key(0), (2, 4, 5))


def test_loss_is_the_sum_over_targets_and_their_count(logits):
    logp = jax.nn.log_softmax(logits)
    expected = -sum(
        logp[b, t - 1, TOKENS[b, t]]
        for b in range(2)
        for t in range(1, 4)
        if MASK[b, t]
    )
    got = out(logits)
    np.testing.assert_allclose(got.loss, expected, rtol=1e-6)
    assert got.count == 4


def test_gradient_is_q_minus_one_hot_on_targets_and_zero_elsewhere(logits):
    grad = jax.grad(lambda z: out(z).loss)(logits)
    for b in range(2):
        for t in range(4):
            target = t < 3 and MASK[b, t + 1]
            expected = (
                jax.nn.softmax(logits[b, t])
                - jax.nn.one_hot(TOKENS[b, min(t + 1, 3)], 5)
                if target
                else jnp.zeros(5)
            )
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

    segments = jnp.ones((2, 4), jnp.int32)
    positions = jnp.zeros((2, 4), jnp.int32)
    batch = {
        "tokens": TOKENS,
        "mask": MASK,
        "segments": segments,
        "positions": positions,
    }
    SFT().loss(
        SimpleNamespace(student=student),
        Ctx(batch, jax.random.key(0), jnp.int32(0), {}),
    )
    assert seen["segments"] is segments and seen["positions"] is positions


def test_chunks_change_nothing():
    """Loss, count, accuracy and the gradient in the network's weights, of every method that learns
    so; float32.
    """
    net = make_net(LM(vocab=7, dim=8, mlp=8, heads=2, depth=1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), s.dtype),
        net.shapes,
    )
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 7, (3, 6))),
        "mask": jnp.asarray(rng.integers(0, 2, (3, 6)), jnp.float32),
    }
    batch |= {f"explain_{k}": v[::-1] for k, v in batch.items()}

    def value(method):
        def loss(params):
            ctx = Ctx(batch, jax.random.key(0), jnp.int32(0), {})
            out = method.loss(bind({"student": net}, {"student": params}), ctx)
            return out.loss, out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    for cls in (SFT, SequenceKD, StepByStep, UniversalNER):
        whole = value(cls())
        parts = value(cls(chunk=3))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            whole,
            parts,
        )


@pytest.mark.parametrize("cls", [SFT, StepByStep])
def test_chunks_never_hold_the_vocabulary(cls):
    """No array of the program has a whole row of logits."""
    vocab = 1009
    chunk = 64
    net = make_net(LM(vocab=vocab, dim=8, mlp=8, heads=2, depth=1))
    shapes = {
        "tokens": jax.ShapeDtypeStruct((2, 6), jnp.int32),
        "mask": jax.ShapeDtypeStruct((2, 6), jnp.float32),
    }
    shapes |= {f"explain_{k}": v for k, v in shapes.items()}

    def program(method):
        loss = lambda p, b: (
            method.loss(
                bind({"student": net}, {"student": p}),
                Ctx(b, jax.random.key(0), jnp.int32(0), {}),
            ).loss
        )
        return str(jax.make_jaxpr(jax.grad(loss))(net.shapes, shapes))

    row = re.compile(rf"\[(2,6|12),{vocab}\]")
    assert row.search(program(cls())) and not row.search(program(cls(chunk=chunk)))
