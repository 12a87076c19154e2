"""Preference losses on Gaussian transitions against the log-densities themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.objectives import preference

B = 5
SHAPE = (5, 3, 2)


pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def drawn():
    """(mean, reference, winner, loser) and sigma."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(SHAPE)) for _ in range(4)], jnp.asarray(
        rng.uniform(0.2, 0.9, B)
    )


def log_density(z, mean, sigma):
    return -jnp.sum((z - mean) ** 2, (1, 2)) / (2 * sigma**2)


def test_margin_is_the_difference_of_log_ratios(drawn):
    (mean, reference, winner, loser), sigma = drawn
    ratio = lambda z: log_density(z, mean, sigma) - log_density(z, reference, sigma)
    got = preference.summed_margin(mean, reference, winner, loser, sigma)
    np.testing.assert_allclose(got, ratio(winner) - ratio(loser), rtol=1e-12)
    # the mean convention: half the difference of mean squared errors, whatever sigma is
    error = lambda z, m: jnp.mean((z - m) ** 2, (1, 2))
    by_hand = 0.5 * (
        error(winner, reference)
        - error(winner, mean)
        - error(loser, reference)
        + error(loser, mean)
    )
    np.testing.assert_allclose(
        preference.mean_margin(mean, reference, winner, loser, sigma),
        by_hand,
        rtol=1e-12,
    )


def test_margin_keeps_its_digits_where_squares_would_cancel(drawn):
    (mean, _, winner, loser), sigma = drawn
    gap = 1e-6
    wide = preference.summed_margin(mean + gap, mean, winner, loser, sigma)
    narrow = preference.summed_margin(
        *(a.astype(jnp.float32) for a in (mean + gap, mean, winner, loser, sigma))
    )
    # m - m_ref keeps gap to the rounding of numbers of order 1; the squares' difference would lose
    # it altogether
    rounding = (
        np.finfo(np.float32).eps
        * jnp.sum(jnp.abs(winner - loser) * jnp.maximum(jnp.abs(mean), 1), (1, 2))
        / sigma**2
    )
    assert np.all(np.abs(narrow - wide) < rounding)


def test_swapping_winner_and_loser_turns_the_margin(drawn):
    (mean, reference, winner, loser), sigma = drawn
    for margin in preference.MARGINS.values():
        there = margin(mean, reference, winner, loser, sigma)
        back = margin(mean, reference, loser, winner, sigma)
        np.testing.assert_allclose(there, -back, rtol=1e-14)
        assert not margin(mean, mean, winner, loser, sigma).any()


@pytest.mark.parametrize("beta", [1.0, 5000.0])
def test_value_and_slope(beta):
    h = jnp.asarray([-2.0, 0.0, 1e-4, 0.3])
    np.testing.assert_allclose(
        preference.dpo(jnp.zeros(3), beta), np.log(2), rtol=1e-15
    )
    slope = jax.grad(lambda h: preference.dpo(h, beta).sum())(h)
    np.testing.assert_allclose(slope, -beta * jax.nn.sigmoid(-beta * h), rtol=1e-12)


@pytest.mark.parametrize("margin", ["sum", "mean"])
def test_gradient_is_a_multiple_of_the_pairs_difference(drawn, margin):
    """And no gradient reaches reference, winner or loser."""
    (mean, reference, winner, loser), sigma = drawn
    loss = lambda *a: preference.dpo_transition_loss(*a, sigma, 2.0, margin)[
        0
    ].sum()
    grads = jax.grad(loss, argnums=(0, 1, 2, 3))(mean, reference, winner, loser)
    factor = grads[0] / (winner - loser)
    np.testing.assert_allclose(
        factor, jnp.broadcast_to(factor[:, :1, :1], SHAPE), rtol=1e-10
    )
    assert np.all(factor < 0) and not any(g.any() for g in grads[1:])


def test_other_conventions_are_refused(drawn):
    with pytest.raises(Refused, match="margin='sums': did you mean 'sum'"):
        preference.dpo_transition_loss(*drawn[0], drawn[1], margin="sums")
