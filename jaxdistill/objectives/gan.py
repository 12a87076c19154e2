"""Adversarial losses on logits [B ...]: one value per sample, the mean over its heads and patches.
High logits say real.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array


def _per_sample(values: Array) -> Array:
    return jnp.mean(values, axis=range(1, values.ndim))


def non_saturating_generator(fake: Array) -> Array:
    """softplus(-D(fake)) (Goodfellow et al., arXiv:1406.2661)."""
    return _per_sample(jax.nn.softplus(-fake))


def non_saturating_discriminator(real: Array, fake: Array) -> Array:
    """softplus(-D(real)) + softplus(D(fake)); the best D is log p_real - log p_fake, and 2 log 2
    its value on equal laws.
    """
    return _per_sample(jax.nn.softplus(-real)) + _per_sample(jax.nn.softplus(fake))


def hinge_generator(fake: Array) -> Array:
    """-D(fake)."""
    return _per_sample(-fake)


def hinge_discriminator(real: Array, fake: Array) -> Array:
    """relu(1 - D(real)) + relu(1 + D(fake)) (geometric GAN, arXiv:1705.02894)."""
    return _per_sample(jax.nn.relu(1 - real)) + _per_sample(jax.nn.relu(1 + fake))


def relativistic_generator(real: Array, fake: Array) -> Array:
    """softplus(-(D(fake) - D(real))), fake and real in pairs (arXiv:1807.00734)."""
    return _per_sample(jax.nn.softplus(real - fake))


def relativistic_discriminator(real: Array, fake: Array) -> Array:
    """softplus(-(D(real) - D(fake)))."""
    return _per_sample(jax.nn.softplus(fake - real))


def r1(logit: Callable[[Array], Array], x: Array) -> Array:
    """||grad_x D(x)||^2 / 2 summed over dimensions, on real samples: [B ...] -> [B]
    (arXiv:1801.04406, eq. 9, gamma = 1).
    """
    grad = jax.grad(lambda x: jnp.sum(_per_sample(logit(x))))(x)
    return 0.5 * jnp.sum(grad**2, axis=range(1, x.ndim))


def perturbed_r1(
    logit: Callable[[Array], Array], x: Array, noise: Array, std: float = 0.01
) -> Array:
    """(D(x) - D(x + std noise))^2, [B ...] -> [B]: no second derivative (APT, arXiv:2501.08316).

    Over unit Gaussian `noise` its mean is std^2 ||grad_x D(x)||^2 to leading order.
    """
    return _per_sample((logit(x) - logit(x + std * noise)) ** 2)
