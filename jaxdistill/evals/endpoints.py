"""Evaluation of samples against the ends of the teacher's own paths from the same noise."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped

from jaxdistill.core.fields import Count
from jaxdistill.core.sharding import as_first_process
from jaxdistill.core.types import Refused
from jaxdistill.evals.base import Trained
from jaxdistill.evals.images import ImageEval
from jaxdistill.evals.points import LabelledPointEval, PointEval
from jaxdistill.evals.samples import SampleEval, Samples

FOLDER = "endpoints"  # in the run's folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndPoints(SampleEval):
    """Adds `endpoint`: the mean squared distance to the ends of the teacher's ODE.

    Each sample is compared with the end of the teacher's path from the same noise, under the same
    condition and guidance, in `fine_steps` steps of the solver. The mean is over samples and their
    numbers. The ends are stored in the run's folder, and are used again.
    """

    fine_steps: Count = 200

    def table(self, roles, data):
        if "teacher" not in roles:
            raise Refused(
                f"evaluation: {type(self).__name__} needs the ends of a teacher's paths;"
                " the run has no role 'teacher'"
            )
        return super().table(roles, data)

    def references(
        self, trained: Trained, real: Samples
    ) -> Float[np.ndarray, "B ..."]:
        """The ends of the teacher's paths under the conditions of real samples.

        Raises:
            Refused: the stored ends are damaged.
        """
        folder = Path(trained.experiment.workdir) / FOLDER
        file = folder / f"{self._name(real)}.npz"
        (stored,) = as_first_process([file.exists()])
        if stored:
            return _read(file, real["x"].shape)
        ends, _ = self.generate(trained, "teacher", self.fine_steps, real)
        if jax.process_index() == 0:
            _write(file, ends)
        return ends

    def compare(
        self,
        x: Shaped[np.ndarray, "B ..."],
        references: Shaped[np.ndarray, "B ..."],
    ) -> dict[str, float]:
        square = (x.astype(np.float64) - references) ** 2
        return {
            **super().compare(x, references),
            "endpoint": float(square.mean()),
        }

    def _name(self, real: Samples) -> str:
        """A name for what the ends depend on, beside the run's own config."""
        parts: list[Any] = [
            self.solver,
            self.fine_steps,
            f"guidance{self.guidance:g}",
        ]
        parts += [f"seed{self.seed}", f"{len(real['x'])}in{self.batch}"]
        return "_".join(map(str, parts))


def _write(file: Path, ends: np.ndarray) -> None:
    """Stores end points, completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{os.getpid()}_{file.name}")
    np.savez(part, ends=ends)
    os.replace(part, file)


def _read(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with file.open("rb") as stream, np.load(stream) as stored:
            ends = stored["ends"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise Refused(
            f"{file}: is damaged; remove it to have it made again"
        ) from error
    if ends.shape != shape:
        raise Refused(
            f"{file}: holds end points of shape {list(ends.shape)}, expected"
            f" {list(shape)}; remove it to have it made again"
        )
    return ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndPointEval(EndPoints, PointEval):
    """`PointEval` with the distance to the teacher's ends."""

    metrics = (*PointEval.metrics, "endpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledEndPointEval(EndPoints, LabelledPointEval):
    """`LabelledPointEval` with the distance to the teacher's ends."""

    metrics = (*LabelledPointEval.metrics, "endpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndImageEval(EndPoints, ImageEval):
    """`ImageEval` with the distance to the teacher's ends, in the numbers of a picture."""

    metrics = (*ImageEval.metrics, "endpoint")
