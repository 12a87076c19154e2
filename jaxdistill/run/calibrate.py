"""Fields of the method that a run measures before a stage, stored in its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxdistill.core.build import plain
from jaxdistill.core.types import Batch, Method, Refused, Stage
from jaxdistill.data.prefetch import DevicePrefetch
from jaxdistill.run import records
from jaxdistill.run.checkpoint import write_json
from jaxdistill.run.experiment import Experiment, Trained
from jaxdistill.run.feed import process


def calibrated(trained: Trained, stage: Stage) -> Experiment:
    """The experiment with the fields of its method that the stage's calibration finds.

    They are in measured.json, from which a resumed run and every reader of the folder take them.

    Raises:
        Refused: The measured method has other stages, or lacks a field.
    """
    experiment = trained.experiment
    method = experiment.method
    missing = stage.calibrate.missing(method) if stage.calibrate else {}
    if not missing:
        return experiment
    with DevicePrefetch(
        experiment.data.loader(process()), experiment.put_batch()
    ) as batches:
        found = stage.calibrate.measure(
            trained.nets, trained.params, _without_positions(batches)
        )
    measured = {name: getattr(found, name) for name in missing}
    _check(experiment, measured)
    new = dataclasses.replace(method, **measured)
    _check_stages(experiment, new)
    record = plain(new).to_dict()
    earlier = records.measured(experiment.workdir)
    fields = earlier | {name: record[name] for name in missing}
    write_json(experiment.workdir / records.MEASURED, fields)
    return experiment.with_method(new)


def _without_positions(batches: DevicePrefetch) -> Iterator[Batch]:
    """The batches alone, without their positions in the data."""
    for batch, _ in batches:
        yield batch


def _check(experiment: Experiment, measured: dict[str, Any]) -> None:
    lacking = [name for name, value in measured.items() if value is None]
    if lacking:
        raise Refused(
            f"{experiment.where}.method.{lacking[0]}: its calibration has not measured it;"
            " expected a value"
        )


def _check_stages(experiment: Experiment, method: Method) -> None:
    """Raises Refused where the measured method has other stages than the one before."""
    steps = experiment.settings.steps
    before = [stage.steps for stage in experiment.method.stages(steps)]
    after = [stage.steps for stage in method.stages(steps)]
    if before != after:
        raise Refused(
            f"{experiment.where}.method: its measured fields change its stages from {before}"
            f" to {after} steps; expected the same"
        )
