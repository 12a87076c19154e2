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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxdistill.core import chips, flops, metrics, report, sharding
from jaxdistill.core.bank import Bank
from jaxdistill.core.checkpoint import Checkpoints, load_params, save_params, write_json
from jaxdistill.core.experiment import Experiment
from jaxdistill.core.host import alone
from jaxdistill.core.net import Net
from jaxdistill.core.step import bind, frozen_weights, init_state, make_train_step
from jaxdistill.core.types import Ctx, Params, Refused, Stage, State
from jaxdistill.data import arrayrecord
from jaxdistill.data.base import Dataset
from jaxdistill.data.prefetch import DevicePrefetch


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C); it has saved, and running it again goes on."""


@dataclasses.dataclass
class Trained:
    """A finished run: networks and weights by role (averaged where a role has an average)."""

    experiment: Experiment
    nets: dict[str, Net]
    params: dict[str, Params]

    def bound(self):
        """Networks with their weights bound, as losses see them."""
        return bind(self.nets, self.params)


def run(config: ConfigDict, workdir: str | Path, *, dry_run: bool = False, progress: bool = True,
        known: dict[str, Path] | None = None) -> dict[str, Any]:  # fmt: skip
    """Trains what `config` describes in `workdir`, or goes on where it stopped; returns the content of report.json.

    The runs in `config.runs` come first, in `workdir/<name>`; one that is the same as another becomes a link to it. `known`
    has the folders of finished runs that may be linked to, by `identity` of their configs; what this run finishes joins them.
    Raises Refused on bad input and where another process runs in `workdir`, metrics.NonFinite where a loss stops being a
    number, Stopped after SIGTERM or Ctrl-C; in all cases the last good checkpoint stays.
    """
    workdir, known = Path(workdir), {} if known is None else known
    experiment = Experiment(config, workdir)
    _check(experiment)
    if dry_run:
        return _dry_run(experiment)
    own = identity(config)
    if own in known and not workdir.exists():
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process of this run was first
            workdir.symlink_to(os.path.relpath(known[own], workdir.parent))
    _check_folder(config, workdir)
    if (workdir / "report.json").exists():
        known.update(_finished(experiment) | known)
        return report.read(workdir)
    with alone(workdir):
        write_json(workdir / "config.json", config.to_dict())
        before = metrics.read(workdir / "metrics.jsonl")[-1:]
        started = time.time() - sum(record["seconds"] for record in before)  # of the processes that this one goes on from
        reports = {name: run(sub, workdir / name, progress=progress, known=known) for name, sub in experiment.runs.items()}
        with sharding.use(experiment.mesh, experiment.settings.rules), _signals() as stop:
            trained = _as_given(_train(experiment, stop, progress))
            result = report.write(trained, reports, seconds=time.time() - started)
    known[own] = workdir
    return result


def identity(config: ConfigDict) -> str:
    """The same for configs of the same values."""
    return config.to_json(sort_keys=True)


def _finished(experiment: Experiment) -> dict[str, Path]:
    """The folders of a finished run and of those inside it, by `identity`."""
    inside = [_finished(Experiment(sub, experiment.workdir / name)) for name, sub in experiment.runs.items()]
    done = (experiment.workdir / "report.json").exists()
    return {k: v for found in inside for k, v in found.items()} | ({identity(experiment.config): experiment.workdir} if done else {})


def evaluate(workdir: str | Path, config: ConfigDict | None = None) -> dict[str, Any]:
    """Scores a finished run again and rewrites its report. Raises Refused where it has not finished."""
    trained = load(workdir, config)
    before = report.read(workdir)
    reports = {name: report.read(Path(workdir) / name) for name in trained.experiment.runs}
    with sharding.use(trained.experiment.mesh, trained.experiment.settings.rules):
        return report.write(trained, reports, seconds=before["seconds"])


def load(workdir: str | Path, config: ConfigDict | None = None) -> Trained:
    """A finished run's networks and weights. Raises Refused where it has not finished."""
    workdir = Path(workdir)
    if config is None:
        if not (workdir / "config.json").exists():
            raise Refused(f"{workdir}: no config.json, hence no run of ours")
        config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    experiment = Experiment(config, workdir)
    stages = experiment.method.stages(experiment.settings.steps)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        return _as_given(_result(experiment, stages, len(stages)))


def _check(experiment: Experiment) -> None:
    """Builds everything that needs no array, of this run and of those inside it, so that bad input is refused early."""
    for name, sub in experiment.runs.items():
        _check(Experiment(sub, experiment.workdir / name))
    _ = experiment.mesh, experiment.method, experiment.nets, experiment.evaluation, experiment.data.spec()
    experiment.method.check(experiment.nets, experiment.data)
    for role in experiment.method.inits:
        experiment.roles[role].optimizer.make(1)


def _check_folder(config: ConfigDict, workdir: Path) -> None:
    """Raises Refused where another config has been run in the folder, or it is none."""
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise Refused(f"--workdir={workdir}: is a file")
    if path.exists():
        before, now = (_flat(json.loads(text)) for text in (path.read_text(), config.to_json()))
        free = ("log_every", "sample_every", "eval_every", "checkpoint_every", "keep", "tensorboard", "wandb", "mesh")
        changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k.split(".")[0] not in free]
        if changed:
            k = changed[0]
            raise Refused(f"{workdir} holds a run of another config: {k} is {before.get(k)!r} there, {now.get(k)!r} here"
                          f"{f' (and {len(changed) - 1} more)' if changed[1:] else ''}; give another --workdir")  # fmt: skip


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else name).items()}


@contextlib.contextmanager
def _signals():
    """Yields an Event that SIGTERM and Ctrl-C set; a second Ctrl-C interrupts at once."""
    stop, main = threading.Event(), threading.current_thread() is threading.main_thread()

    def handle(number, frame):
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        stop.reason = signal.Signals(number)

    caught = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)  # among several, JAX hears SIGTERM
    before = {s: signal.signal(s, handle) for s in caught} if main else {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(experiment: Experiment, stages: tuple[Stage, ...], done: int) -> Trained:
    """Networks and weights after `done` stages: warm starts, then each stage's surgery and result."""
    params, nets = experiment.warm_starts(), dict(experiment.nets)
    for i, stage in enumerate(stages[:done]):
        nets, params = _prepare(experiment, stage, nets, params)
        shapes = {role: experiment.abstract(nets[role], role) for role in stage.method.inits}
        params |= load_params(experiment.workdir / "stages" / str(i), shapes)
    return Trained(experiment, nets, params)


def _as_given(trained: Trained) -> Trained:
    """With the frozen roles as the run was given them: a later stage's teacher may be an earlier one's student."""
    experiment = trained.experiment
    if not any(stage.surgery for stage in experiment.method.stages(experiment.settings.steps)[1:]):
        return trained
    given = experiment.warm_starts()
    frozen = [role for role in experiment.method.frozen if role in given]  # the others are a surgery's own
    nets = {**trained.nets, **{role: experiment.nets[role] for role in frozen}}
    return dataclasses.replace(trained, nets=nets, params={**trained.params, **{role: given[role] for role in frozen}})


def _prepare(experiment: Experiment, stage: Stage, nets, params):
    """The stage's surgery, on the first training batch."""
    if stage.surgery is None:
        return nets, params
    batch = jax.tree.map(jnp.asarray, next(experiment.data.loader()))
    nets, params = stage.surgery(nets, params, batch)
    return nets, dict(params)


def _collect(trained: Trained, stage: Stage, index: int, stop: threading.Event, progress: bool) -> Dataset:
    """The stage's data: the experiment's, or what `stage.collect` makes and stores in data/<stage>, a file for each batch."""
    experiment, settings = trained.experiment, trained.experiment.settings
    if stage.collect is None:
        return experiment.data
    folder = experiment.workdir / "data" / str(index)
    folder.mkdir(parents=True, exist_ok=True)
    make = jax.jit(lambda params, batch, rng: stage.collect.make(bind(trained.nets, params), Ctx(batch, rng, jnp.int32(0), {})))
    put, key = sharding.put_batch(experiment.mesh, settings.rules), jax.random.key(settings.seed)
    with DevicePrefetch(experiment.data.loader((jax.process_index(), jax.process_count())), put) as batches:
        for i in metrics.bar(range(stage.collect.batches), f"{experiment.workdir.name} data", "batch", progress):
            batch, _ = next(batches)
            file = folder / f"batch{i:06d}_{jax.process_index()}.arrayrecord"
            if not file.exists():
                rows = sharding.local_rows(make(trained.params, batch, jax.random.fold_in(key, i)))
                arrayrecord.write(file, ({k: v[n] for k, v in rows.items()} for n in range(len(next(iter(rows.values()))))))
            if stop.is_set():
                raise Stopped(f"{stop.reason.name}: stored {i + 1} of {stage.collect.batches} batches in {folder}; run again to go on")
    return arrayrecord.stored(folder, batch_size=experiment.data.batch_size, seed=experiment.data.seed)


def _train(experiment: Experiment, stop: threading.Event, progress: bool) -> Trained:
    """All stages; a stage that has left its result in stages/ is not run again."""
    settings, workdir = experiment.settings, experiment.workdir
    stages = experiment.method.stages(settings.steps)
    finished = 0
    while (workdir / "stages" / str(finished)).exists():
        finished += 1
    trained = _result(experiment, stages, finished)
    if finished == len(stages):
        return trained
    checkpoints = Checkpoints(workdir / "checkpoints", settings.keep)
    try:
        for i in range(finished, len(stages)):
            trained.nets, trained.params = _prepare(experiment, stages[i], trained.nets, trained.params)
            data = _collect(trained, stages[i], i, stop, progress)
            offset = sum(s.steps for s in stages[:i])
            fit = _Fit(dataclasses.replace(trained), stages[i], i, offset, data, checkpoints, stop, progress)
            trained.params = {}  # the stage owns them now
            state = fit.run()
            result = {role: state.ema.get(role, state.params[role]) for role in stages[i].method.inits}
            save_params(workdir / "stages" / str(i), result)
            trained.params = {**fit.trained.params, **state.frozen, **result}
    finally:
        checkpoints.close()
    return trained


class _Fit:
    """One stage: state, data, programs; then steps until done or stopped."""

    def __init__(self, trained: Trained, stage: Stage, index: int, offset: int, data: Dataset, checkpoints, stop, progress):
        self.trained, self.stage, self.index, self.offset, self.data = trained, stage, index, offset, data
        self.experiment, self.settings = trained.experiment, trained.experiment.settings
        self.checkpoints, self.stop, self.progress = checkpoints, stop, progress
        self.controller, self.hints = stage.method.controller(), {}

    def run(self) -> State:
        """Steps until the stage is done, from its newest checkpoint. Raises Stopped where it was asked to stop."""
        settings, programs = self.settings, self._start()
        key = jax.random.fold_in(jax.random.key(settings.seed + 1), self.index)
        rng, step = self._everywhere(key), self.first
        try:
            while step < self.stage.steps:
                batch, self.position = next(self.batches)
                self.state, values = programs.step(self.state, batch, rng, programs.active_at(step))
                step += 1
                self.pending.add(self.offset + step, values)
                self.bar.update()
                stopping, last = self._stopping(step), step == self.stage.steps
                due = lambda every: bool(every) and step % every == 0
                saving = due(settings.checkpoint_every) or last or stopping
                if due(settings.log_every) or saving:
                    self._log(programs, step)
                if due(settings.sample_every) or due(settings.eval_every):
                    scores = report.look(self._view(), self.offset + step, score=due(settings.eval_every))
                    self.writer.write(self.offset + step, time.time() - self.started, scores)
                if saving:
                    self.checkpoints.save(self.offset + step, self.state, self._host())
                if stopping and not last:
                    self.checkpoints.wait()
                    raise Stopped(
                        f"{self.stop.reason.name}: saved step {self.offset + step} in {self.experiment.workdir}; run again to go on"
                    )
        finally:
            self.bar.close()
            self.batches.close()
            self.writer.close()
        self.checkpoints.wait()
        return self.state

    def _start(self) -> Programs:
        """The programs; sets state, data position and everything that the steps write to."""
        settings, stage, workdir = self.settings, self.stage, self.experiment.workdir
        programs = make_programs(self.experiment, self.trained.nets, stage, self.trained.params, self.data.spec())
        restored = self._restore(programs.abstract)
        if restored is None:
            key = jax.random.fold_in(jax.random.key(settings.seed), self.index)
            self.first, self.state, self.position = 0, programs.init(self._everywhere(key), self.trained.params), None
        else:
            self.first, self.state, self.position = restored
        mine = self.state.frozen.keys() | self.state.params.keys()  # their weights exist once: in the state
        held = {role: params for role, params in self.trained.params.items() if role not in mine}
        self.trained = dataclasses.replace(self.trained, params=held)
        self.writer = metrics.Writer(workdir, self.offset + self.first, tensorboard=settings.tensorboard, wandb=settings.wandb,
                                     config=self.experiment.config.to_dict())  # fmt: skip
        self.pending = metrics.Pending(stage.method.turns)
        self.bar = metrics.bar(range(stage.steps), self._title(), "step", self.progress, self.first)
        self.started = self.logged_at = time.time()
        self.logged = self.first
        self.put = sharding.put_batch(self.experiment.mesh, settings.rules)
        self.batches = self._batches()
        return programs

    def _everywhere(self, key):
        """A random key as an argument of a program that may span several processes."""
        whole = jax.sharding.NamedSharding(self.experiment.mesh, jax.sharding.PartitionSpec())
        return key if jax.process_count() == 1 else jax.jit(lambda: key, out_shardings=whole)()

    def _stopping(self, step: int) -> bool:
        """Whether to save and stop after this step; several processes agree on it."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self.offset + step):
            self.stop.reason = signal.SIGTERM
            self.stop.set()
        return self.stop.is_set()

    def _log(self, programs: Programs, step: int) -> None:
        """Writes the means since the last time, and lets the controller see them."""
        means, now = self._means(), time.time()
        means |= self._rates(programs, step - self.logged, now - self.logged_at)
        self.logged, self.logged_at = step, now
        self.writer.write(self.offset + step, now - self.started, means)
        self.bar.set_postfix_str(_brief(means), refresh=False)
        self._steer(means)

    def _means(self) -> dict[str, float]:
        """The means since the last time. Where a loss is no number from the first steps on, the message has what it may come from."""
        try:
            return self.pending.flush()
        except metrics.NonFinite as error:
            found = ""
            if not self.first and self.logged == self.first:
                with contextlib.suppress(OSError, ValueError, RuntimeError, MemoryError):  # a search that fails hides nothing
                    found = self._suspects(error.step)
            raise metrics.NonFinite(f"{error}{found}", error.step) from None

    def _suspects(self, step: int) -> str:
        """What the engine step's batch and the first weights have that is not finite; where all is, the settings that it may come from."""
        sound = lambda w: not jnp.issubdtype(w.dtype, jnp.floating) or bool(jnp.isfinite(w).all())
        loader = self.data.loader((jax.process_index(), jax.process_count()))
        batch = next(itertools.islice(loader, step - self.offset - 1, None))
        found = [f"batch[{name!r}] of that step has values that are not finite" for name, v in batch.items() if not sound(v)]
        state, self.state = self.state, None  # makes room
        weights, moving = dict(state.frozen), state.params.keys()
        del state
        given = {} if self.index else {role: w for role, w in self.experiment.warm_starts().items() if role in moving}
        for role, params in (weights | given).items():
            found += [f"roles.{role} starts from weights that are not finite"] * (not all(map(sound, jax.tree.leaves(params))))
        if found:
            return f"; suspects: {', '.join(found)}"
        rates = [f"roles.{role}.optimizer.lr={self.experiment.roles[role].optimizer.lr:g}" for role in moving]
        return f"; its batch and the first weights are finite: suspects are {', '.join(rates)} and arithmetic in half precision"

    def _title(self) -> str:
        name = self.experiment.workdir.name
        stages = self.experiment.method.stages(self.settings.steps)
        return name if len(stages) == 1 else f"{name} [{self.index + 1}/{len(stages)}]"

    def _restore(self, abstract: State):
        """(steps done in this stage, state, data position); None where this stage has no checkpoint."""
        host = self.checkpoints.host()
        if host is None or host[1]["stage"] != self.index:
            return None
        found = self.checkpoints.restore(abstract.replace(frozen={}))
        if found is None or found[2]["stage"] != self.index:
            return None
        step, state, host = found
        if self.controller:
            self.controller.restore(host["controller"])
            self.hints = host["hints"]
            self.data = self.data.steer(self.hints)
        own = lambda given: frozen_weights(self.stage.method, self.trained.nets, given)
        frozen = jax.jit(own, out_shardings=jax.tree.map(lambda s: s.sharding, abstract.frozen))(self.trained.params)
        return step - self.offset, state.replace(frozen=frozen), host["data"]

    def _host(self) -> dict[str, Any]:
        controller = {"controller": self.controller.state(), "hints": self.hints} if self.controller else {}
        return {"stage": self.index, "data": self.position, **controller}

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
        rates = {"perf/steps_per_second": work, "perf/samples_per_second": work * self.data.batch_size}
        rates["perf/model_flops_per_second"] = work * programs.flops
        if chip := chips.of(self.experiment.mesh.devices.flat[0].device_kind):
            rates["perf/mfu"] = work * programs.flops / (chip.flops * self.experiment.mesh.size)
        return rates

    def _view(self) -> Trained:
        averaged = {role: self.state.ema.get(role, p) for role, p in self.state.params.items()}
        return dataclasses.replace(self.trained, params={**self.trained.params, **self.state.frozen, **averaged})


def _brief(means: Mapping[str, float]) -> str:
    return " ".join(f"{k.removesuffix('/loss')}={v:.3g}" for k, v in means.items() if k.endswith("/loss"))


@dataclasses.dataclass
class Programs:
    """A stage's compiled parts, still lazy: abstract state with shardings, init, step, and its mean model flops."""

    abstract: State
    init: Any
    step: Any
    active_at: Any
    flops: float  # model flops of a mean step
    patterns: dict[tuple[int, ...], dict[str, float]]  # active turns -> model flops by role
    batch: dict[str, jax.ShapeDtypeStruct]  # global shapes with their shardings


def make_programs(
    experiment: Experiment, nets: Mapping[str, Net], stage: Stage, start: Mapping[str, Any], batch: Mapping[str, Any]
) -> Programs:
    """Shapes, then shardings, then jitted functions; `start` and `batch` may hold arrays or ShapeDtypeStructs."""
    method, settings, roles = stage.method, experiment.settings, experiment.roles
    turns = method.turns
    taken = [tuple(i for i, t in enumerate(turns) if t.when(s)) for s in range(stage.steps)]
    updates = {role: sum(sum(role in turns[i].moves for i in active) for active in taken) for role in method.inits}
    make = lambda role, net: roles[role].optimizer.make(updates[role], bank=isinstance(net, Bank), axes=net.axes)
    txs = {role: make(role, nets[role]) for role in method.inits}
    key = jax.eval_shape(lambda: jax.random.key(0))
    inits = {role: experiment.inits.get(role, source) for role, source in method.inits.items()}
    build_state = lambda key, start: init_state(method, nets, txs, key, start, inits)
    abstract = jax.eval_shape(build_state, key, start)
    rules, places = ({r: getattr(roles[r], part) for r in roles} for part in ("rules", "place"))
    where = sharding.state_shardings(experiment.mesh, rules, nets, txs, abstract, places)
    abstract = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), abstract, where)
    step, active_at = make_train_step(method, nets, txs, emas={r: roles[r].ema for r in method.ema},
                                      accumulate=settings.accumulate, shardings=where)  # fmt: skip
    rows = sharding.batch_sharding(experiment.mesh, settings.rules)
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows), dict(batch))
    # traced once: the first call of the step finds the same trace
    patterns = {active: flops.count(step.trace(abstract, placed, key, active).jaxpr.jaxpr) for active in dict.fromkeys(taken)}
    mean = sum(sum(patterns[active].values()) for active in taken) / max(len(taken), 1)
    return Programs(abstract, jax.jit(build_state, out_shardings=where), step, active_at, mean, patterns, placed)


def abstract_programs(experiment: Experiment) -> tuple[Programs, dict[str, Net]]:
    """The first stage's programs and networks from shapes alone: no weights, no data but one sample. Needs `sharding.use`."""
    experiment.method.check(experiment.nets, experiment.data)
    stage, roles = experiment.method.stages(experiment.settings.steps)[0], experiment.roles
    warm = [r for r in roles if r in experiment.method.frozen or (roles[r].init and r not in experiment.inits)]
    start = {r: experiment.abstract(experiment.nets[r], r) for r in warm}
    batch, nets = experiment.data.spec(), {}

    def operate(start):
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), dict(batch))
        fresh, params = (experiment.nets, start) if stage.surgery is None else stage.surgery(experiment.nets, start, zeros)
        nets.update(fresh)
        if stage.collect is None:
            return params, zeros
        return params, stage.collect.make(bind(nets, params), Ctx(zeros, jax.random.key(0), jnp.int32(0), {}))

    start, batch = jax.eval_shape(operate, start)
    return make_programs(experiment, nets, stage, start, batch), nets


def _dry_run(experiment: Experiment) -> dict[str, Any]:
    """Builds everything, compiles each turn pattern of the first stage, prints bytes and flops per role, and stops."""
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = abstract_programs(experiment)
        key = jax.eval_shape(lambda: jax.random.key(0))
        size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        state, table = programs.abstract, {}
        for role, net in nets.items():
            held = [getattr(state, part).get(role, {}) for part in ("params", "opt", "ema", "frozen")]
            table[role] = {"parameters": net.size, "bytes": size(held)}
        for active, by_role in programs.patterns.items():
            name = "+".join(str(i) for i in active)
            for role in table:
                table[role][f"flops, turns {name}"] = by_role.get(role, 0.0)
            compiled = programs.step.lower(state, programs.batch, key, active).compile()
            memory = compiled.memory_analysis()
            print(f"turns {name}: compiled; {memory.temp_size_in_bytes / 2**20:.1f} MiB temporaries, "
                  f"{memory.argument_size_in_bytes / 2**20:.1f} MiB arguments on each device")  # fmt: skip
        print(report.text_table([{"role": role, **row} for role, row in table.items()]))
        return {"roles": table}
