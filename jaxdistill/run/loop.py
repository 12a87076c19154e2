"""The one host loop: stages, steps, checkpoints, metrics, samples, evaluation, report."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxdistill.core import sharding
from jaxdistill.core.step import bind, frozen_weights
from jaxdistill.core.types import Ctx, Refused, Stage, State
from jaxdistill.data import arrayrecord
from jaxdistill.data.base import Dataset
from jaxdistill.data.prefetch import DevicePrefetch
from jaxdistill.run import chips, metrics, records, report
from jaxdistill.run.check import check
from jaxdistill.run.checkpoint import Checkpoints, load_params, save_params, write_json
from jaxdistill.run.experiment import Experiment, Trained
from jaxdistill.run.host import alone, check_writable, heard
from jaxdistill.run.programs import Programs, abstract_programs, make_programs


class Stopped(Exception):
    """The run was asked to stop by `reason` (SIGTERM, SIGINT); it has saved, and running it again
    goes on.
    """

    def __init__(self, reason: signal.Signals, done: str):
        super().__init__(f"{reason.name}: {done}; run again to go on")
        self.reason = reason


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
    with _signals() as stop:
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
    trained = load(workdir, config)
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


def load(workdir: str | Path, config: ConfigDict | None = None) -> Trained:
    """A finished run's networks and weights, by its own config or one that is changed in what does
    not matter to them (where data and teachers lie today, how to evaluate). Raises Refused where it
    has not finished, is damaged, or its config.json was changed.
    """
    workdir = records.local(workdir, "--workdir")
    if config is None or (workdir / "config.json").exists():
        own = records.read_config(workdir)
        records.check_result(workdir, own, (*records.FREE, *records.JUDGED))
        config = own if config is None else config
    experiment = Experiment(config, workdir)
    stages = _done(experiment)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        return _as_given(_result(experiment, stages, len(stages)))


def _done(experiment: Experiment) -> tuple[Stage, ...]:
    """The stages of a run that has a result of each. Raises Refused where it has not."""
    stages = experiment.method.stages(experiment.settings.steps)
    results = records.stages(experiment.workdir)
    if len(results) < len(stages):
        raise Refused(
            f"{experiment.workdir / 'stages' / str(len(results))}: no such result; has that run finished?"
        )
    _check_stages(experiment, results, stages)
    return stages


def _check_stages(experiment: Experiment, results: list[Path], stages: tuple[Stage, ...]) -> None:
    """Raises Refused where there are results of more stages than the method has."""
    if len(results) > len(stages):
        raise Refused(
            f"{results[len(stages)]}: the run's method has {len(stages)} stage{'s' * (len(stages) > 1)}, expected no such result"
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


@contextlib.contextmanager
def _signals():
    """Yields an Event that SIGTERM and Ctrl-C set; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    main = threading.current_thread() is threading.main_thread()

    def handle(number, frame):
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        stop.reason = signal.Signals(number)

    caught = (
        (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
    )  # among several, JAX hears SIGTERM
    before = {s: signal.signal(s, handle) for s in caught} if main else {}
    if (early := heard()) is not None:  # before there was a run to stop
        stop.reason = early
        stop.set()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(experiment: Experiment, stages: tuple[Stage, ...], done: int) -> Trained:
    """Networks and weights after `done` stages: warm starts, then each stage's surgery and result."""
    params = experiment.warm_starts()
    nets = dict(experiment.nets)
    for i, stage in enumerate(stages[:done]):
        nets, params = _prepare(experiment, stage, nets, params)
        shapes = {role: experiment.abstract(nets[role], role) for role in stage.method.inits}
        params |= load_params(experiment.workdir / "stages" / str(i), shapes)
    return Trained(experiment, nets, params)


def _as_given(trained: Trained) -> Trained:
    """With the frozen roles as the run was given them: a later stage's teacher may be an earlier
    one's student.
    """
    experiment = trained.experiment
    if not any(stage.surgery for stage in experiment.method.stages(experiment.settings.steps)[1:]):
        return trained
    given = experiment.warm_starts()
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


def _collect(
    trained: Trained, stage: Stage, index: int, stop: threading.Event, progress: bool
) -> Dataset:
    """The stage's data: the experiment's, or what `stage.collect` makes and stores in data/<stage>,
    a file for each batch.
    """
    experiment = trained.experiment
    settings = trained.experiment.settings
    if stage.collect is None:
        return experiment.data
    folder = experiment.workdir / "data" / str(index)
    folder.mkdir(parents=True, exist_ok=True)
    make = jax.jit(
        lambda params, batch, rng: stage.collect.make(
            bind(trained.nets, params), Ctx(batch, rng, jnp.int32(0), {})
        )
    )
    put = experiment.put_batch()
    key = jax.random.key(settings.seed)
    with DevicePrefetch(
        experiment.data.loader((jax.process_index(), jax.process_count())), put
    ) as batches:
        for i in metrics.bar(
            range(stage.collect.batches), f"{experiment.workdir.name} data", "batch", progress
        ):
            batch, _ = next(batches)
            file = folder / f"batch{i:06d}_{jax.process_index()}.arrayrecord"
            if not file.exists():
                rows = sharding.local_rows(make(trained.params, batch, jax.random.fold_in(key, i)))
                arrayrecord.write(
                    file,
                    (
                        {k: v[n] for k, v in rows.items()}
                        for n in range(len(next(iter(rows.values()))))
                    ),
                )
            if stop.is_set():
                raise Stopped(
                    stop.reason, f"stored {i + 1} of {stage.collect.batches} batches in {folder}"
                )
    return arrayrecord.stored(
        folder, batch_size=experiment.data.batch_size, seed=experiment.data.seed
    )


def _train(experiment: Experiment, stop: threading.Event, progress: bool) -> Trained:
    """All stages; a stage that has left its result in stages/ is not run again."""
    settings = experiment.settings
    workdir = experiment.workdir
    stages = experiment.method.stages(settings.steps)
    results = records.stages(workdir)
    _check_stages(experiment, results, stages)
    finished = len(results)
    trained = _result(experiment, stages, finished)
    if finished == len(stages):
        return trained
    checkpoints = Checkpoints(workdir / "checkpoints", settings.keep)
    try:
        for i in range(finished, len(stages)):
            trained.nets, trained.params = _prepare(
                experiment, stages[i], trained.nets, trained.params
            )
            data = _collect(trained, stages[i], i, stop, progress)
            offset = sum(s.steps for s in stages[:i])
            fit = _Fit(
                dataclasses.replace(trained),
                stages[i],
                i,
                offset,
                data,
                checkpoints,
                stop,
                progress,
            )
            trained.params = {}  # the stage owns them now
            state = fit.run()
            result = {
                role: state.ema.get(role, state.params[role]) for role in stages[i].method.inits
            }
            save_params(workdir / "stages" / str(i), result)
            trained.params = {**fit.trained.params, **state.frozen, **result}
    finally:
        checkpoints.close()
    return trained


class _Fit:
    """One stage: state, data, programs; then steps until done or stopped."""

    def __init__(
        self,
        trained: Trained,
        stage: Stage,
        index: int,
        offset: int,
        data: Dataset,
        checkpoints,
        stop,
        progress,
    ):
        self.trained = trained
        self.stage = stage
        self.index = index
        self.offset = offset
        self.data = data
        self.experiment = trained.experiment
        self.settings = trained.experiment.settings
        self.checkpoints = checkpoints
        self.stop = stop
        self.progress = progress
        self.controller = stage.method.controller()
        self.hints = {}

    def run(self) -> State:
        """Steps until the stage is done, from its newest checkpoint. Raises Stopped where it was
        asked to stop.
        """
        settings = self.settings
        programs = self._start()
        key = jax.random.fold_in(jax.random.key(settings.seed + 1), self.index)
        rng = self._everywhere(key)
        step = self.first
        try:
            while step < self.stage.steps:
                batch, self.position = next(self.batches)
                self.state, values = programs.step(self.state, batch, rng, programs.active_at(step))
                step += 1
                self.pending.add(self.offset + step, values)
                self.bar.update()
                stopping = self._stopping(step)
                last = step == self.stage.steps
                due = lambda every: bool(every) and step % every == 0
                saving = due(settings.checkpoint_every) or last or stopping
                if due(settings.log_every) or saving:
                    self._log(programs, step)
                if due(settings.sample_every) or due(settings.eval_every):
                    scores = report.look(
                        self._view(), self.offset + step, score=due(settings.eval_every)
                    )
                    self.writer.write(self.offset + step, time.time() - self.started, scores)
                if saving:
                    self.checkpoints.save(self.offset + step, self.state, self._host())
                if stopping and not last:
                    self.checkpoints.wait()
                    raise Stopped(
                        self.stop.reason,
                        f"saved step {self.offset + step} in {self.experiment.workdir}",
                    )
        finally:
            self.bar.close()
            self.batches.close()
            self.writer.close()
        self.checkpoints.wait()
        return self.state

    def _start(self) -> Programs:
        """The programs; sets state, data position and everything that the steps write to."""
        settings = self.settings
        stage = self.stage
        workdir = self.experiment.workdir
        programs = make_programs(
            self.experiment, self.trained.nets, stage, self.trained.params, self.data.spec()
        )
        restored = self._restore(programs.abstract)
        if restored is None:
            key = jax.random.fold_in(jax.random.key(settings.seed), self.index)
            self.first, self.state, self.position = (
                0,
                programs.init(self._everywhere(key), self.trained.params),
                None,
            )
        else:
            self.first, self.state, self.position = restored
        mine = (
            self.state.frozen.keys() | self.state.params.keys()
        )  # their weights exist once: in the state
        held = {role: params for role, params in self.trained.params.items() if role not in mine}
        self.trained = dataclasses.replace(self.trained, params=held)
        self.writer = metrics.Writer(
            workdir,
            self.offset + self.first,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            config=self.experiment.config.to_dict(),
        )
        self.pending = metrics.Pending(stage.method.turns)
        self.bar = metrics.bar(range(stage.steps), self._title(), "step", self.progress, self.first)
        self.started = self.logged_at = time.time()
        self.logged = self.first
        self.put = self.experiment.put_batch()
        self.batches = self._batches()
        return programs

    def _everywhere(self, key):
        """A random key as an argument of a program that may span several processes."""
        whole = jax.sharding.NamedSharding(self.experiment.mesh, jax.sharding.PartitionSpec())
        return key if jax.process_count() == 1 else jax.jit(lambda: key, out_shardings=whole)()

    def _stopping(self, step: int) -> bool:
        """Whether to save and stop after this step; several processes agree on it."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            self.offset + step
        ):
            self.stop.reason = signal.SIGTERM
            self.stop.set()
        return self.stop.is_set()

    def _log(self, programs: Programs, step: int) -> None:
        """Writes the means since the last time, and lets the controller see them."""
        means = self._means()
        now = time.time()
        means |= self._rates(programs, step - self.logged, now - self.logged_at)
        self.logged = step
        self.logged_at = now
        self.writer.write(self.offset + step, now - self.started, means)
        self.bar.set_postfix_str(_brief(means), refresh=False)
        self._steer(means)

    def _means(self) -> dict[str, float]:
        """The means since the last time. Where a loss is no number from the first steps on, the
        message has what it may come from.
        """
        try:
            return self.pending.flush()
        except metrics.NonFinite as error:
            found = ""
            if not self.first and self.logged == self.first:
                with contextlib.suppress(
                    OSError, ValueError, RuntimeError, MemoryError
                ):  # a search that fails hides nothing
                    found = self._suspects(error.step)
            raise metrics.NonFinite(f"{error}{found}", error.step) from None

    def _suspects(self, step: int) -> str:
        """What the engine step's batch and the first weights have that is not finite; where all is,
        the settings that it may come from.
        """
        sound = lambda w: not jnp.issubdtype(w.dtype, jnp.floating) or bool(jnp.isfinite(w).all())
        loader = self.data.loader((jax.process_index(), jax.process_count()))
        batch = next(itertools.islice(loader, step - self.offset - 1, None))
        found = [
            f"batch[{name!r}] of that step has values that are not finite"
            for name, v in batch.items()
            if not sound(v)
        ]
        # makes room
        state = self.state
        self.state = None
        weights = dict(state.frozen)
        moving = state.params.keys()
        del state
        given = (
            {}
            if self.index
            else {role: w for role, w in self.experiment.warm_starts().items() if role in moving}
        )
        for role, params in (weights | given).items():
            found += [f"roles.{role} starts from weights that are not finite"] * (
                not all(map(sound, jax.tree.leaves(params)))
            )
        if found:
            return f"; suspects: {', '.join(found)}"
        rates = [
            f"roles.{role}.optimizer.lr={self.experiment.roles[role].optimizer.lr:g}"
            for role in moving
        ]
        return f"; its batch and the first weights are finite: suspects are {', '.join(rates)} and arithmetic in half precision"

    def _title(self) -> str:
        name = self.experiment.workdir.name
        stages = self.experiment.method.stages(self.settings.steps)
        return name if len(stages) == 1 else f"{name} [{self.index + 1}/{len(stages)}]"

    def _restore(self, abstract: State):
        """(steps done in this stage, state, data position); None where this stage has no
        checkpoint.

        Raises Refused where the newest checkpoint is of another config, or of a stage that comes
        later.
        """
        newest = self.checkpoints.host()
        if newest is None:
            return None
        if newest[1].get("stage") == self.index:
            self.checkpoints.check_architecture(*newest, abstract)
        if not self._mine(*newest):
            return None
        found = self.checkpoints.restore(abstract.replace(frozen={}))
        if found is None or not self._mine(found[0], found[2]):
            return None
        step, state, host = found
        if self.controller:
            self.controller.restore(host["controller"])
            self.hints = host["hints"]
            self.data = self.data.steer(self.hints)
        own = lambda given: frozen_weights(self.stage.method, self.trained.nets, given)
        frozen = jax.jit(own, out_shardings=jax.tree.map(lambda s: s.sharding, abstract.frozen))(
            self.trained.params
        )
        return step - self.offset, state.replace(frozen=frozen), host["data"]

    def _mine(self, step: int, host: Mapping[str, Any]) -> bool:
        """Whether a checkpoint is of this stage. Raises Refused where it is of another run, or of a
        stage that comes later.
        """
        where = self.checkpoints.folder / f"step_{step}"
        workdir = self.experiment.workdir
        wanted = {"stage": int, "config": dict} | (
            dict.fromkeys(("controller", "hints"), dict) if self.controller else {}
        )
        records.check_keys(host, wanted, str(where))
        here = json.loads(self.experiment.config.to_json())
        if changed := records.difference(host["config"], here, (*records.FREE, "steps")):
            raise Refused(
                f"{where} is a checkpoint of another config: {changed}; move it away, or give another --workdir"
            )
        if host["stage"] > self.index:
            raise Refused(
                f"{where} is of stage {host['stage']}, but {workdir / 'stages' / str(self.index)} is missing"
            )
        return host["stage"] == self.index

    def _host(self) -> dict[str, Any]:
        controller = (
            {"controller": self.controller.state(), "hints": self.hints} if self.controller else {}
        )
        config = json.loads(self.experiment.config.to_json())
        return {"stage": self.index, "data": self.position, "config": config, **controller}

    def _steer(self, means) -> None:
        """Lets the controller change the data set; the loader then goes on from the same position."""
        hints = self.controller.update(means) if self.controller else {}
        if hints:
            self.batches.close()
            self.hints = {**self.hints, **hints}
            self.data = self.data.steer(hints)
            self.batches = self._batches()

    def _batches(self) -> DevicePrefetch:
        loader = self.data.loader((jax.process_index(), jax.process_count()))
        if self.position is not None:
            loader.set_state(self.position)
        return DevicePrefetch(loader, self.put)

    def _rates(self, programs, steps: int, seconds: float) -> dict[str, float]:
        work = steps / max(seconds, 1e-9)
        rates = {
            "perf/steps_per_second": work,
            "perf/samples_per_second": work * self.data.batch_size,
        }
        rates["perf/model_flops_per_second"] = work * programs.flops
        if chip := chips.of(self.experiment.mesh.devices.flat[0].device_kind):
            rates["perf/mfu"] = work * programs.flops / (chip.flops * self.experiment.mesh.size)
        return rates

    def _view(self) -> Trained:
        averaged = {role: self.state.ema.get(role, p) for role, p in self.state.params.items()}
        return dataclasses.replace(
            self.trained, params={**self.trained.params, **self.state.frozen, **averaged}
        )


def _brief(means: Mapping[str, float]) -> str:
    return " ".join(
        f"{k.removesuffix('/loss')}={v:.3g}" for k, v in means.items() if k.endswith("/loss")
    )


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
        print(report.text_table([{"role": role, **row} for role, row in table.items()]))
        return {"roles": table}
