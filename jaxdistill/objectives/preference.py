"""Direct preference optimisation (arXiv:2305.18290) of a sampler's transitions (Diffusion-DPO,
arXiv:2311.12908).

From a state the sampler draws z ~ N(m, sigma^2 I), and of two draws one is preferred. The margin is
the difference, between winner and loser, of log p_theta(z) - log p_reference(z). Where only the
mean is learnt it is (z_w - z_l).(m - m_reference) / sigma^2, which has no squares to cancel
(Flash-DMD, arXiv:2511.20549).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, lookup


def summed_margin(
    mean: Array, reference: Array, winner: Array, loser: Array, sigma: Array
) -> Array:
    """(z_w - z_l).(m - m_ref) / sigma^2, [B ...] x 4 and sigma [B] -> [B]: the margin of the
    Gaussians themselves.
    """
    product = jax.lax.stop_gradient(winner - loser) * (mean - jax.lax.stop_gradient(reference))
    return jnp.sum(product, axis=range(1, product.ndim)) / sigma**2


def mean_margin(mean: Array, reference: Array, winner: Array, loser: Array, sigma: Array) -> Array:
    """The same with squared errors that are averaged over a sample's entries and not divided by
    sigma^2: [B].

    Half the difference of these errors, as in Diffusion-DPO, whose beta is 5000.
    """
    return summed_margin(mean, reference, winner, loser, sigma) * sigma**2 / winner[0].size


MARGINS = {"sum": summed_margin, "mean": mean_margin}


def dpo(margin: Array, beta: float = 1.0) -> Array:
    """-log sigmoid(beta margin), each; log 2 at 0, slope -beta sigmoid(-beta margin)."""
    return jax.nn.softplus(-beta * margin)


def dpo_transition_loss(
    mean: Array,
    reference: Array,
    winner: Array,
    loser: Array,
    sigma: Array,
    beta: float = 1.0,
    margin: str = "sum",
) -> tuple[Array, Array]:
    """(DPO of one transition, beta x its margin), each [B]; `margin` sum | mean. Raises Refused on
    another.
    """
    scaled = beta * lookup(MARGINS, margin, "margin")(mean, reference, winner, loser, sigma)
    return dpo(scaled), scaled
