from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.types import Ctx
from jaxdistill.methods.language.next_token import NextToken

TOKENS = jnp.array([[1, 2, 3, 0], [4, 0, 1, 2]])
MASK = jnp.array([[0, 0, 1, 1], [0, 1, 0, 0]], jnp.float32)


def loss(logits, mask=MASK):
    nets = SimpleNamespace(student=lambda tokens, **_: logits)
    return NextToken().turns[0].loss(nets, Ctx({"tokens": TOKENS, "mask": mask}, jax.random.key(0), 0, {}))


def test_sum_of_target_log_probabilities():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 5))
    log_q = jax.nn.log_softmax(logits)
    out = loss(logits)
    np.testing.assert_allclose(out.loss, -(log_q[0, 1, 3] + log_q[0, 2, 0] + log_q[1, 0, 0]), rtol=1e-6)
    assert out.count == 3


def test_uniform_predictions_cost_log_vocabulary():
    out = loss(jnp.zeros((2, 4, 5)))
    np.testing.assert_allclose(out.loss / out.count, np.log(5), rtol=1e-6)


def test_gradient_reaches_positions_before_targets_only():
    grad = jax.grad(lambda z: loss(z).loss)(jnp.zeros((2, 4, 5)))
    np.testing.assert_array_equal(jnp.abs(grad).sum(-1) > 0, MASK[:, [1, 2, 3, 0]] > 0)


def test_an_empty_mask_is_zero():
    out = loss(jnp.ones((2, 4, 5)), jnp.zeros((2, 4)))
    assert out.loss == 0 and out.count == 0
