"""Stages of the toy experiments with random weights in place of those that they would load."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdistill.core import build, sharding
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.step import bind
from jaxdistill.core.types import Batch, Ctx, Method, Params, Stage
from jaxdistill.run.experiment import Experiment
from jaxdistill.run.programs import Programs, make_programs

ROOT = Path(__file__).parents[1]
TOYS = sorted(p.stem for p in (ROOT / "configs/toy").glob("[!_]*.py"))
ONE = MeshShape(data=1, fsdp=1, tensor=1)
EIGHT = MeshShape(data=2, fsdp=2, tensor=2)


def toy(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.toy.{name}").get_config()


@functools.cache
def staged() -> list[str]:
    """Toys of several stages."""
    found = []
    for name in TOYS:
        config = toy(name)
        if build.resolve(config.method.name).stages is not Method.stages:
            method = Experiment(config, Path("unused")).method
            if len(method.stages(config.steps)) > 1:
                found.append(name)
    return found


def experiment_on(config: ConfigDict, shape: MeshShape) -> Experiment:
    config.mesh = build.plain(shape)
    return Experiment(config, Path("unused"))


@dataclasses.dataclass
class StageRun:
    """A stage, ready to be run: after its surgery, on one batch of its data."""

    experiment: Experiment
    number: int
    stage: Stage
    nets: dict[str, Any]
    # frozen roles, warm starts and the results of earlier stages
    start: dict[str, Params]
    batch: Batch  # numpy

    @property
    def method(self) -> Method:
        return self.stage.method

    @functools.cached_property
    def programs(self) -> Programs:
        spec = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in self.batch.items()
        }
        with self.context():
            return make_programs(
                self.experiment, self.nets, self.stage, self.start, spec
            )

    @functools.cached_property
    def placed(self) -> dict[str, jax.Array]:
        """The batch on the mesh."""
        put = sharding.put_batch(
            self.experiment.mesh, self.experiment.settings.rules
        )
        return put(self.batch)

    @property
    def structure(self) -> str:
        """The traced programs without their numbers, equal for stages that differ only in
        constants.
        """
        key = jax.eval_shape(lambda: jax.random.key(0))
        traced = []
        with self.context():
            for active in self.programs.patterns:
                inputs = (self.programs.abstract, self.programs.batch, key, active)
                traced.append(str(self.programs.step.trace(*inputs).jaxpr))
        return re.sub(r"-?\d+\.\d+(e[-+]?\d+)?|0x[0-9a-f]+", "", "\n".join(traced))

    def context(self):
        return sharding.use(self.experiment.mesh, self.experiment.settings.rules)

    def init(self):
        """A fresh state on the mesh."""
        with self.context():
            return self.programs.init(jax.random.key(0), self.start)

    def step(self, state, active: tuple[int, ...]):
        """(state, metrics) after one step; `state` is donated."""
        with self.context():
            return self.programs.step(state, self.placed, jax.random.key(1), active)

    def steps(self) -> list[tuple]:
        """(active turns, state before, state after, metrics) of one step for each pattern of
        turns, as numpy. `last` keeps the last state.
        """
        taken = []
        state = self.init()
        for active in self.programs.patterns:
            before = jax.device_get(state)
            state, metrics = self.step(state, active)
            taken.append(
                (active, before, jax.device_get(state), jax.device_get(metrics))
            )
        self.last = state
        return taken

    def on(self, shape: MeshShape) -> StageRun:
        """The same stage on another mesh."""
        config = self.experiment.config.copy_and_resolve_references()
        start = jax.device_get(self.start)
        return dataclasses.replace(
            self, experiment=experiment_on(config, shape), start=start
        )


def first_stage(
    name: str, shape: MeshShape = ONE, config: ConfigDict | None = None
) -> StageRun:
    return next(every_stage(name, shape, config))


def every_stage(
    name: str, shape: MeshShape = ONE, config: ConfigDict | None = None
) -> Iterator[StageRun]:
    """The stages in order. None is trained: each starts from the fresh state of the one before."""
    experiment = experiment_on(config or toy(name), shape)
    nets = dict(experiment.nets)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        start = random_start(experiment)
        for number, stage in enumerate(
            experiment.method.stages(experiment.settings.steps)
        ):
            batch = experiment.data.batch(0, slice(None))
            if stage.surgery is not None:
                nets, start = stage.surgery(
                    nets, start, jax.tree.map(jnp.asarray, dict(batch))
                )
            if stage.collect is not None:
                batch = collected(stage, nets, start, batch)
            run = StageRun(
                experiment, number, stage, dict(nets), dict(start), batch
            )
            yield run
            state = run.init()
            result = {
                role: state.ema.get(role, state.params[role])
                for role in stage.method.inits
            }
            start = {**start, **state.frozen, **result}


def random_start(experiment: Experiment) -> dict[str, Params]:
    """Random weights of the frozen roles, and of adapters."""

    def draw():
        start = {}
        for i, (role, net) in enumerate(experiment.nets.items()):
            key = jax.random.key(10 + i)
            if role in experiment.method.frozen:
                start[role] = net.init(key)
            # away from 0, where a loss that compares an adapted network with its base has no
            # gradient
            elif net.adapts:
                start[role] = jax.tree.map(lambda w: w + 0.01, net.init(key))
        return start

    return jax.jit(draw)()


def collected(
    stage: Stage, nets: dict, params: dict[str, Params], batch: Batch
) -> Batch:
    """A batch of the data that the stage makes for itself."""

    def make(params, batch):
        ctx = Ctx(batch, jax.random.key(0), jnp.int32(0), {})
        return stage.collect.make(bind(nets, params), ctx)

    made = jax.jit(make)(params, dict(batch))
    return {key: np.asarray(value) for key, value in made.items()}
