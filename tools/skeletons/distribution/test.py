"""My method: the specification's checks, identities and limits first."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.my_method import MyMethod

AT = 0.6


def gradient(method, real, fake, context):
    """Of the loss in the mean of the student's samples, at one noise level."""
    noise = jax.random.normal(jax.random.key(5), (500, 1))
    ctx = context(jnp.zeros((500, 1)), xt=noise, t=jnp.ones(500))

    def loss(mean):
        student = lambda x, t, cond=None: real.process.from_x0(mean + 0.4 * x, x, t)
        return method.student_loss(
            SimpleNamespace(
                student=student, teacher=real.denoise, fake=fake.denoise
            ),
            ctx,
        ).loss

    return jax.grad(loss)(0.0)


def test_a_student_with_the_teachers_distribution_stays(x64, gaussian, context):
    method = MyMethod(power=1.0)
    assert gradient(method, gaussian(), gaussian(), context) == 0
    shifted = gaussian(mean=-0.2)
    assert abs(gradient(method, gaussian(), shifted, context)) > 1e-2


def test_the_gradient_is_weighted_by_the_noise_level(x64, gaussian, context):
    times = Uniform(low=AT, high=AT)
    at = lambda method: gradient(method, gaussian(), gaussian(mean=-0.2), context)
    plain = at(DiffInstruct(match_times=times))
    np.testing.assert_allclose(
        at(MyMethod(match_times=times, power=0.0)), plain, rtol=1e-12
    )
    np.testing.assert_allclose(
        at(MyMethod(match_times=times, power=2.0)), AT**2 * plain, rtol=1e-12
    )


def test_three_steps(three_steps):
    three_steps(MyMethod())
