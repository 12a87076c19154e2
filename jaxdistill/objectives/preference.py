"""Direct preference optimisation (DPO, arXiv:2305.18290) of a sampler's transitions (Diffusion-DPO,
arXiv:2311.12908).

From a state the sampler draws z ~ N(m, sigma^2 I), and of two draws one is preferred. The margin is
the difference, between winner and loser, of log p_theta(z) - log p_reference(z). Where only the
mean is trained it is (z_w - z_l).(m - m_reference) / sigma^2, without squares that cancel
(Flash-DMD, arXiv:2511.20549).
"""

from __future__ import annotations

import jax
from jaxtyping import Shaped

from jaxdistill.core.types import Array, lookup
from jaxdistill.objectives.numerics import sum_per_sample


def summed_margin(
    mean: Shaped[Array, "B ..."],
    reference: Shaped[Array, "B ..."],
    winner: Shaped[Array, "B ..."],
    loser: Shaped[Array, "B ..."],
    sigma: Shaped[Array, " B"],
) -> Shaped[Array, " B"]:
    """(z_w - z_l).(m - m_ref) / sigma^2: the margin of the Gaussians themselves."""
    gap = jax.lax.stop_gradient(winner - loser)
    moved = mean - jax.lax.stop_gradient(reference)
    return sum_per_sample(gap * moved) / sigma**2


def mean_margin(
    mean: Shaped[Array, "B ..."],
    reference: Shaped[Array, "B ..."],
    winner: Shaped[Array, "B ..."],
    loser: Shaped[Array, "B ..."],
    sigma: Shaped[Array, " B"],
) -> Shaped[Array, " B"]:
    """The margin with a mean over a sample's entries, and without the division by sigma^2.

    It is half the difference of Diffusion-DPO's mean squared errors, whose beta is 5000.
    """
    return (
        summed_margin(mean, reference, winner, loser, sigma)
        * sigma**2
        / winner[0].size
    )


MARGINS = {"sum": summed_margin, "mean": mean_margin}


def dpo(margin: Shaped[Array, "*B"], beta: float = 1.0) -> Shaped[Array, "*B"]:
    """-log sigmoid(beta margin), log 2 at a margin of 0."""
    return jax.nn.softplus(-beta * margin)


def dpo_transition_loss(
    mean: Shaped[Array, "B ..."],
    reference: Shaped[Array, "B ..."],
    winner: Shaped[Array, "B ..."],
    loser: Shaped[Array, "B ..."],
    sigma: Shaped[Array, " B"],
    beta: float = 1.0,
    margin: str = "sum",
) -> tuple[Shaped[Array, " B"], Shaped[Array, " B"]]:
    """(DPO of one transition, beta times its margin).

    Args:
      margin: sum | mean, a key of MARGINS.

    Raises:
      Refused: on another margin.
    """
    scaled = beta * lookup(MARGINS, margin, "margin")(
        mean, reference, winner, loser, sigma
    )
    return dpo(scaled), scaled
