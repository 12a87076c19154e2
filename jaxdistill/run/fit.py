"""One stage of a run: steps from its newest checkpoint until it is done or asked to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxdistill.core.step import frozen_weights, resting_weights, results
from jaxdistill.core.types import Array, Means, Refused, Stage, State
from jaxdistill.data.base import Dataset
from jaxdistill.run import chips, metrics, records, report
from jaxdistill.run.checkpoint import Checkpoints
from jaxdistill.run.experiment import Experiment, Trained
from jaxdistill.run.feed import Feed
from jaxdistill.run.programs import Programs, make_programs
from jaxdistill.run.stop import Stopped
from jaxdistill.run.suspects import suspects


class Fit:
    """A stage in training.

    Attributes:
      trained: networks and weights; weights of roles in `state` are there alone.
      state: the training state.
      step: steps of this stage that are done.
      offset: steps of the stages before.
    """

    def __init__(
        self,
        trained: Trained,
        stage: Stage,
        index: int,
        offset: int,
        data: Dataset,
        checkpoints: Checkpoints,
        stop: threading.Event,
        progress: bool,
    ):
        self.trained = trained
        self.stage = stage
        self.index = index
        self.offset = offset
        self.experiment = trained.experiment
        self.settings = trained.experiment.settings
        self.stop = stop
        self.feed = Feed(self.experiment, data, stage.method.controller())
        self.saved = Saved(self.experiment, index, checkpoints, self.feed)
        self.programs = self._programs(data)
        self.step, self.state = self._begin()
        in_state = self.state.frozen.keys() | self.state.params.keys()
        others = {
            r: params
            for r, params in self.trained.params.items()
            if r not in in_state
        }
        self.trained = dataclasses.replace(self.trained, params=others)
        self.log = Log(
            self.experiment,
            stage,
            self.programs,
            index,
            offset,
            self.step,
            progress,
        )

    def run(self) -> State:
        """The state at the end of the stage. Raises Stopped where the run was asked to stop."""
        seed = jax.random.key(self.settings.seed + 1)
        rng = _replicated(self.experiment, jax.random.fold_in(seed, self.index))
        self.feed.open()
        try:
            while self.step < self.stage.steps:
                self._take_step(rng)
                self._after_step()
        finally:
            self.log.close()
            self.feed.close()
        self.saved.wait()
        return self.state

    def _take_step(self, rng: Array) -> None:
        active = self.programs.active_at(self.step)
        self.state, values = self.programs.step(
            self.state, self.feed.next(), rng, active
        )
        self.step += 1
        self.log.add(self.offset + self.step, values)

    def _after_step(self) -> None:
        """Logs, evaluates, saves and stops where this step is to."""
        settings = self.settings
        stopping = self._asked_to_stop()
        last = self.step == self.stage.steps
        saving = self._due(settings.checkpoint_every) or last or stopping
        if self._due(settings.log_every) or saving:
            self.feed.steer(self._means())
        if self._due(settings.sample_every) or self._due(settings.eval_every):
            self._look(score=self._due(settings.eval_every))
        if saving:
            self.saved.save(self.offset + self.step, self.state)
        if stopping and not last:
            self.saved.wait()
            done = (
                f"saved step {self.offset + self.step} in {self.experiment.workdir}"
            )
            raise Stopped(self.stop.reason, done)

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _asked_to_stop(self) -> bool:
        """Whether to save and stop after this step. Several processes agree on it."""
        several = jax.process_count() > 1
        if several and multihost_utils.reached_preemption_sync_point(
            self.offset + self.step
        ):
            self.stop.reason = signal.SIGTERM
            self.stop.set()
        return self.stop.is_set()

    def _programs(self, data: Dataset) -> Programs:
        trained = self.trained
        return make_programs(
            self.experiment, trained.nets, self.stage, trained.params, data.spec()
        )

    def _begin(self) -> tuple[int, State]:
        """(steps done, state): from the newest checkpoint of this stage, or new."""
        found = self.saved.restore(self.stage, self.trained, self.programs.abstract)
        if found is not None:
            step, state = found
            return step - self.offset, state
        key = first_key(self.experiment, self.index)
        return 0, self.programs.init(key, self.trained.params)

    def _means(self) -> dict[str, float]:
        """The means since the last time, which are logged.

        Raises metrics.NonFinite. Where the first steps are not finite, its message says what may
        be the cause.
        """
        try:
            return self.log.write(self.offset + self.step)
        except metrics.NonFinite as error:
            found = ""
            if self.log.is_first:
                found = self._suspects(error.step)
            raise metrics.NonFinite(f"{error}{found}", error.step) from None

    def _suspects(self, step: int) -> str:
        frozen = self.state.frozen
        trained = tuple(self.state.params)
        self.state = None  # frees the memory that the search needs
        step -= self.offset
        with contextlib.suppress(OSError, ValueError, RuntimeError, MemoryError):
            data = self.feed.data
            return suspects(
                self.experiment, data, self.index, step, frozen, trained
            )
        return ""  # a search that fails must not hide the error

    def _look(self, score: bool) -> None:
        """Draws samples, and scores them where `score` says so."""
        averaged = results(self.state)
        params = {**self.trained.params, **self.state.frozen, **averaged}
        view = dataclasses.replace(self.trained, params=params)
        step = self.offset + self.step
        self.log.write_scores(step, report.look(view, step, score=score))


class Saved:
    """The checkpoints of one stage."""

    def __init__(
        self,
        experiment: Experiment,
        index: int,
        checkpoints: Checkpoints,
        feed: Feed,
    ):
        self._experiment = experiment
        self._index = index
        self._checkpoints = checkpoints
        self._feed = feed

    def save(self, step: int, state: State) -> None:
        """Saves the state at an engine step, with the position in the data and the config."""
        config = json.loads(self._experiment.config.to_json())
        host = {"stage": self._index, "config": config, **self._feed.state()}
        self._checkpoints.save(step, state, host)

    def wait(self) -> None:
        """Returns when everything is written."""
        self._checkpoints.wait()

    def restore(
        self, stage: Stage, trained: Trained, abstract: State
    ) -> tuple[int, State] | None:
        """(engine step, state) of the newest checkpoint, and the feed at its position.

        Returns None where this stage has no checkpoint. Raises Refused where the newest one is of
        another config, or of a later stage.
        """
        newest = self._checkpoints.host()
        if newest is None:
            return None
        if newest[1].get("stage") == self._index:
            self._checkpoints.check_architecture(*newest, abstract)
        if not self._is_ours(*newest):
            return None
        found = self._checkpoints.restore(abstract.replace(frozen={}, rest={}))
        if found is None or not self._is_ours(found[0], found[2]):
            return None
        step, state, host = found
        self._feed.restore(host)

        def unsaved(params, key):
            method = stage.method
            nets = trained.nets
            rest = {}
            if abstract.rest:
                inits = self._experiment.inits_of(method)
                rest = resting_weights(method, nets, key, params, inits)
            return frozen_weights(method, nets, params), rest

        where = (abstract.frozen, abstract.rest)
        shardings = jax.tree.map(lambda s: s.sharding, where)
        make = jax.jit(unsaved, out_shardings=shardings)
        frozen, rest = make(
            trained.params, first_key(self._experiment, self._index)
        )
        return step, state.replace(frozen=frozen, rest=rest)

    def _is_ours(self, step: int, host: Mapping[str, Any]) -> bool:
        """Whether a checkpoint is of this stage.

        Raises Refused where it is of another run, or of a later stage.
        """
        where = self._checkpoints.folder / f"step_{step}"
        workdir = self._experiment.workdir
        wanted = {"stage": int, "config": dict} | self._feed.keys()
        records.check_keys(host, wanted, str(where))
        here = json.loads(self._experiment.config.to_json())
        if changed := records.difference(
            host["config"], here, (*records.FREE, "steps")
        ):
            raise Refused(
                f"{where} is a checkpoint of another config: {changed};"
                " move it away, or give another --workdir"
            )
        if host["stage"] > self._index:
            missing = workdir / "stages" / str(self._index)
            raise Refused(
                f"{where} is of stage {host['stage']}, but {missing} is missing"
            )
        return host["stage"] == self._index


class Log:
    """Metrics and progress bar of one stage."""

    def __init__(
        self,
        experiment: Experiment,
        stage: Stage,
        programs: Programs,
        index: int,
        offset: int,
        first: int,
        progress: bool,
    ):
        settings = experiment.settings
        self._experiment = experiment
        self._programs = programs
        self._writer = metrics.Writer(
            experiment.workdir,
            offset + first,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            config=experiment.config.to_dict(),
        )
        self._pending = metrics.Pending(stage.method.turns)
        title = _title(experiment, index)
        self._bar = metrics.bar(range(stage.steps), title, "step", progress, first)
        self._started = self._written_at = time.time()
        self._written = offset + first
        self.is_first = first == 0  # nothing of the stage has been written yet

    def add(self, step: int, values: Means) -> None:
        """Takes the metrics of an engine step; they may still be computed."""
        self._pending.add(step, values)
        self._bar.update()

    def write(self, step: int) -> dict[str, float]:
        """Writes the means since the last time and returns them. Raises metrics.NonFinite."""
        means = self._pending.flush()
        now = time.time()
        means |= self._rates(step - self._written, now - self._written_at)
        self._written = step
        self._written_at = now
        self.is_first = False
        self.write_scores(step, means, now)
        self._bar.set_postfix_str(_losses(means), refresh=False)
        return means

    def write_scores(
        self, step: int, values: Mapping[str, float], now: float = 0.0
    ) -> None:
        """Writes metrics of an engine step, at the time `now` (by default the present)."""
        self._writer.write(step, (now or time.time()) - self._started, values)

    def close(self) -> None:
        self._bar.close()
        self._writer.close()

    def _rates(self, steps: int, seconds: float) -> dict[str, float]:
        mesh = self._experiment.mesh
        a_second = steps / max(seconds, 1e-9)
        flops = a_second * self._programs.flops
        rates = {
            "perf/steps_per_second": a_second,
            "perf/samples_per_second": a_second * self._experiment.data.batch_size,
            "perf/model_flops_per_second": flops,
        }
        if chip := chips.of(mesh.devices.flat[0].device_kind):
            rates["perf/mfu"] = flops / (chip.flops * mesh.size)
        return rates


def first_key(experiment: Experiment, index: int) -> Array:
    """The key of a stage's first weights."""
    key = jax.random.fold_in(jax.random.key(experiment.settings.seed), index)
    return _replicated(experiment, key)


def _replicated(experiment: Experiment, key: Array) -> Array:
    """A random key as an argument of programs that may span several processes."""
    if jax.process_count() == 1:
        return key
    everywhere = jax.sharding.NamedSharding(
        experiment.mesh, jax.sharding.PartitionSpec()
    )
    return jax.jit(lambda: key, out_shardings=everywhere)()


def _title(experiment: Experiment, index: int) -> str:
    name = experiment.workdir.name
    count = len(experiment.method.stages(experiment.settings.steps))
    return name if count == 1 else f"{name} [{index + 1}/{count}]"


def _losses(means: Mapping[str, float]) -> str:
    """The losses in short, for the progress bar."""
    losses = {
        name: value for name, value in means.items() if name.endswith("/loss")
    }
    return " ".join(
        f"{name.removesuffix('/loss')}={value:.3g}"
        for name, value in losses.items()
    )
