"""Consistency distillation and training (arXiv:2303.01469) by the paper's other distances, LPIPS
and squared error.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxdistill.core.types import Array, Nets
from jaxdistill.methods.trajectory.consistency import CT, Consistency
from jaxdistill.objectives.pixels import Preprocess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squared:
    """The squared error, a mean over dimensions. It comes before the method among a class's bases."""

    huber: float = dataclasses.field(default=0.0, init=False)  # not a field of these

    def distance(self, net: Nets, made: Array, held: Array) -> Array:
        return jnp.mean((made - held) ** 2, axis=range(1, made.ndim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptual:
    """LPIPS, the paper's best: the frozen role `perceptual` is a distance of pictures in -1..1, (a,
    b) -> [B], through which the gradient flows to the student's. It comes before the method among a
    class's bases.
    """

    huber: float = dataclasses.field(default=0.0, init=False)  # not a field of these
    preprocess: Preprocess = Preprocess(
        size=224, filter="linear"
    )  # of both; the code's below 256 pixels, where it has none

    def distance(self, net: Nets, made: Array, held: Array) -> Array:
        return net.perceptual(self.preprocess(made), self.preprocess(held))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredConsistency(Squared, Consistency):
    """Distillation by squared error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredCT(Squared, CT):
    """Training by squared error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualConsistency(Perceptual, Consistency):
    """Distillation by LPIPS."""

    frozen = ("teacher", "perceptual")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualCT(Perceptual, CT):
    """Training by LPIPS."""

    frozen = ("perceptual",)
