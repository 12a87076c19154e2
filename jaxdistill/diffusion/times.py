"""Distributions of training times; each is `draw(process, key, n) -> t [n]`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Key

from jaxdistill.core.types import Array, Refused
from jaxdistill.diffusion.process import Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform over a part of the process, as shares of its length. Base of all distributions."""

    low: float = 0.0
    high: float = 1.0

    def draw(
        self, process: Process, key: Key[Array, ""], n: int
    ) -> Float[Array, " {n}"]:
        """`n` times of the process."""
        t = jax.random.uniform(key, (n,), minval=self.low, maxval=self.high)
        return process.t_min + (process.t_max - process.t_min) * t

    def within(self, process: Process, low: float, high: float) -> Uniform:
        """The distribution restricted to the times low..high.

        It begins `self.low` of the process's length above `low`, and does not exceed `self.high`.
        On a process with a shift, the time before the shift is restricted and drawn.

        Raises:
          Refused: where nothing is left.
        """
        length = process.t_max - process.t_min
        first = (low - process.t_min) / length
        last = (high - process.t_min) / length
        inside = dataclasses.replace(
            self, low=first + self.low, high=min(last, self.high)
        )
        if inside.low >= inside.high:
            raise Refused(f"{self} has nothing within the times {low} to {high}")
        return inside


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal(Uniform):
    """sigmoid(N(mean, std^2)) of the process's length: SD3 (0, 1), MeanFlow (-0.4, 1)."""

    mean: float = 0.0
    std: float = 1.0

    def draw(self, process, key, n):
        t = jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (n,)))
        share = self.low + (self.high - self.low) * t
        return process.t_min + (process.t_max - process.t_min) * share


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogNormalSNR(Uniform):
    """log(sigma / alpha) ~ N(mean, std^2).

    EDM (-1.2, 1.2), EDM2 (-0.4, 1.0), ECT (-1.1, 2.0), sCM's tan t (-1.0, 1.4).
    """

    mean: float = -1.2
    std: float = 1.2

    def draw(self, process, key, n):
        return process.time_of_lam(
            -(self.mean + self.std * jax.random.normal(key, (n,)))
        )

    def within(self, process, low, high):
        expected = "expected Uniform or LogitNormal on a part of the process"
        raise Refused(f"{self}: has no bounds; {expected}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Karras(Uniform):
    """(sigma / alpha)^(1/rho) uniform over a part of EDM's sampling range, whose cleanest end is 0.

    SiD has low=0, high=0.8.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def draw(self, process, key, n):
        u = jax.random.uniform(key, (n,), minval=self.low, maxval=self.high)
        bottom = self.sigma_min ** (1 / self.rho)
        top = self.sigma_max ** (1 / self.rho)
        return process.time_of_lam(-self.rho * jnp.log(bottom + u * (top - bottom)))
