"""My method: the specification's checks, identities and limits first."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.types import Ctx
from jaxdistill.methods.language.my_method import MyMethod

RNG = np.random.default_rng(0)
TEACHER, STUDENT = (
    jnp.asarray(RNG.standard_normal((2, 5, 7)), jnp.float32) for _ in range(2)
)
BATCH = {
    "tokens": jnp.asarray(RNG.integers(0, 7, (2, 5))),
    "mask": jnp.array([[0, 0, 1, 1, 1], [0, 1, 0, 1, 0]], jnp.float32),
}
TARGETS = BATCH["mask"][:, 1:] > 0


def loss(method, student=STUDENT):
    """The method's when the networks say these logits [B T V]."""
    nets = SimpleNamespace(
        teacher=lambda tokens, **_: TEACHER, student=lambda tokens, **_: student
    )
    return method.turns[0].loss(nets, Ctx(BATCH, jax.random.key(0), 0, {}))


def test_a_student_with_the_teachers_laws_has_no_loss():
    value, gradient = jax.value_and_grad(
        lambda logits: loss(MyMethod(), logits).loss
    )(TEACHER + 3.0)
    assert (
        abs(value) < 1e-5
        and abs(gradient).max() < 1e-5
        and loss(MyMethod()).loss > 1e-2
    )


def test_only_targets_count():
    out = loss(MyMethod())
    laws = jax.nn.softmax(TEACHER)
    log_laws = jax.nn.log_softmax(TEACHER) - jax.nn.log_softmax(STUDENT)
    np.testing.assert_allclose(
        out.loss, jnp.sum(laws * log_laws, -1)[:, :-1][TARGETS].sum(), rtol=1e-5
    )
    assert out.count == TARGETS.sum() == 5
