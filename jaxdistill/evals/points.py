"""Evaluation of generators of points whose distribution is known.

Distances between distributions, and how the modes are covered.
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
from jaxdistill.data.abilities import HasModes
from jaxdistill.evals import modes
from jaxdistill.evals.kernels import energy_distance
from jaxdistill.evals.samples import SampleEval
from jaxdistill.evals.sliced import sliced_wasserstein
from jaxdistill.samplers.fewstep import simulate
from jaxdistill.samplers.ode import Solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointEval(SampleEval):
    """Distances from the data and coverage of its modes, for `data.mixtures:Mixture`.

    `stray` is the share of samples more than 4 standard deviations from their mode's mean.
    """

    batch: int = 2000
    solver: Solver = "heun"  # of the teacher, which is exact

    needs = (HasModes,)
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
        """A scatter plot of the first two dimensions, over the data in grey."""
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
    """`PointEval` for modes with a shape (`data.rings:Rings`).

    `texture` is the energy distance between the offsets of samples and data from their modes'
    means, all modes together. In the energy distance of the full distribution the shares of the
    modes hide a shape.
    """

    metrics = (*PointEval.metrics, "texture")

    def score(self, x, real, data):
        own = modes.offsets(x, data.components)
        wanted = modes.offsets(real["x"], data.components)
        return {
            **super().score(x, real, data),
            "texture": energy_distance(own, wanted),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainEval(PointEval):
    """`PointEval` for students with a deterministic chain.

    `state_energy` is the energy distance between the student's samples at the time `state` of its
    chain and the noised data.
    """

    state: float = 0.5  # one of the method's student_times

    metrics = (*PointEval.metrics, "state_energy")

    def rows(self, trained):
        method = trained.experiment.method
        real = trained.experiment.data.evaluation(self.samples)
        noise, eps = jax.random.normal(
            jax.random.key(self.seed), (2, *real["x"].shape)
        )
        index = method.student_times.index(self.state)
        times = jnp.array(method.student_times)

        @jax.jit
        def reach(params):
            nets = dataclasses.replace(trained, params=params).bound()
            drawn_by = method.generator(nets, real.get("null_cond"))
            net = functools.partial(drawn_by, cond=real.get("cond"))
            key = jax.random.key(0)
            return simulate(method.process, net, noise, times, key, index, "ddim")[
                0
            ]

        wanted = method.process.add_noise(real["x"], eps, jnp.asarray(self.state))
        found = energy_distance(
            np.asarray(reach(trained.params)), np.asarray(wanted)
        )
        rows = super().rows(trained)
        for row in rows:
            if row["name"] == "student":
                row["state_energy"] = found
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionEval(TextureEval):
    """`TextureEval` with the mean reward of points in a direction.

    The reward is the cosine of the angle between point and direction, as of
    `models.vision.judges:Direction`.
    """

    angle: float = 0.0  # of the direction, radians

    metrics = (*TextureEval.metrics, "reward")

    def score(self, x, real, data):
        angles = np.arctan2(x[:, 1], x[:, 0])
        reward = float(np.mean(np.cos(angles - self.angle)))
        return {**super().score(x, real, data), "reward": reward}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegretEval(DirectionEval):
    """`DirectionEval` with the mean regret, which counts a reward on the data's modes alone.

    The regret of a sample is (1 - cosine) / 2, the reward that it lacks to the best. It is 1 for a
    sample farther than `radius` standard deviations from its mode's mean.
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
    """`PointEval` for points made under labels.

    `class_energy` is the mean over labels of the energy distance to that label's data; `class_std`
    that of the standard deviation over the data's (1: as wide; 0: collapsed).
    """

    metrics = (*PointEval.metrics, "class_energy", "class_std")

    def check(self, data):
        super().check(data)
        if "cond" not in data.one_sample():
            raise Refused(
                "evaluation: LabelledPointEval needs labels `cond`, the data has none"
            )

    def score(self, x, real, data):
        energy = []
        width = []
        for label in np.unique(real["cond"]):
            mine = real["cond"] == label
            energy.append(energy_distance(x[mine], real["x"][mine]))
            width.append(_spread(x[mine]) / _spread(real["x"][mine]))
        return {
            **super().score(x, real, data),
            "class_energy": float(np.mean(energy)),
            "class_std": float(np.mean(width)),
        }


def _spread(points: np.ndarray) -> float:
    """Root of the total variance of points [B D]."""
    return float(np.sqrt(points.var(0).sum()))
