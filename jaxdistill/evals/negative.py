"""The effect of a negative prompt on a one-step student."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxdistill.core.types import lookup
from jaxdistill.data.abilities import WritesCaptions
from jaxdistill.data.shapes import COLOURS, pictures
from jaxdistill.diffusion.guidance import negated
from jaxdistill.evals import distances
from jaxdistill.evals.base import Trained
from jaxdistill.evals.pictures import grid
from jaxdistill.evals.samples import SampleEval


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeEval(SampleEval):
    """Samples of `data.shapes:Shapes` under captions that leave the colour open.

    Rows besides teacher and student:
      nasa    the student with a negative prompt in its attention, at each strength.
      blend   the student's sample extrapolated away from its sample under the unwanted prompt, as
              guidance would.
    Metrics:
      unwanted   share of samples of the unwanted colour.
      accuracy   share of samples of the shape that was asked for.
      stray      root mean square distance of a pixel from the nearest valid picture.
    """

    samples: int = 1000
    colour: str = "red"  # the unwanted one
    strengths: tuple[float, ...] = (0.5, 1.0)  # of the negative prompt
    extrapolation: float = 0.5  # of `blend`

    needs = (WritesCaptions,)
    metrics = ("unwanted", "accuracy", "stray")

    def check(self, data):
        super().check(data)
        lookup(dict.fromkeys(COLOURS), self.colour, "evaluation.colour")

    def table(self, roles, data):
        metrics = (*self.metrics, "samples_per_second")
        table = super().table(roles, data)
        for strength in self.strengths:
            table[f"nasa{strength:g}@1"] = metrics
        table["blend@2"] = metrics
        return table

    def score(self, x, real, data):
        valid = pictures()
        size = x[0].size
        square = distances.squared(x.reshape(len(x), -1), valid.reshape(-1, size))
        shape, colour, *_ = np.unravel_index(square.argmin(1), valid.shape[:4])
        return {
            "unwanted": float(np.mean(colour == self._colour)),
            "accuracy": float(np.mean(shape == real["label"][:, 0])),
            "stray": float(np.sqrt(square.min(1) / size).mean()),
        }

    @property
    def _colour(self) -> int:
        """The number of the unwanted colour."""
        return list(COLOURS).index(self.colour)

    def captioned(self, data: Any) -> tuple[dict, dict]:
        """Held-out samples under captions without colour, and with the unwanted colour."""
        real = data.evaluation(self.samples)
        shape = real["label"][:, 0]
        colour = np.full_like(shape, self._colour)
        none = np.zeros(self.samples, bool)
        plain = data.caption(shape, colour, none)
        unwanted = data.caption(shape, colour, ~none)
        return {**real, "cond": plain}, {**real, "cond": unwanted}

    def rows(self, trained: Trained) -> list[dict[str, Any]]:
        data = trained.experiment.data
        real, unwanted = self.captioned(data)
        plain = {}
        rows = []

        def add(name, nfe, x, speed):
            row = {"name": name, "nfe": nfe, **self.score(x, real, data)}
            rows.append({**row, "samples_per_second": speed})

        for role, steps in self.models(trained.params):
            plain[role], speed = self.generate(trained, role, steps, real)
            add(role, self.nfe(role, steps), plain[role], speed)
        shape = real["label"][:, 0]
        told = np.ones(self.samples, bool)
        negative = data.caption(
            shape, np.full_like(shape, self._colour), told, shaped=False
        )
        for strength in self.strengths:
            scale = np.full(self.samples, strength, np.float32)
            cond = negated(real["cond"], negative, scale)
            x, speed = self.generate(trained, "student", 1, {**real, "cond": cond})
            add(f"nasa{strength:g}", 1, x, speed)
        away, speed = self.generate(trained, "student", 1, unwanted)
        blend = plain["student"] + self.extrapolation * (plain["student"] - away)
        add("blend", 2, blend, speed / 2)
        return rows

    def picture(self, x, real):
        """A grid of up to 100 samples."""
        return grid(x[:100])
