"""Numbers that change while a loss trains, against closed forms."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.objectives.schedule import (
    Cosine,
    Linear,
    Schedule,
    bounds,
    scheduled,
    settled,
    weighted,
)


def test_cosine_at_a_quarter(x64):
    np.testing.assert_allclose(
        Cosine(start=1.0, end=0.0, steps=400)(100), 0.853553390593273762, atol=1e-15
    )
    shares = np.linspace(0, 1, 41)
    got = [Cosine(start=3.0, end=-1.0, steps=40)(step) for step in range(41)]
    np.testing.assert_allclose(
        got, -1 + 4 * (1 + np.cos(np.pi * shares)) / 2, atol=1e-14
    )


def test_linear_is_even(x64):
    got = [Linear(start=0.2, end=1.0, steps=8)(step) for step in range(9)]
    np.testing.assert_allclose(got, np.linspace(0.2, 1.0, 9), atol=1e-15)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_ends_stay(kind):
    schedule = kind(start=2.0, end=0.5, steps=10)
    assert schedule(0) == 2.0 and schedule(10) == 0.5 and schedule(10**9) == 0.5
    np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(5)), 1.25, rtol=1e-6)
    assert bounds(schedule) == (0.5, 2.0) and bounds(0.3) == (0.3, 0.3)


@dataclasses.dataclass(frozen=True)
class Fields:
    weight: float | Schedule = 0.25
    params: Any = None
    name: str = "x"

    def __post_init__(self):
        if isinstance(self.weight, float) and self.weight > 1:
            raise Refused("weight")


def test_schedules_become_their_numbers():
    plain = Fields(params={"beta": 0.5})
    assert settled(plain, 3) is plain and not scheduled(plain.params)
    ramp = Linear(start=0.0, end=1.0, steps=4)
    made = settled(Fields(weight=ramp, params={"beta": ramp, "alpha": 2.0}), 1)
    assert (
        made.weight == 0.25
        and made.params == {"beta": 0.25, "alpha": 2.0}
        and made.name == "x"
    )
    assert (
        jax.jit(lambda step: settled(Fields(weight=ramp), step).weight)(
            jnp.int32(2)
        )
        == 0.5
    )


def test_a_constant_weight_of_0_is_no_term():
    assert weighted(0.0, jnp.float32(jnp.nan)) == 0.0
    assert (
        weighted(0.5, jnp.float32(4)) == 2.0
        and weighted(jnp.float32(0), jnp.float32(4)) == 0.0
    )


def test_refused():
    with pytest.raises(
        Refused, match=r"Cosine: steps=0, expected a positive integer"
    ):
        Cosine(start=0.0, end=1.0, steps=0)
