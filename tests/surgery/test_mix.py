"""Weights drawn towards another network's."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.surgery.mix import mix

FAKE = {"a": {"kernel": jnp.array([1.0, 2.0])}, "b": jnp.array(4.0)}
STUDENT = {"a": {"kernel": jnp.array([3.0, -2.0])}, "b": jnp.array(0.0)}


@pytest.mark.parametrize(
    ("keep", "kernel", "b"), [(1, [1, 2], 4), (0, [3, -2], 0), (0.5, [2, 0], 2)]
)
def test_shares_of_both(keep, kernel, b):
    mixed = mix({"fake": FAKE, "student": STUDENT}, "fake", "student", keep)
    assert set(mixed) == {"fake"}
    np.testing.assert_array_equal(mixed["fake"]["a"]["kernel"], kernel)
    np.testing.assert_array_equal(mixed["fake"]["b"], b)


@pytest.mark.parametrize(
    "other", [{"b": STUDENT["b"]}, {**STUDENT, "b": jnp.zeros(2)}]
)
def test_other_weights_are_refused(other):
    with pytest.raises(
        Refused, match=r"^roles.fake: .* roles.student; expected the same model"
    ):
        mix({"fake": FAKE, "student": other}, "fake", "student", 0.9)
