"""Evaluation of generators: a table row for each network and number of steps, and pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Shaped

from jaxdistill.core.fields import Count, Real
from jaxdistill.core.sharding import gathered
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.evals.base import Evaluation, Trained
from jaxdistill.samplers import ode
from jaxdistill.samplers.ode import Solver

# arrays [B ...], or groups of such, under the keys of a batch
Samples = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleEval(Evaluation):
    """Samples the student by its method's own sampler, and the teacher by a solver.

    Subclasses score the samples.
    """

    samples: int = 2000
    batch: int = 500  # samples made at once
    student_steps: tuple[Count, ...] = (1,)
    teacher_steps: tuple[Count, ...] = (50, 1)
    solver: Solver = "euler"  # of the teacher
    guidance: Real = 1.0  # of the teacher; other than 1 counts twice in its NFE
    seed: int = 0

    metrics: ClassVar[tuple[str, ...]] = ()  # of `score`

    def check(self, data):
        super().check(data)
        first = data.one_sample()
        if "x" not in first:
            raise Refused(
                f"evaluation: {type(self).__name__} needs samples `x`, "
                f"the data has {', '.join(first)}"
            )

    def table(self, roles, data):
        metrics = (*self.metrics, "samples_per_second")
        return {
            f"{role}@{self.nfe(role, steps)}": metrics
            for role, steps in self.models(roles)
        }

    def score(
        self, x: Shaped[np.ndarray, "B ..."], real: Samples, data: Any
    ) -> dict[str, float]:
        """Metrics of samples that were made under the conditions of real samples.

        Args:
            x: the samples.
            real: the held-out samples; "x" are the data, "cond" their conditions.
            data: the data set.
        """
        raise NotImplementedError

    def references(self, trained: Trained, real: Samples) -> Any:
        """What `compare` holds samples against, made once for all rows; by default nothing.

        Args:
            trained: the run.
            real: the held-out samples.
        """
        return None

    def compare(
        self, x: Shaped[np.ndarray, "B ..."], references: Any
    ) -> dict[str, float]:
        """Metrics of samples held against `references`."""
        return {}

    def picture(self, x: Shaped[np.ndarray, "B ..."], real: Samples) -> Any:
        """A PIL image of the first samples."""
        raise NotImplementedError

    def models(self, roles: Collection[str]) -> list[tuple[str, int]]:
        """(role, steps) of every row."""
        teacher = (
            [("teacher", n) for n in self.teacher_steps]
            if "teacher" in roles
            else []
        )
        return teacher + [("student", n) for n in self.student_steps]

    def drawing(
        self, trained: Trained, role: str, steps: int
    ) -> Callable[..., jax.Array]:
        """The function that samples a network, to be jitted.

        Returns:
            (weights by role, batch of data, number of the batch) -> samples x, with the shape and
            the conditions of the batch.
        """
        method = trained.experiment.method
        process = method.process

        def draw(params, part, i):
            key = jax.random.fold_in(jax.random.key(self.seed), i)
            noise = jax.random.normal(jax.random.fold_in(key, 1), part["x"].shape)
            nets = dataclasses.replace(trained, params=params).bound()
            cond = part.get("cond")
            null = part.get("null_cond")
            if role == "student":
                net = method.generator(nets, null)
                return method.sample(net, noise, cond, key, steps)
            net = vars(nets)[role]

            def denoise(x, t):
                return guided(net, x, t, cond, null, self.guidance)

            return ode.solve(
                self.solver, process, denoise, process.start(noise), steps, key
            )

        return draw

    def generate(
        self, trained: Trained, role: str, steps: int, real: Samples
    ) -> tuple[np.ndarray, float]:
        """Samples under the conditions of `real`, and how many a second after compilation."""
        draw = jax.jit(self.drawing(trained, role, steps))
        real = trained.experiment.conditioned(real)
        out = []
        seconds = 0.0
        made = 0
        for i, low in enumerate(range(0, len(real["x"]), self.batch)):
            part = jax.tree.map(lambda v: v[low : low + self.batch], real)
            started = time.perf_counter()
            x = jax.block_until_ready(draw(trained.params, part, np.int32(i)))
            # The first batch includes compilation; it counts where it is the only one.
            if i or len(real["x"]) <= self.batch:
                seconds = seconds + time.perf_counter() - started
                made = made + len(x)
            out.append(gathered(x))
        return np.concatenate(out), made / seconds

    def nfe(self, role: str, steps: int) -> int:
        """Network evaluations of a chain of `steps` steps."""
        if role == "student":
            return steps
        evaluations = 2 * steps - 1 if self.solver == "heun" else steps
        return evaluations if self.guidance == 1.0 else 2 * evaluations

    def rows(self, trained: Trained) -> list[dict[str, Any]]:
        data = trained.experiment.data
        rows = []
        real = data.evaluation(self.samples)
        references = self.references(trained, real)
        for role, steps in self.models(trained.params):
            x, speed = self.generate(trained, role, steps, real)
            row = {
                "name": role,
                "nfe": self.nfe(role, steps),
                **self.score(x, real, data),
                **self.compare(x, references),
            }
            rows.append({**row, "samples_per_second": speed})
        return rows

    def pictures(self, trained: Trained) -> dict[str, Any]:
        """Title -> PIL image; the data first."""
        real = trained.experiment.data.evaluation(100)
        views = {"data": self.picture(real["x"], real)}
        for role, steps in self.models(trained.params):
            x, _ = self.generate(trained, role, steps, real)
            views[f"{role}, {self.nfe(role, steps)} NFE"] = self.picture(x, real)
        return views
