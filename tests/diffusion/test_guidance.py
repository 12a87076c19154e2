"""Laws of the guidance scale, and conditions with a negative prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.diffusion.guidance import Constant, Random, RandomEach, negated

KEYS = jax.random.split(jax.random.key(0), 500)


def test_constant():
    np.testing.assert_array_equal(
        Constant(scale=3.5).draw(KEYS[0], 4), np.full(4, 3.5, np.float32)
    )


def test_random_is_shared_and_uniform():
    scales = np.asarray(
        jax.vmap(lambda key: Random(low=0.5, high=4.0).draw(key, 3))(KEYS)
    )
    assert np.all(scales == scales[:, :1])
    scales = scales[:, 0]
    assert scales.min() >= 0.5 and scales.max() <= 4.0
    sd = 3.5 / 12**0.5
    assert abs(scales.mean() - 2.25) < 4 * sd / 500**0.5
    # a seventh leads towards the null condition
    assert abs((scales < 1).mean() - 1 / 7) < 4 * (6 / 49 / 500) ** 0.5


def test_random_each_draws_for_each_sample():
    scales = RandomEach(low=0.5, high=4.0).draw(KEYS[0], 2000)
    assert (
        len(np.unique(scales)) > 1900
        and abs(float(scales.mean()) - 2.25) < 4 * 3.5 / 12**0.5 / 2000**0.5
    )


@pytest.mark.parametrize("law", [Random, RandomEach])
@pytest.mark.parametrize("scale", [2.7, 4.5])
def test_equal_ends_are_a_constant_bit_for_bit(law, scale):
    for key in KEYS[:20]:
        np.testing.assert_array_equal(
            law(low=scale, high=scale).draw(key, 5),
            Constant(scale=scale).draw(key, 5),
        )


def test_negated():
    cond = {"text": jnp.ones((2, 3, 4)), "pooled": jnp.ones((2, 5))}
    out = negated(
        cond, {"text": jnp.zeros((2, 7, 4)), "mask": jnp.ones((2, 7))}, 0.5
    )
    assert set(out) == {
        "text",
        "pooled",
        "negative",
        "negative_mask",
        "nasa",
    } and out["negative"].shape == (2, 7, 4)
    assert set(negated(cond, cond, 0.5)) == {"text", "pooled", "negative", "nasa"}
    for bad in (
        (cond, jnp.ones(2)),
        (jnp.ones(2), cond),
        (cond, {"mask": jnp.ones(2)}),
    ):
        with pytest.raises(
            Refused, match="a negative prompt needs conditions with 'text'"
        ):
            negated(*bad, 0.5)
