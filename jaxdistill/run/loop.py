"""The one host loop: stages, steps, checkpoints, metrics, samples, evaluation, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdistill.core import sharding
from jaxdistill.core.step import parts_of, results
from jaxdistill.core.types import Refused, Stage, State
from jaxdistill.run import metrics, records, report
from jaxdistill.run.calibrate import calibrated
from jaxdistill.run.check import check
from jaxdistill.run.checkpoint import (
    Checkpoints,
    load_params,
    save_params,
    write_json,
)
from jaxdistill.run.collect import collected, pooled
from jaxdistill.run.experiment import Experiment, Trained
from jaxdistill.run.fit import Fit
from jaxdistill.run.host import alone, check_writable
from jaxdistill.run.programs import abstract_programs
from jaxdistill.run.stop import Stopped, signals
from jaxdistill.run.table import text_table


def run(
    config: ConfigDict,
    workdir: str | Path,
    *,
    dry_run: bool = False,
    progress: bool = True,
    known: dict[str, Path] | None = None,
) -> dict[str, Any]:
    """Trains what `config` describes, or resumes it.

    The runs in `config.runs` come first, in `workdir/<name>`. Of runs with equal configs one is
    trained, and the others are links to its folder. The last good checkpoint stays, whatever is
    raised.

    Args:
        config: The config.
        workdir: The run's folder.
        dry_run: Only compile, and print bytes and operations by role.
        progress: Whether to show progress bars.
        known: `identity` of a config -> folder of a finished run, which may be linked to. The runs
            that are finished here are added.

    Returns:
        The content of report.json.

    Raises:
        Refused: The input is bad; `workdir` is of another config, damaged or cannot be written to;
            or another process runs in it.
        metrics.NonFinite: A loss or gradient is not finite.
        Stopped: SIGTERM or Ctrl-C came.
        OSError: The machine failed: a full disk, a read error.
    """
    experiment = Experiment(config, records.local(workdir, "--workdir"))
    check(experiment)
    if dry_run:
        return _dry_run(experiment)
    with signals() as stop:
        return _run(experiment, stop, progress, {} if known is None else known)


def _run(
    experiment: Experiment,
    stop: threading.Event,
    progress: bool,
    known: dict[str, Path],
) -> dict[str, Any]:
    """`run` after all checks that need no folder."""
    config = experiment.config
    workdir = experiment.workdir
    own = identity(config)
    if own in known and not workdir.exists():
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(
            FileExistsError
        ):  # another process of this run made the link
            workdir.symlink_to(os.path.relpath(known[own], workdir.parent))
    _check_folder(config, workdir)
    if (workdir / "report.json").exists():
        records.check_result(workdir, config)
        _done(experiment)
        known.update(_finished(experiment) | known)
        return report.read(workdir)
    with alone(workdir), _without_config_where_refused(workdir):
        write_json(workdir / "config.json", config.to_dict())
        started = time.time() - _seconds_before(workdir)
        reports = {}
        for name in experiment.runs:
            reports[name] = _run(experiment.inner[name], stop, progress, known)
            if stop.is_set():
                raise Stopped(stop.reason, f"finished {workdir / name}")
        with sharding.use(experiment.mesh, experiment.settings.rules):
            trained = _as_given(_train(experiment, stop, progress))
            if stop.is_set():
                raise Stopped(
                    stop.reason, f"trained in {workdir}, not yet evaluated"
                )
            result = report.write(trained, reports, seconds=time.time() - started)
    known[own] = workdir
    return result


def _seconds_before(workdir: Path) -> float:
    """Seconds that the earlier processes of a run took, by its last metrics."""
    last = metrics.read(workdir / "metrics.jsonl", clock=True)[-1:]
    return sum(record["seconds"] for record in last)


@contextlib.contextmanager
def _without_config_where_refused(workdir: Path) -> Iterator[None]:
    """Removes a new config.json where the run is refused before it has made anything.

    A run of a corrected config may then follow in the same folder.
    """
    is_new = not (workdir / "config.json").exists()
    try:
        yield
    except Refused:
        made = [
            *(workdir / "checkpoints").glob("*"),
            *(workdir / "stages").glob("*"),
            *workdir.glob("metrics.jsonl"),
        ]
        if is_new and not made and jax.process_index() == 0:
            (workdir / "config.json").unlink(missing_ok=True)
        raise


def identity(config: ConfigDict) -> str:
    """A text that is equal for configs of equal values."""
    return config.to_json(sort_keys=True)


def _finished(experiment: Experiment) -> dict[str, Path]:
    """`identity` of the config -> folder, of a run and the runs inside it that have finished."""
    found = {}
    for name in experiment.runs:
        found |= _finished(experiment.inner[name])
    if (experiment.workdir / "report.json").exists():
        found[identity(experiment.config)] = experiment.workdir
    return found


def evaluate(
    workdir: str | Path, config: ConfigDict | None = None
) -> dict[str, Any]:
    """Evaluates a finished run again and rewrites its report.

    Args:
        workdir: The run's folder.
        config: Its config with another evaluation or claim; None for its own.

    Returns:
        The content of report.json.

    Raises:
        Refused: The run has not finished, or the folder is read-only.
    """
    before = report.read(records.local(workdir, "--workdir"))
    check_writable(Path(workdir))
    # The report shows the curves: damaged ones are refused before the evaluation.
    metrics.read(Path(workdir) / "metrics.jsonl")
    experiment = _opened(workdir, config)
    method = experiment.method
    roles = experiment.with_bases([*method.frozen, *method.exports])
    trained = _loaded(experiment, roles)
    reports = {name: report.read(Path(workdir) / name) for name in experiment.runs}
    # The report keeps the config that was trained, but for the evaluation and the claim.
    now = json.loads(experiment.config.to_json())
    reported = {
        k: v for k, v in before["config"].items() if k not in records.JUDGED
    }
    reported |= {k: v for k, v in now.items() if k in records.JUDGED}
    with sharding.use(experiment.mesh, experiment.settings.rules):
        return report.write(
            trained, reports, seconds=before["seconds"], config=reported
        )


def load(
    workdir: str | Path,
    config: ConfigDict | None = None,
    *,
    roles: Collection[str] | None = None,
) -> Trained:
    """A finished run's networks and weights.

    Args:
        workdir: The run's folder.
        config: The run's config with changes that do not affect the weights: new places of data
            and teachers, another evaluation. None for its own.
        roles: The roles whose weights are read; None for all. Where a stage has a surgery all are
            read, since the surgery takes them.

    Raises:
        Refused: The run has not finished, is damaged, or its config.json was changed.
    """
    return _loaded(_opened(workdir, config), roles)


def _loaded(experiment: Experiment, roles: Collection[str] | None) -> Trained:
    """`load` of a run whose folder has been checked."""
    stages = _done(experiment)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        return _as_given(_result(experiment, stages, len(stages), roles))


def _opened(workdir: str | Path, config: ConfigDict | None) -> Experiment:
    """The experiment of a run's folder, by `config` or by its own config.

    Raises Refused if its config.json is damaged, or was changed after the training.
    """
    workdir = records.local(workdir, "--workdir")
    if config is None or (workdir / "config.json").exists():
        own = records.read_config(workdir)
        records.check_result(workdir, own, (*records.FREE, *records.JUDGED))
        config = own if config is None else config
    return Experiment(config, workdir)


def _done(experiment: Experiment) -> tuple[Stage, ...]:
    """The stages of a run, all with a result. Raises Refused where a result is missing."""
    stages = experiment.method.stages(experiment.settings.steps)
    stored = records.stages(experiment.workdir)
    if len(stored) < len(stages):
        missing = experiment.workdir / "stages" / str(len(stored))
        raise Refused(f"{missing}: no such result; has that run finished?")
    _check_stages(experiment, stored, stages)
    return stages


def _check_stages(
    experiment: Experiment, stored: list[Path], stages: tuple[Stage, ...]
) -> None:
    """Raises Refused where there are results of more stages than the method has."""
    if len(stored) > len(stages):
        number = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
        raise Refused(
            f"{stored[len(stages)]}: the run's method has {number}, expected no such result"
        )


def _check_folder(config: ConfigDict, workdir: Path) -> None:
    """Raises Refused where `workdir` is a file or has a run of another config."""
    if workdir.exists() and not workdir.is_dir():
        raise Refused(f"--workdir={workdir}: is a file")
    if not (workdir / "config.json").exists():
        return
    there = json.loads(records.read_config(workdir).to_json())
    changed = records.difference(there, json.loads(config.to_json()))
    if changed:
        raise Refused(
            f"{workdir} holds a run of another config: {changed}; give another --workdir"
        )


def _result(
    experiment: Experiment,
    stages: tuple[Stage, ...],
    done: int,
    roles: Collection[str] | None = None,
) -> Trained:
    """Networks and weights after `done` stages.

    Args:
        experiment: The run.
        stages: All its stages.
        done: The number of those with a result.
        roles: The roles whose weights are read; None for all. Where a stage has a surgery all are
            read, since the surgery takes them.
    """
    trained_in_stages = {
        role for stage in stages[:done] for role in stage.method.inits
    }
    if any(stage.surgery for stage in stages[:done]):
        roles = None
        trained_in_stages = set()  # a surgery takes their first weights, too
    roles = set(experiment.roles if roles is None else roles)
    params = experiment.warm_starts(roles - trained_in_stages)
    nets = dict(experiment.nets)
    for i, stage in enumerate(stages[:done]):
        nets, params = _prepare(experiment, stage, nets, params)
        trained = [role for role in stage.method.inits if role in roles]
        shapes = {role: experiment.abstract(nets[role], role) for role in trained}
        for role in stage.last:
            shapes[f"last_{role}"] = experiment.abstract(nets[role], role)
        if shapes:
            params |= load_params(experiment.workdir / "stages" / str(i), shapes)
    return Trained(experiment, nets, params)


def _as_given(trained: Trained) -> Trained:
    """`trained` with the networks and weights that the config gives the frozen roles.

    A surgery may have replaced them: the teacher of a later stage may be an earlier student.
    Frozen roles that only a surgery makes stay.
    """
    experiment = trained.experiment
    later = experiment.method.stages(experiment.settings.steps)[1:]
    if not any(stage.surgery for stage in later):
        return trained
    given = experiment.warm_starts(experiment.method.frozen)
    nets = dict(trained.nets)
    params = dict(trained.params)
    for role in experiment.method.frozen:
        if role in given:
            nets[role] = experiment.nets[role]
            params[role] = given[role]
    return dataclasses.replace(trained, nets=nets, params=params)


def _prepare(experiment: Experiment, stage: Stage, nets, params):
    """(networks, weights) after the stage's surgery, which gets the first training batch."""
    if stage.surgery is None:
        return nets, params
    first = next(experiment.data.loader())
    batch = jax.tree.map(jnp.asarray, experiment.conditioned(first))
    nets, params = stage.surgery(nets, params, batch)
    return nets, dict(params)


def _train(
    experiment: Experiment, stop: threading.Event, progress: bool
) -> Trained:
    """Networks and weights after all stages. Stages with a result in stages/ do not run again."""
    workdir = experiment.workdir
    stages = experiment.method.stages(experiment.settings.steps)
    stored = records.stages(workdir)
    _check_stages(experiment, stored, stages)
    trained = _result(experiment, stages, len(stored))
    if len(stored) == len(stages):
        return trained
    checkpoints = Checkpoints(workdir / "checkpoints", experiment.settings.keep)
    try:
        for i in range(len(stored), len(stages)):
            experiment = calibrated(trained, stages[i])
            stages = experiment.method.stages(experiment.settings.steps)
            stage = stages[i]
            nets, params = _prepare(experiment, stage, trained.nets, trained.params)
            trained = Trained(experiment, nets, params)
            data = collected(trained, stage, i, stop, progress)
            data = pooled(trained, stage, i, data, stop, progress)
            offset = sum(before.steps for before in stages[:i])
            given = dataclasses.replace(trained)
            # The stage gets the only reference to the weights, so that it can free them.
            params = {}
            trained.params = {}
            fit = Fit(given, stage, i, offset, data, checkpoints, stop, progress)
            del given
            state = fit.run()
            result = results(state, stage.last)
            save_params(workdir / "stages" / str(i), result)
            trained.params = {**fit.trained.params, **state.frozen, **result}
    finally:
        checkpoints.close()
    return trained


def _dry_run(experiment: Experiment) -> dict[str, Any]:
    """Compiles the programs of the first stage; prints and returns bytes and flops by role."""
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = abstract_programs(experiment)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = programs.abstract
        table = {}
        for role, net in nets.items():
            table[role] = {"parameters": net.size, "bytes": _bytes_of(state, role)}
        for active, by_role in programs.patterns.items():
            name = "+".join(str(i) for i in active)
            for role in table:
                table[role][f"flops, turns {name}"] = by_role.get(role, 0.0)
            compiled = programs.step.lower(
                state, programs.batch, key, active
            ).compile()
            memory = compiled.memory_analysis()
            temporaries = memory.temp_size_in_bytes / 2**20
            arguments = memory.argument_size_in_bytes / 2**20
            print(
                f"turns {name}: compiled; {temporaries:.1f} MiB temporaries, "
                f"{arguments:.1f} MiB arguments on each device"
            )
        print(text_table([{"role": role, **row} for role, row in table.items()]))
        return {"roles": table}


def _bytes_of(state: State, role: str) -> int:
    """Bytes of a role's weights, optimiser state and average."""
    leaves = jax.tree.leaves(parts_of(state, role))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
