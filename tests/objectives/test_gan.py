"""Adversarial losses at their optima on Gaussians, and penalties against exact gradients
(00-foundations, section 8).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives import gan

pytestmark = pytest.mark.usefixtures("x64")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def test_best_discriminator_logit_is_the_log_ratio():
    """Minimising the expected loss over a grid of free logits gives log p_real - log p_fake, by a
    zero gradient there.
    """
    x = jnp.linspace(-8, 8, 401)
    log_density = lambda m, s: (
        -((x - m) ** 2) / (2 * s**2) - np.log(s * np.sqrt(2 * np.pi))
    )
    log_r = log_density(0.5, 1.0)
    log_f = log_density(-0.4, 0.8)

    def expected(logit):
        """Integral of p_real softplus(-D) + p_fake softplus(D); each term of the loss alone, the
        other's logit at -+inf.
        """
        off = jnp.full_like(logit, 1e3)
        real = gan.non_saturating_discriminator(logit, -off)
        fake = gan.non_saturating_discriminator(off, logit)
        return jnp.sum(jnp.exp(log_r) * real + jnp.exp(log_f) * fake) * (
            x[1] - x[0]
        )

    np.testing.assert_allclose(jax.grad(expected)(log_r - log_f), 0.0, atol=1e-16)
    assert jnp.abs(jax.grad(expected)(log_r - log_f + 0.1)).max() > 1e-4


def test_value_on_equal_laws_is_two_log_two():
    zero = jnp.zeros((5, 3))
    np.testing.assert_allclose(
        gan.non_saturating_discriminator(zero, zero), 2 * np.log(2), rtol=1e-15
    )
    np.testing.assert_allclose(
        gan.relativistic_discriminator(zero, zero), np.log(2), rtol=1e-15
    )


def test_values_and_gradients_by_closed_form():
    real = 2 * draw(64)
    fake = 2 * draw(64, seed=1)
    sigmoid = lambda z: 1 / (1 + np.exp(-np.asarray(z)))
    grads = lambda f, *a: jax.grad(
        lambda *a: f(*a).sum(), argnums=tuple(range(len(a)))
    )(*a)
    cases = [
        (
            gan.non_saturating_generator,
            (fake,),
            -np.log(sigmoid(fake)),
            [-sigmoid(-fake)],
        ),
        (
            gan.non_saturating_discriminator,
            (real, fake),
            -np.log(sigmoid(real) * sigmoid(-fake)),
            [-sigmoid(-real), sigmoid(fake)],
        ),
        (gan.hinge_generator, (fake,), -fake, [-np.ones(64)]),
        (
            gan.hinge_discriminator,
            (real, fake),
            np.maximum(1 - real, 0) + np.maximum(1 + fake, 0),
            [-np.where(real < 1, 1.0, 0.0), np.where(fake > -1, 1.0, 0.0)],
        ),
        (
            gan.relativistic_generator,
            (real, fake),
            -np.log(sigmoid(fake - real)),
            [sigmoid(real - fake), -sigmoid(real - fake)],
        ),
        (
            gan.relativistic_discriminator,
            (real, fake),
            -np.log(sigmoid(real - fake)),
            [-sigmoid(fake - real), sigmoid(fake - real)],
        ),
    ]
    for loss, args, value, grad in cases:
        np.testing.assert_allclose(
            loss(*args), value, rtol=1e-12, err_msg=loss.__name__
        )
        for got, want in zip(grads(loss, *args), grad):
            np.testing.assert_allclose(got, want, rtol=1e-12, err_msg=loss.__name__)


def test_heads_and_patches_are_averaged_within_a_sample():
    real = draw(4, 3, 2)
    fake = draw(4, 3, 2, seed=1)
    np.testing.assert_allclose(
        gan.hinge_discriminator(real, fake),
        [
            np.mean(np.maximum(1 - r, 0) + np.maximum(1 + f, 0))
            for r, f in zip(real, fake)
        ],
    )
    assert gan.non_saturating_generator(fake).shape == (4,)


def test_r1_of_a_quadratic_logit():
    """D(x) = x A x / 2 + b x has the gradient A x + b; two equal heads have the same."""
    a = draw(6, 6)
    b = draw(6, seed=1)
    x = draw(5, 2, 3, seed=2)
    a = a + a.T

    def logit(x):
        flat = x.reshape(len(x), -1)
        one = 0.5 * jnp.sum(flat @ a * flat, -1) + flat @ b
        return jnp.stack([one, one], -1)

    exact = 0.5 * np.sum((np.asarray(x).reshape(5, 6) @ a + b) ** 2, -1)
    np.testing.assert_allclose(gan.r1(logit, x), exact, rtol=1e-12)


def test_perturbed_r1_is_the_squared_slope_along_the_noise():
    """Linear D: exactly std^2 (w noise)^2, whose mean over +-sqrt(dim) unit axes is std^2 ||w||^2 =
    2 std^2 R1.
    """
    dim = 4
    std = 0.01
    w = draw(dim)
    x = draw(1, dim, seed=1)
    logit = lambda x: x @ w + 0.3
    noise = jnp.sqrt(dim) * jnp.eye(dim)
    got = gan.perturbed_r1(logit, jnp.broadcast_to(x, (dim, dim)), noise, std)
    np.testing.assert_allclose(got, std**2 * dim * w**2, rtol=1e-9)
    np.testing.assert_allclose(
        got.mean(), 2 * std**2 * gan.r1(logit, x)[0], rtol=1e-9
    )
