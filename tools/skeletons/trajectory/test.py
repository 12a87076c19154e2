"""My method: the specification's checks, identities and limits first."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.methods.trajectory.my_method import MyMethod


def test_a_student_that_is_the_trajectorys_end_has_no_loss(x64, gaussian, context):
    g = gaussian()
    method = MyMethod(solver_steps=100)
    at = lambda student: (
        method.loss(
            SimpleNamespace(teacher=g.denoise, student=student),
            context(jnp.zeros((64, 2))),
        ).loss
    )
    # 100 steps of Heun's are not the whole way
    assert at(g.consistent) < 1e-6 < 1e-2 < at(g.denoise)


def test_what_is_trained_is_what_samples(x64, gaussian, context):
    g = gaussian()
    noise = jax.random.normal(jax.random.key(3), (50, 2))
    x = MyMethod().sample(g.consistent, noise, None, jax.random.key(0), 1)
    np.testing.assert_allclose(x, 0.7 + 0.4 * noise, atol=1e-12)


def test_three_steps(three_steps):
    three_steps(MyMethod())
