"""SiD on Gaussians: the loss against the exact gradient of the Fisher divergence, the two estimates
that it is made of, and what its gradient flows through.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.build import resolve
from jaxdistill.diffusion.process import EDM
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution.sid import SiD
from jaxdistill.objectives import score
from tests.methods.distribution.gaussians import (
    ALPHA,
    SIGMA,
    C,
    M,
    Scaled,
    grid,
    networks,
)

# of reverse KL at the point (M, C) for q_t = N(0, 1.69): dJ/dm, dJ/dc (test_uni_instruct.TABLE)
REVERSE_KL = (0.179265, -1.210939)


def sampled(m, c, net):
    """(x0, D_phi, D_psi, weights of the quadrature), each a function of m and c."""
    z, eps, w = grid()
    t = jnp.full(len(z), SIGMA)
    x0 = m + c * z
    xt = Scaled().add_noise(x0, jnp.asarray(eps), t)
    return x0, net.teacher(xt, t).x0, net.fake(xt, t).x0, w


def test_sid_at_half_alpha_is_half_the_exact_gradient(x64):
    """2 (D_phi - D_psi)(D_psi - x0) + |D_phi - D_psi|^2, over sigma^4, is dJ/dtheta of reverse KL
    for unequal variances.
    """
    net, (z, eps, w) = networks(Scaled(), 1.69), grid()
    t = jnp.full(len(z), SIGMA)
    unit = ALPHA**2 / SIGMA**4

    def loss(m, c):
        x0 = m + c * z
        xt = Scaled().add_noise(x0, jnp.asarray(eps), t)
        real = net.teacher(xt, t).x0
        fake = net.fake(xt, t).x0
        plain = (
            score.sid_loss(x0, real, fake, alpha=0.5, scale=1.0)
            / score.inverse_distance(x0, real)[:, 0]
        )
        return 2 * unit * jnp.sum(w * plain)

    np.testing.assert_allclose(jax.grad(loss, (0, 1))(M, C), REVERSE_KL, atol=6e-7)


def test_both_estimates_of_the_fisher_divergence_agree(x64):
    """E[L2] = E[L1]: E[D_psi - x0 | x_t] = 0, so alpha = 1 has the value 0, whatever the scores."""
    x0, real, fake, w = sampled(M, C, networks(Scaled(), 1.69))
    gap = real - fake
    squared = jnp.sum(w[:, None] * gap**2)
    np.testing.assert_allclose(
        jnp.sum(w[:, None] * gap * (real - x0)), squared, rtol=1e-10
    )
    assert squared > 0.01


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_equal_scores_leave_the_student_alone(x64, alpha):
    net = networks(Scaled(), (ALPHA * C) ** 2 + SIGMA**2, m=0.0)
    method = SiD(process=Scaled(), alpha=alpha)

    def loss(m, c):
        x0, real, fake, w = sampled(m, c, net)
        return jnp.sum(w * method.identity(x0, real, fake))

    np.testing.assert_allclose(jax.grad(loss, (0, 1))(0.0, C), 0.0, atol=1e-10)


def test_the_loss_is_linear_in_alpha_and_in_its_scale(x64):
    x0, real, fake, _ = sampled(M, C, networks(Scaled(), 1.69))
    at = lambda **fields: SiD(process=Scaled(), **fields).identity(x0, real, fake)
    middle = 0.5 * at(alpha=0.5, scale=1.0) + 0.5 * at(alpha=1.5, scale=1.0)
    np.testing.assert_allclose(
        at(alpha=1.0, scale=1.0), middle, rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(at(), 100 * at(scale=1.0), rtol=1e-12)
    weight = 1 / np.abs(x0 - real)[:, 0]
    first = (np.asarray(real - fake) ** 2)[:, 0]
    np.testing.assert_allclose(
        at(alpha=0.0, scale=1.0) - at(alpha=1.0, scale=1.0),
        weight * first,
        rtol=1e-8,
        atol=1e-12,
    )


def test_the_gradient_flows_through_both_denoisers(x64, context):
    """Linear denoisers D = a x_t: dL/dx0 by the product rule, omega under stop_gradient."""
    a, b, sigma = 0.6, 0.3, 0.8
    net = SimpleNamespace(
        teacher=lambda x, t, cond=None: EDM().from_x0(a * x, x, t),
        fake=lambda x, t, cond=None: EDM().from_x0(b * x, x, t),
    )

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class At(Uniform):
        def draw(self, process, key, n):
            return jnp.full(n, sigma)

    method = SiD(match_times=At(), alpha=1.2, scale=1.0)
    x0 = jax.random.normal(jax.random.key(1), (7, 1))
    ctx = context(x0)
    got = jax.grad(lambda x: method.match(net, ctx, x)[0])(x0) * len(x0)
    xt = method.diffuse(x0, At(), ctx, "match")[0]
    gap = (a - b) * xt
    slope = (a - b) * ((a * xt - x0) - 1.2 * gap) + gap * ((a - 1) - 1.2 * (a - b))
    np.testing.assert_allclose(got, slope / np.abs(x0 - a * xt), rtol=1e-9)


def test_trains_and_moves_what_it_should(three_steps):
    three_steps(SiD())


def test_the_name_in_earlier_configs_is_read():
    assert resolve("methods.distribution._family:SiD") is SiD
