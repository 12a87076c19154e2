"""Consistency distillation and training (arXiv:2303.01469) by the paper's other distances, LPIPS
and squared error.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.methods.trajectory.consistency import CT, Consistency
from jaxdistill.objectives.numerics import mean_per_sample
from jaxdistill.objectives.pixels import Preprocess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squared:
    """The mean squared error. To come before the method among a class's bases."""

    # no field of these classes
    huber: float = dataclasses.field(default=0.0, init=False)

    def distance(self, net, predicted, target):
        return mean_per_sample((predicted - target) ** 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptual:
    """LPIPS, the paper's best. To come before the method among a class's bases.

    The frozen role `perceptual` is a distance of pictures in [-1, 1], (a, b) -> [B], through which
    the gradient flows to the student's.
    """

    # no field of these classes
    huber: float = dataclasses.field(default=0.0, init=False)
    # of both pictures; the paper's code does so below 256 pixels, and not at all from there on
    preprocess: Preprocess = Preprocess(size=224, filter="linear")

    def distance(self, net, predicted, target):
        return net.perceptual(self.preprocess(predicted), self.preprocess(target))


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
