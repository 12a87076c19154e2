"""The programs of a stage: its abstract state with shardings, and jitted functions.

No weight and no data is needed. Nothing is compiled before a function is called.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill.core import sharding
from jaxdistill.core.bank import Bank
from jaxdistill.core.build import located
from jaxdistill.core.net import Net
from jaxdistill.core.parts import split
from jaxdistill.core.step import (
    active_turns,
    bind,
    init_state,
    make_train_step,
    results,
)
from jaxdistill.core.types import Ctx, Params, Refused, Stage, State
from jaxdistill.run import flops
from jaxdistill.run.experiment import Experiment


@dataclasses.dataclass
class Programs:
    """The programs of a stage, not compiled yet."""

    abstract: State  # ShapeDtypeStructs with shardings
    init: Callable  # (key, start) -> the first State
    step: Callable  # (state, batch, rng, active) -> (state, metrics)
    # step -> indices of the turns that it takes
    active_at: Callable[[int], tuple[int, ...]]
    flops: float  # model flops of a mean step
    # active turns -> model flops by role
    patterns: dict[tuple[int, ...], dict[str, float]]
    batch: dict[str, jax.ShapeDtypeStruct]  # global shapes with shardings


def make_programs(
    experiment: Experiment,
    nets: Mapping[str, Net],
    stage: Stage,
    start: Mapping[str, Any],
    batch: Mapping[str, Any],
) -> Programs:
    """The programs of a stage. Needs `sharding.use`.

    Args:
      start: role -> first weights, as for `init_state`; arrays or ShapeDtypeStructs.
      batch: arrays or ShapeDtypeStructs.

    Raises:
      Refused: an optimiser has a factor for weights that its network lacks.
    """
    method = stage.method
    settings = experiment.settings
    roles = experiment.roles
    turns = method.turns
    taken = [active_turns(turns, step) for step in range(stage.steps)]
    updates = {
        role: sum(turns[i].moves.count(role) for active in taken for i in active)
        for role in method.inits
    }
    txs = optimizers(experiment, nets, stage, updates)
    inits = experiment.inits_of(method)

    def build_state(key, start):
        return init_state(method, nets, txs, key, start, inits)

    key = jax.eval_shape(lambda: jax.random.key(0))
    abstract = jax.eval_shape(build_state, key, start)
    rules = {name: role.rules for name, role in roles.items()}
    places = {name: role.place for name, role in roles.items()}
    shardings = sharding.state_shardings(
        experiment.mesh, rules, nets, txs, abstract, places
    )
    abstract = jax.tree.map(_with_sharding, abstract, shardings)
    step, active_at = make_train_step(
        method,
        nets,
        txs,
        emas={role: roles[role].ema for role in method.ema},
        accumulate=settings.accumulate,
        shardings=shardings,
    )
    of_batch = sharding.batch_sharding(experiment.mesh, settings.rules)
    placed = jax.tree.map(lambda s: _with_sharding(s, of_batch), dict(batch))
    patterns = {}
    for active in dict.fromkeys(taken):
        # the first call finds this trace
        traced = step.trace(abstract, placed, key, active)
        patterns[active] = flops.count(traced.jaxpr.jaxpr)
    total = sum(sum(patterns[active].values()) for active in taken)
    return Programs(
        abstract=abstract,
        init=jax.jit(build_state, out_shardings=shardings),
        step=step,
        active_at=active_at,
        flops=total / max(len(taken), 1),
        patterns=patterns,
        batch=placed,
    )


def optimizers(
    experiment: Experiment,
    nets: Mapping[str, Net],
    stage: Stage,
    updates: Mapping[str, int],
) -> dict[str, optax.GradientTransformation]:
    """Trained role -> its optimiser, for a number of updates by role.

    Raises:
      Refused: an optimiser has a factor for weights that its network lacks.
    """
    txs = {}
    for role, count in updates.items():
        net = nets[role]
        optimizer = experiment.roles[role].optimizer
        bank = isinstance(net, Bank)
        axes = split(net, net.axes, stage.method.trains.get(role)).moving
        try:
            txs[role] = optimizer.make(count, bank=bank, axes=axes)
        except Refused as error:
            where = f"{experiment.where}.roles.{role}.optimizer"
            raise located(where, error) from error
    return txs


def _with_sharding(shape: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def abstract_stages(
    experiment: Experiment,
) -> Iterator[tuple[Programs, dict[str, Net]]]:
    """Each stage's programs and networks from shapes alone: no weights, no data but one sample.

    Fields of the method that are measured before a stage have the values that stand in for them.

    Needs `sharding.use`. Raises Refused where method, networks and data do not fit each other.
    """
    method = experiment.method
    roles = experiment.roles
    nets = dict(experiment.nets)
    method.check(nets, experiment.data)
    warm = [
        r
        for r in roles
        if r in method.frozen or (roles[r].init and r not in experiment.inits)
    ]
    params = {r: experiment.abstract(nets[r], r) for r in warm}
    steps = experiment.settings.steps
    for i in range(len(method.stages(steps))):
        stage = method.stages(steps)[i]
        if stage.calibrate and (stand_ins := stage.calibrate.missing(method)):
            method = dataclasses.replace(method, **stand_ins)
            stage = method.stages(steps)[i]
        nets, params, batch = abstract_start(experiment, stage, nets, params)
        programs = make_programs(experiment, nets, stage, params, batch)
        yield programs, nets
        state = programs.abstract
        params = {**params, **state.frozen, **results(state, stage.last)}


def abstract_start(
    experiment: Experiment,
    stage: Stage,
    nets: dict[str, Net],
    params: dict[str, Params],
):
    """Networks, shapes of weights and of a batch at the beginning of a stage.

    Surgery and collection of data are traced.
    """
    after = {}
    spec = experiment.data.spec()

    def operate(params):
        batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), dict(spec))
        found, weights = nets, params
        if stage.surgery is not None:
            found, weights = stage.surgery(nets, params, batch)
        # networks are no arrays, so they leave the trace this way
        after.update(found)
        if stage.collect is not None:
            ctx = Ctx(batch, jax.random.key(0), jnp.int32(0), {})
            batch = stage.collect.make(bind(found, weights), ctx)
        if stage.pool is not None:
            of_pool = stage.pool.spec(experiment.data)
            batch = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), dict(of_pool)
            )
        return dict(weights), batch

    params, batch = jax.eval_shape(operate, params)
    return after, params, batch


def abstract_programs(
    experiment: Experiment, stage: int = 0
) -> tuple[Programs, dict[str, Net]]:
    """A stage's programs and networks, as `abstract_stages` makes them."""
    return next(itertools.islice(abstract_stages(experiment), stage, None))
