from math import ceil, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives.selection import (
    confidence_gate,
    entropy,
    most_uncertain,
    opener,
)

RNG = np.random.default_rng(0)


def test_entropy():
    np.testing.assert_allclose(entropy(jnp.zeros(7)), log(7), rtol=1e-6)
    assert entropy(jnp.array([0.0, -jnp.inf, -jnp.inf])) == 0
    value, grad = jax.value_and_grad(lambda z: entropy(z))(jnp.array([300.0, 0, 0]))
    assert value == 0 and np.isfinite(grad).all()
    z = jnp.asarray(RNG.standard_normal(7), jnp.float32)
    assert entropy(z - 0.1 * jax.grad(lambda z: entropy(z))(z)) < entropy(z)


@pytest.mark.parametrize("length", [7, 10, 20, 30, 50, 70, 100, 130])
def test_opener_of_equal_entropies(length):
    mask = jnp.arange(140) < length
    kept = opener(jnp.full((1, 140), 0.3), mask[None], 0.1)[0]
    assert kept.sum() == ceil(0.1 * length - 1e-9) and kept[: int(kept.sum())].all()


def test_without_slack_it_takes_one_too_many():
    """What the tolerance is for, at one of the lengths where float32 rounds that way."""
    sizes = [
        int(
            opener(
                jnp.full((1, n), h), jnp.ones((1, n), bool), 0.1, slack=0.0
            ).sum()
        )
        - ceil(0.1 * n - 1e-9)
        for n in (10, 20, 50, 70, 130)
        for h in (0.3, 0.7)
    ]
    assert max(sizes) == 1


@pytest.mark.parametrize("at", [0, 3, 9])
def test_opener_reaches_the_one_uncertain_token(at):
    """Its length is per row, and what is masked has no entropy."""
    h = jnp.stack([jax.nn.one_hot(at, 10), jnp.full(10, 0.5), jnp.zeros(10)])
    mask = jnp.stack([jnp.ones(10), jnp.arange(10) >= 4, jnp.arange(10) >= 2]) > 0
    kept = opener(h, mask, 0.1)
    np.testing.assert_array_equal(kept[0], jnp.arange(10) <= at)
    np.testing.assert_array_equal(kept[1], jnp.arange(10) == 4)
    # a row without entropy has an opener of one token
    np.testing.assert_array_equal(kept[2], jnp.arange(10) == 2)
    np.testing.assert_array_equal(opener(h.at[1, :4].set(9.0), mask, 0.1), kept)


def test_nothing_of_an_empty_row():
    empty = jnp.zeros((2, 5), bool)
    assert (
        not opener(jnp.ones((2, 5)), empty, 0.1).any()
        and not most_uncertain(jnp.ones((2, 5)), empty, 0.1).any()
    )


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_most_uncertain_tokens_of_the_batch(share):
    h = RNG.random((4, 13)).astype(np.float32)
    mask = RNG.random((4, 13)) < 0.6
    kept = most_uncertain(jnp.asarray(h), jnp.asarray(mask), share)
    np.testing.assert_array_equal(
        kept, (h >= np.quantile(h[mask], 1 - share) - 1e-7) & mask
    )
    np.testing.assert_array_equal(
        most_uncertain(jnp.where(mask, h, 99.0), jnp.asarray(mask), share), kept
    )


def test_gate():
    h = jnp.array([0.0, 1.0, 2.0])
    gate = confidence_gate(h, h[::-1], 1.0)
    assert (
        ((gate > 0) & (gate < 1)).all()
        and gate[1] == 0.5
        and gate[0] > 0.5 > gate[2]
    )
    assert not jax.grad(lambda x: confidence_gate(h, x, 1.0).sum())(h).any()
    np.testing.assert_allclose(
        confidence_gate(h, h + 1, 0.5), jax.nn.sigmoid(2.0), rtol=1e-6
    )
