"""SIM on Gaussians: the gradient of any distance between scores at a fixed distribution of noised
samples.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.build import resolve
from jaxdistill.methods.distribution.sid import SiD
from jaxdistill.methods.distribution.sim import SIM
from tests.methods.distribution.gaussians import (
    ALPHA,
    SIGMA,
    C,
    M,
    Scaled,
    grid,
    networks,
)


def test_sim_is_the_gradient_of_a_huber_distance_at_a_held_sampling_law(x64):
    net, (z, eps, w) = networks(Scaled(), 1.69), grid()
    method = SIM(process=Scaled(), huber=0.3, scale=1.0)
    t = jnp.full(len(z), SIGMA)
    held = Scaled().add_noise(M + C * z, jnp.asarray(eps), t)

    def loss(m, c):
        x0 = m + c * z
        xt = Scaled().add_noise(x0, jnp.asarray(eps), t)
        return jnp.sum(
            w * method.identity(x0, net.teacher(xt, t).x0, net.fake(xt, t).x0)
        )

    def distance(m, c):
        gap = (
            networks(Scaled(), 1.69, m, c).fake(held, t).x0
            - net.teacher(held, t).x0
        )
        return jnp.sum(w * jnp.sqrt(gap[:, 0] ** 2 + 0.3**2))

    np.testing.assert_allclose(
        jax.grad(loss, (0, 1))(M, C), jax.grad(distance, (0, 1))(M, C), rtol=1e-6
    )


def losses(method, net, m=M, c=C):
    z, eps, w = grid()
    t = jnp.full(len(z), SIGMA)

    def loss(m, c):
        x0 = m + c * z
        xt = Scaled().add_noise(x0, jnp.asarray(eps), t)
        return jnp.sum(
            w * method.identity(x0, net.teacher(xt, t).x0, net.fake(xt, t).x0)
        )

    return np.array(jax.grad(loss, (0, 1))(m, c))


def test_equal_scores_leave_the_student_alone(x64):
    net = networks(Scaled(), (ALPHA * C) ** 2 + SIGMA**2, m=0.0)
    np.testing.assert_allclose(
        losses(SIM(process=Scaled()), net, m=0.0), 0.0, atol=1e-9
    )


def test_a_wide_huber_distance_is_the_squared_one(x64):
    """c -> inf: c times the loss has SiD's gradient at alpha = 1, without SiD's weight."""
    net = networks(Scaled(), 1.69)
    huber = 1e4
    got = huber * losses(SIM(process=Scaled(), huber=huber, scale=1.0), net)

    class Unweighted(SiD):
        def identity(self, x0, real, fake):
            gap = real - fake
            return jnp.sum(gap * (fake - x0), axis=1)

    want = losses(Unweighted(process=Scaled(), alpha=1.0), net)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.abs(want).max() > 0.1


def test_the_distance_is_in_units_of_the_data(x64):
    """c grows as the root of the number of dimensions: a sample copied into n of them has
    n / sqrt(n) times the loss.
    """
    draw = lambda key: jax.random.normal(jax.random.key(key), (5, 1))
    x0, real, fake = (draw(key) for key in range(3))
    method = SIM(huber=0.2)
    copied = (jnp.tile(value, (1, 9)) for value in (x0, real, fake))
    np.testing.assert_allclose(
        method.identity(*copied), 3 * method.identity(x0, real, fake), rtol=1e-12
    )


def test_trains_and_moves_what_it_should(three_steps):
    three_steps(SIM())


def test_the_name_in_earlier_configs_is_read():
    assert resolve("methods.distribution._family:SIM") is SIM
