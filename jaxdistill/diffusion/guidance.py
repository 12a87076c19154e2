"""Laws of the guidance scale, each `draw(key, n) -> scale [n]`, and conditions that carry a
negative prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Base of all laws."""

    def draw(self, key: Array, n: int) -> Array:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Scale):
    """One scale for all."""

    scale: float = 1.0

    def draw(self, key, n):
        return jnp.full(n, self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Scale):
    """Uniform on low..high, one draw that the batch shares (SNOOPI, arXiv:2412.02687). Below 1 it
    leads towards the null condition.
    """

    low: float = 0.5
    high: float = 4.0

    def draw(self, key, n):
        return jnp.broadcast_to(self.uniform(key, ()), (n,))

    def uniform(self, key: Array, shape: tuple[int, ...]) -> Array:
        return self.low + (self.high - self.low) * jax.random.uniform(key, shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomEach(Random):
    """The same with a draw for each sample."""

    def draw(self, key, n):
        return self.uniform(key, (n,))


def negated(
    cond: Mapping[str, Array], negative: Mapping[str, Array], alpha: Array | float
) -> dict[str, Array]:
    """`cond` with the prompt of `negative` as its negative one, of strength `alpha`, a scalar or
    [B] (models.attention.nasa).

    Both hold "text", and "mask" where not all of it counts. Raises Refused on conditions of another
    kind.
    """
    for name, one in (("cond", cond), ("negative", negative)):
        if not isinstance(one, Mapping) or "text" not in one:
            raise Refused(
                f"{name}: a negative prompt needs conditions with 'text', and models that attend to it"
            )
    mask = {"negative_mask": negative["mask"]} if "mask" in negative else {}
    return {**cond, "negative": negative["text"], **mask, "nasa": alpha}
