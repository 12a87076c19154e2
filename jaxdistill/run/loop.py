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
from jaxdistill.core.types import Refused, Stage
from jaxdistill.run import metrics, records, report
from jaxdistill.run.check import check
from jaxdistill.run.checkpoint import Checkpoints, load_params, save_params, write_json
from jaxdistill.run.collect import collected
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
    """Trains what `config` describes in `workdir`, or goes on where it stopped; returns the content
    of report.json.

    The runs in `config.runs` come first, in `workdir/<name>`; one that is the same as another
    becomes a link to it. `known` has the folders of finished runs that may be linked to, by
    `identity` of their configs; what this run finishes joins them. Raises Refused on bad input,
    where `workdir` is of another config, damaged or not to be written to, and where another process
    runs in it; metrics.NonFinite where a loss stops being a number, Stopped after SIGTERM or
    Ctrl-C, OSError where the machine fails (a full disk, a read error); in all cases the last good
    checkpoint stays.
    """
    experiment = Experiment(config, records.local(workdir, "--workdir"))
    check(experiment)
    if dry_run:
        return _dry_run(experiment)
    with signals() as stop:
        return _run(experiment, stop, progress, {} if known is None else known)


def _run(
    experiment: Experiment, stop: threading.Event, progress: bool, known: dict[str, Path]
) -> dict[str, Any]:
    """`run` after all checks that need no folder."""
    config = experiment.config
    workdir = experiment.workdir
    own = identity(experiment.config)
    if own in known and not workdir.exists():
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process of this run was first
            workdir.symlink_to(os.path.relpath(known[own], workdir.parent))
    _check_folder(config, workdir)
    if (workdir / "report.json").exists():
        records.check_result(workdir, config)
        _done(experiment)
        known.update(_finished(experiment) | known)
        return report.read(workdir)
    with alone(workdir), _claimed(workdir):
        write_json(workdir / "config.json", config.to_dict())
        before = metrics.read(workdir / "metrics.jsonl", clock=True)[-1:]
        started = time.time() - sum(
            record["seconds"] for record in before
        )  # of the processes that this one goes on from
        reports = {}
        for name in experiment.runs:
            reports[name] = _run(experiment.inner[name], stop, progress, known)
            if stop.is_set():
                raise Stopped(stop.reason, f"finished {workdir / name}")
        with sharding.use(experiment.mesh, experiment.settings.rules):
            trained = _as_given(_train(experiment, stop, progress))
            if stop.is_set():
                raise Stopped(stop.reason, f"trained in {workdir}, not yet evaluated")
            result = report.write(trained, reports, seconds=time.time() - started)
    known[own] = workdir
    return result


@contextlib.contextmanager
def _claimed(workdir: Path) -> Iterator[None]:
    """Takes the config away again where the run is refused before it has made anything: a corrected
    one may follow.
    """
    fresh = not (workdir / "config.json").exists()
    try:
        yield
    except Refused:
        made = [
            *(workdir / "checkpoints").glob("*"),
            *(workdir / "stages").glob("*"),
            *workdir.glob("metrics.jsonl"),
        ]
        if fresh and not made and jax.process_index() == 0:
            (workdir / "config.json").unlink(missing_ok=True)
        raise


def identity(config: ConfigDict) -> str:
    """The same for configs of the same values."""
    return config.to_json(sort_keys=True)


def _finished(experiment: Experiment) -> dict[str, Path]:
    """The folders of a finished run and of those inside it, by `identity`."""
    inside = [_finished(experiment.inner[name]) for name in experiment.runs]
    done = (experiment.workdir / "report.json").exists()
    return {k: v for found in inside for k, v in found.items()} | (
        {identity(experiment.config): experiment.workdir} if done else {}
    )


def evaluate(workdir: str | Path, config: ConfigDict | None = None) -> dict[str, Any]:
    """Scores a finished run again and rewrites its report. Raises Refused where it has not
    finished, or the folder is read-only.
    """
    before = report.read(records.local(workdir, "--workdir"))
    check_writable(Path(workdir))
    metrics.read(
        Path(workdir) / "metrics.jsonl"
    )  # its curves go into the report: refused before the evaluation, not after it
    given = records.read_config(Path(workdir)) if config is None else config
    experiment = Experiment(given, Path(workdir))
    method = experiment.method
    roles = experiment.with_bases([*method.frozen, *method.exports])
    trained = load(workdir, config, roles=roles)
    reports = {name: report.read(Path(workdir) / name) for name in trained.experiment.runs}
    kept = {
        k: v for k, v in before["config"].items() if k not in records.JUDGED
    }  # what was trained stays what it was
    judged = {
        k: v
        for k, v in json.loads(trained.experiment.config.to_json()).items()
        if k in records.JUDGED
    }
    with sharding.use(trained.experiment.mesh, trained.experiment.settings.rules):
        return report.write(trained, reports, seconds=before["seconds"], config={**kept, **judged})


def load(
    workdir: str | Path,
    config: ConfigDict | None = None,
    *,
    roles: Collection[str] | None = None,
) -> Trained:
    """A finished run's networks and weights.

    Args:
        workdir: The run's folder.
        config: The run's own config (None), or one that is changed in what does not matter to the
            weights: where data and teachers lie today, how to evaluate.
        roles: The roles whose weights are read (None: all). A run with a surgery reads all of them,
            which the surgery takes.

    Raises:
        Refused: The run has not finished, is damaged, or its config.json was changed.
    """
    workdir = records.local(workdir, "--workdir")
    if config is None or (workdir / "config.json").exists():
        own = records.read_config(workdir)
        records.check_result(workdir, own, (*records.FREE, *records.JUDGED))
        config = own if config is None else config
    experiment = Experiment(config, workdir)
    stages = _done(experiment)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        return _as_given(_result(experiment, stages, len(stages), roles))


def _done(experiment: Experiment) -> tuple[Stage, ...]:
    """The stages of a run that has a result of each. Raises Refused where it has not."""
    stages = experiment.method.stages(experiment.settings.steps)
    results = records.stages(experiment.workdir)
    if len(results) < len(stages):
        raise Refused(
            f"{experiment.workdir / 'stages' / str(len(results))}: no such result; has that run"
            " finished?"
        )
    _check_stages(experiment, results, stages)
    return stages


def _check_stages(experiment: Experiment, results: list[Path], stages: tuple[Stage, ...]) -> None:
    """Raises Refused where there are results of more stages than the method has."""
    if len(results) > len(stages):
        raise Refused(
            f"{results[len(stages)]}: the run's method has {len(stages)}"
            f" stage{'s' * (len(stages) > 1)}, expected no such result"
        )


def _check_folder(config: ConfigDict, workdir: Path) -> None:
    """Raises Refused where another config has been run in the folder, or it is none."""
    if workdir.exists() and not workdir.is_dir():
        raise Refused(f"--workdir={workdir}: is a file")
    if not (workdir / "config.json").exists():
        return
    there = json.loads(records.read_config(workdir).to_json())
    if changed := records.difference(there, json.loads(config.to_json())):
        raise Refused(f"{workdir} holds a run of another config: {changed}; give another --workdir")


def _result(
    experiment: Experiment,
    stages: tuple[Stage, ...],
    done: int,
    roles: Collection[str] | None = None,
) -> Trained:
    """Networks and weights after `done` stages.

    `roles`: those whose weights are read, where no stage has a surgery; None: all.
    """
    replaced = {role for stage in stages[:done] for role in stage.method.inits}
    if any(stage.surgery for stage in stages[:done]):  # which takes the weights of all roles
        roles = None
        replaced = set()
    roles = set(experiment.roles if roles is None else roles)
    params = experiment.warm_starts(roles - replaced)
    nets = dict(experiment.nets)
    for i, stage in enumerate(stages[:done]):
        nets, params = _prepare(experiment, stage, nets, params)
        trained = [role for role in stage.method.inits if role in roles]
        shapes = {role: experiment.abstract(nets[role], role) for role in trained}
        if shapes:
            params |= load_params(experiment.workdir / "stages" / str(i), shapes)
    return Trained(experiment, nets, params)


def _as_given(trained: Trained) -> Trained:
    """With the frozen roles as the run was given them: a later stage's teacher may be an earlier
    one's student.
    """
    experiment = trained.experiment
    if not any(stage.surgery for stage in experiment.method.stages(experiment.settings.steps)[1:]):
        return trained
    given = experiment.warm_starts(experiment.method.frozen)
    frozen = [
        role for role in experiment.method.frozen if role in given
    ]  # the others are a surgery's own
    nets = {**trained.nets, **{role: experiment.nets[role] for role in frozen}}
    return dataclasses.replace(
        trained, nets=nets, params={**trained.params, **{role: given[role] for role in frozen}}
    )


def _prepare(experiment: Experiment, stage: Stage, nets, params):
    """The stage's surgery, on the first training batch."""
    if stage.surgery is None:
        return nets, params
    batch = jax.tree.map(jnp.asarray, experiment.conditioned(next(experiment.data.loader())))
    nets, params = stage.surgery(nets, params, batch)
    return nets, dict(params)


def _train(experiment: Experiment, stop: threading.Event, progress: bool) -> Trained:
    """The result of all stages. A stage whose result is in stages/ is not run again."""
    workdir = experiment.workdir
    stages = experiment.method.stages(experiment.settings.steps)
    results = records.stages(workdir)
    _check_stages(experiment, results, stages)
    trained = _result(experiment, stages, len(results))
    if len(results) == len(stages):
        return trained
    checkpoints = Checkpoints(workdir / "checkpoints", experiment.settings.keep)
    try:
        for i in range(len(results), len(stages)):
            stage = stages[i]
            nets, params = _prepare(experiment, stage, trained.nets, trained.params)
            trained = Trained(experiment, nets, params)
            data = collected(trained, stage, i, stop, progress)
            offset = sum(before.steps for before in stages[:i])
            given = dataclasses.replace(trained)
            trained.params = params = {}  # the stage has the only reference, and frees it
            fit = Fit(given, stage, i, offset, data, checkpoints, stop, progress)
            del given
            state = fit.run()
            result = {r: state.ema.get(r, state.params[r]) for r in stage.method.inits}
            save_params(workdir / "stages" / str(i), result)
            trained.params = {**fit.trained.params, **state.frozen, **result}
    finally:
        checkpoints.close()
    return trained


def _dry_run(experiment: Experiment) -> dict[str, Any]:
    """Builds everything, compiles each turn pattern of the first stage, prints bytes and flops per
    role, and stops.
    """
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = abstract_programs(experiment)
        key = jax.eval_shape(lambda: jax.random.key(0))
        size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        state = programs.abstract
        table = {}
        for role, net in nets.items():
            held = [
                getattr(state, part).get(role, {}) for part in ("params", "opt", "ema", "frozen")
            ]
            table[role] = {"parameters": net.size, "bytes": size(held)}
        for active, by_role in programs.patterns.items():
            name = "+".join(str(i) for i in active)
            for role in table:
                table[role][f"flops, turns {name}"] = by_role.get(role, 0.0)
            compiled = programs.step.lower(state, programs.batch, key, active).compile()
            memory = compiled.memory_analysis()
            print(
                f"turns {name}: compiled; {memory.temp_size_in_bytes / 2**20:.1f} MiB temporaries, "
                f"{memory.argument_size_in_bytes / 2**20:.1f} MiB arguments on each device"
            )
        print(text_table([{"role": role, **row} for role, row in table.items()]))
        return {"roles": table}
