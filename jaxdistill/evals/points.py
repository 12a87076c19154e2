"""Evaluation of generators of points whose law is known: distances between laws, and what became of the modes."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import Image

from jaxdistill.evals import modes
from jaxdistill.evals.kernels import energy_distance
from jaxdistill.evals.samples import SampleEval
from jaxdistill.evals.sliced import sliced_wasserstein


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointEval(SampleEval):
    """For `data.mixtures:Mixture`; the solver is Heun's by default, since the teacher is exact."""

    batch: int = 2000
    solver: str = "heun"

    def score(self, x, real, data):
        return {
            "energy": energy_distance(x, real["x"]),
            "sliced_w2": sliced_wasserstein(x, real["x"]),
            "modes_hit": modes.modes_hit(x, data.law),
            "mode_kl": modes.mode_kl(x, data.law),
            "quality": modes.quality(x, data.law),
            "stray": 1 - modes.quality(x, data.law, radius=4.0),
        }

    def picture(self, x, real):
        """A scatter plot of the first two dimensions, data in grey below."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(3.2, 3.2), layout="constrained")
        axis.scatter(*real["x"][:, :2].T, s=2, color="0.8")
        axis.scatter(*x[:, :2].T, s=2)
        axis.set(xticks=[], yticks=[], aspect="equal")
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=100)
        pyplot.close(figure)
        return Image.open(out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextureEval(PointEval):
    """For modes with a shape (`data.rings:Rings`): with the energy distance between the offsets within modes, all modes
    laid over each other. In the energy distance of the whole law a shape is drowned by the modes' shares."""

    def score(self, x, real, data):
        texture = energy_distance(modes.offsets(x, data.law), modes.offsets(real["x"], data.law))
        return {**super().score(x, real, data), "texture": texture}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledPointEval(PointEval):
    """For points made under labels: with the mean over labels of the energy distance to that label's data, `class_energy`,
    and of the standard deviation over the data's, `class_std` (1: as wide; 0: collapsed)."""

    def score(self, x, real, data):
        each = [real["cond"] == label for label in np.unique(real["cond"])]
        spread = lambda points: float(np.sqrt(points.var(0).sum()))
        return {
            **super().score(x, real, data),
            "class_energy": float(np.mean([energy_distance(x[mine], real["x"][mine]) for mine in each])),
            "class_std": float(np.mean([spread(x[mine]) / spread(real["x"][mine]) for mine in each])),
        }
