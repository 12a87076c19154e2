"""Evaluation of generators of points whose law is known: distances between laws, and what became of
the modes.
"""

from __future__ import annotations

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxdistill.core.types import Refused
from jaxdistill.evals import modes
from jaxdistill.evals.kernels import energy_distance
from jaxdistill.evals.samples import SampleEval
from jaxdistill.evals.sliced import sliced_wasserstein
from jaxdistill.samplers.fewstep import simulate
from jaxdistill.samplers.ode import Solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointEval(SampleEval):
    """For `data.mixtures:Mixture`; the solver is Heun's by default, since the teacher is exact."""

    batch: int = 2000
    solver: Solver = "heun"

    needs = ("components",)
    metrics = ("energy", "sliced_w2", "modes_hit", "mode_kl", "quality", "stray")

    def score(self, x, real, data):
        return {
            "energy": energy_distance(x, real["x"]),
            "sliced_w2": sliced_wasserstein(x, real["x"]),
            "modes_hit": modes.modes_hit(x, data.components),
            "mode_kl": modes.mode_kl(x, data.components),
            "quality": modes.quality(x, data.components),
            "stray": 1 - modes.quality(x, data.components, radius=4.0),
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
    """For modes with a shape (`data.rings:Rings`): with the energy distance between the offsets
    within modes, all modes laid over each other. In the energy distance of the whole law a shape is
    drowned by the modes' shares.
    """

    metrics = (*PointEval.metrics, "texture")

    def score(self, x, real, data):
        texture = energy_distance(
            modes.offsets(x, data.components), modes.offsets(real["x"], data.components)
        )
        return {**super().score(x, real, data), "texture": texture}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainEval(PointEval):
    """For students with a deterministic chain, also `state_energy`: the energy distance between
    what their steps bring to the time `state`, one of the method's student_times, and the noised
    data.
    """

    state: float = 0.5

    metrics = (*PointEval.metrics, "state_energy")

    def rows(self, trained):
        method = trained.experiment.method
        real = trained.experiment.data.evaluation(self.samples)
        noise, eps = jax.random.normal(jax.random.key(self.seed), (2, *real["x"].shape))
        index = method.student_times.index(self.state)
        times = jnp.array(method.student_times)

        @jax.jit
        def reach(params):
            net = functools.partial(
                method.generator(dataclasses.replace(trained, params=params).bound()),
                cond=real.get("cond"),
            )
            return simulate(method.process, net, noise, times, jax.random.key(0), index, "ddim")[0]

        want = method.process.add_noise(real["x"], eps, jnp.asarray(self.state))
        found = energy_distance(np.asarray(reach(trained.params)), np.asarray(want))
        return [
            {**row, "state_energy": found} if row["name"] == "student" else row
            for row in super().rows(trained)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionEval(TextureEval):
    """With the mean cosine of the angle to a direction, which a reward may ask for
    (`models.vision.judges:Direction`).
    """

    angle: float = 0.0  # of the direction, radians

    metrics = (*TextureEval.metrics, "reward")

    def score(self, x, real, data):
        return {
            **super().score(x, real, data),
            "reward": float(np.mean(np.cos(np.arctan2(x[:, 1], x[:, 0]) - self.angle))),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegretEval(DirectionEval):
    """With `regret`, how far the samples' reward is from the best: the mean of (1 - cosine) / 2, of
    1 for a sample farther than `radius` standard deviations from every mode. A reward counts on the
    data's modes alone.
    """

    radius: float = 4.0

    metrics = (*DirectionEval.metrics, "regret")

    def score(self, x, real, data):
        cosine = np.cos(np.arctan2(x[:, 1], x[:, 0]) - self.angle)
        _, distance = modes.assign(x, data.components)
        regret = np.where(distance <= self.radius, (1 - cosine) / 2, 1.0)
        return {**super().score(x, real, data), "regret": float(np.mean(regret))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledPointEval(PointEval):
    """For points made under labels: with the mean over labels of the energy distance to that
    label's data, `class_energy`, and of the standard deviation over the data's, `class_std` (1: as
    wide; 0: collapsed).
    """

    metrics = (*PointEval.metrics, "class_energy", "class_std")

    def check(self, data):
        super().check(data)
        if "cond" not in data.one_sample():
            raise Refused("evaluation: LabelledPointEval needs labels `cond`, the data has none")

    def score(self, x, real, data):
        each = [real["cond"] == label for label in np.unique(real["cond"])]
        spread = lambda points: float(np.sqrt(points.var(0).sum()))
        return {
            **super().score(x, real, data),
            "class_energy": float(
                np.mean([energy_distance(x[mine], real["x"][mine]) for mine in each])
            ),
            "class_std": float(
                np.mean([spread(x[mine]) / spread(real["x"][mine]) for mine in each])
            ),
        }
