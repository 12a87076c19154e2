"""What a negative prompt does to a one-step student: how often the unwanted still comes, and what
the samples become.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from einops import rearrange
from PIL import Image

from jaxdistill.core.types import lookup
from jaxdistill.data.shapes import COLOURS, pictures
from jaxdistill.diffusion.guidance import negated
from jaxdistill.evals import distances
from jaxdistill.evals.samples import SampleEval


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeEval(SampleEval):
    """For `data.shapes:Shapes`, under captions that leave the colour open. Rows besides teacher and
    student: `nasa`, the student with a negative prompt in its attention, at each strength; `blend`,
    its output extrapolated away from that under the unwanted prompt, as guidance would.

    `unwanted`: share of samples of that colour; `accuracy`: of the shape asked for; `stray`: root
    mean square distance of a pixel from the nearest valid picture.
    """

    samples: int = 1000
    colour: str = "red"  # what the negative prompt says
    strengths: tuple[float, ...] = (0.5, 1.0)
    extrapolation: float = 0.5  # of `blend`

    needs = ("caption",)
    metrics = ("unwanted", "accuracy", "stray")

    def check(self, data):
        super().check(data)
        lookup(dict.fromkeys(COLOURS), self.colour, "evaluation.colour")

    def table(self, roles, data):
        metrics = (*self.metrics, "samples_per_second")
        return {
            **super().table(roles, data),
            **{f"nasa{a:g}@1": metrics for a in self.strengths},
            "blend@2": metrics,
        }

    def score(self, x, real, data):
        valid = pictures()
        squared = distances.squared(x.reshape(len(x), -1), valid.reshape(-1, x[0].size))
        shape, colour, *_ = np.unravel_index(squared.argmin(1), valid.shape[:4])
        return {
            "unwanted": float(np.mean(colour == list(COLOURS).index(self.colour))),
            "accuracy": float(np.mean(shape == real["label"][:, 0])),
            "stray": float(np.sqrt(squared.min(1) / x[0].size).mean()),
        }

    def asked(self, data) -> tuple[dict, dict]:
        """(captions without colour, with the samples that they are from; the same captions with the
        unwanted colour).
        """
        real = data.evaluation(self.samples)
        shape = real["label"][:, 0]
        none = np.zeros(self.samples, bool)
        colour = np.full_like(shape, list(COLOURS).index(self.colour))
        return {**real, "cond": data.caption(shape, colour, none)}, {
            **real,
            "cond": data.caption(shape, colour, ~none),
        }

    def rows(self, trained):
        data = trained.experiment.data
        real, other = self.asked(data)
        plain = {}
        rows = []

        def add(name, nfe, x, speed):
            rows.append(
                {"name": name, "nfe": nfe, **self.score(x, real, data), "samples_per_second": speed}
            )

        for role, steps in self.models(trained.params):
            plain[role], speed = self.generate(trained, role, steps, real)
            add(role, self.nfe(role, steps), plain[role], speed)
        colour = data.caption(
            real["label"][:, 0],
            np.full_like(real["label"][:, 0], list(COLOURS).index(self.colour)),
            np.ones(self.samples, bool),
            shaped=False,
        )
        for alpha in self.strengths:
            cond = negated(real["cond"], colour, np.full(self.samples, alpha, np.float32))
            add(f"nasa{alpha:g}", 1, *self.generate(trained, "student", 1, {**real, "cond": cond}))
        away, speed = self.generate(trained, "student", 1, other)
        add(
            "blend", 2, plain["student"] + self.extrapolation * (plain["student"] - away), speed / 2
        )
        return rows

    def picture(self, x, real):
        """A 10-column grid of up to 100 samples, a pixel apart, enlarged to about 320 px."""
        x = np.clip((x[:100] + 1) * 127.5, 0, 255).astype(np.uint8)
        x = np.pad(x, ((0, -len(x) % 10), (0, 1), (0, 1), (0, 0)), constant_values=96)
        grid = Image.fromarray(rearrange(x, "(r c) h w d -> (r h) (c w) d", c=10))
        scale = max(1, round(320 / grid.width))
        return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)
