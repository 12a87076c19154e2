"""Adversarial losses of discriminator logits: one value per sample, the mean over heads and
patches.

High logits mean real.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from jaxdistill.core.types import Array
from jaxdistill.objectives.numerics import mean_per_sample, sum_per_sample


def non_saturating_generator(fake: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """softplus(-D(fake)) (Goodfellow et al., arXiv:1406.2661)."""
    return mean_per_sample(jax.nn.softplus(-fake))


def non_saturating_discriminator(
    real: Float[Array, "B ..."], fake: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """softplus(-D(real)) + softplus(D(fake)).

    The best D is log p_real - log p_fake; for equal distributions its loss is 2 log 2.
    """
    return mean_per_sample(jax.nn.softplus(-real)) + mean_per_sample(
        jax.nn.softplus(fake)
    )


def hinge_generator(fake: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """-D(fake)."""
    return mean_per_sample(-fake)


def hinge_discriminator(
    real: Float[Array, "B ..."], fake: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """relu(1 - D(real)) + relu(1 + D(fake)) (geometric GAN, arXiv:1705.02894)."""
    return mean_per_sample(jax.nn.relu(1 - real)) + mean_per_sample(
        jax.nn.relu(1 + fake)
    )


def relativistic_generator(
    real: Float[Array, "B ..."], fake: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """softplus(-(D(fake) - D(real))) of pairs of a real and a fake sample (arXiv:1807.00734)."""
    return mean_per_sample(jax.nn.softplus(real - fake))


def relativistic_discriminator(
    real: Float[Array, "B ..."], fake: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """softplus(-(D(real) - D(fake)))."""
    return mean_per_sample(jax.nn.softplus(fake - real))


def r1(
    logit: Callable[[Array], Array], x: Shaped[Array, "B ..."]
) -> Float[Array, " B"]:
    """||grad_x D(x)||^2 / 2 of real samples (arXiv:1801.04406, eq. 9, gamma = 1)."""

    def total(x: Array) -> Array:
        return jnp.sum(mean_per_sample(logit(x)))

    return 0.5 * sum_per_sample(jax.grad(total)(x) ** 2)


def perturbed_r1(
    logit: Callable[[Array], Array],
    x: Shaped[Array, "B ..."],
    noise: Shaped[Array, "B ..."],
    std: float = 0.01,
) -> Float[Array, " B"]:
    """(D(x) - D(x + std noise))^2, which needs no second derivative (APT, arXiv:2501.08316).

    For unit Gaussian `noise` its mean is std^2 ||grad_x D(x)||^2 to leading order.
    """
    return mean_per_sample((logit(x) - logit(x + std * noise)) ** 2)
