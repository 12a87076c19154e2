"""Distributions of the guidance scale, each `draw(key, n) -> scale [n]`, and conditions with a
negative prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float, Key, Shaped

from jaxdistill.core.types import Array, Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Base of all distributions."""

    def draw(self, key: Key[Array, ""], n: int) -> Float[Array, " {n}"]:
        """The scales of `n` samples."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Scale):
    """One scale for all."""

    scale: float = 1.0

    def draw(self, key, n):
        return jnp.full(n, self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Scale):
    """Uniform on low..high, one draw for the batch (SNOOPI, arXiv:2412.02687).

    A scale below 1 leads towards the null condition.
    """

    low: float = 0.5
    high: float = 4.0

    def draw(self, key, n):
        return jnp.broadcast_to(self.uniform(key, ()), (n,))

    def uniform(
        self, key: Key[Array, ""], shape: tuple[int, ...]
    ) -> Float[Array, "*_"]:
        """Draws of one scale for each entry of `shape`."""
        return self.low + (self.high - self.low) * jax.random.uniform(key, shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomEach(Random):
    """Uniform on low..high, with a draw for each sample."""

    def draw(self, key, n):
        return self.uniform(key, (n,))


def negated(
    cond: Mapping[str, Array] | Array,
    negative: Mapping[str, Array] | Array,
    alpha: float | Shaped[Array, "*B"],
) -> dict[str, Array | float]:
    """`cond` with the prompt of `negative` as its negative prompt (models.attention.nasa).

    Args:
      cond, negative: conditions with "text", and with "mask" where some of it is padding.
      alpha: strength of the negative prompt, a scalar or one for each sample.

    Raises:
      Refused: on other conditions.
    """
    for name, one in (("cond", cond), ("negative", negative)):
        if not isinstance(one, Mapping) or "text" not in one:
            needed = "conditions with 'text', and models that attend to it"
            raise Refused(f"{name}: a negative prompt needs {needed}")
    mask = {"negative_mask": negative["mask"]} if "mask" in negative else {}
    return {**cond, "negative": negative["text"], **mask, "nasa": alpha}
