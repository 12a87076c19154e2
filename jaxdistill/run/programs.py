"""A stage's compiled parts, still lazy: from shapes to shardings to jitted functions. No weight and
no data is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.core import sharding
from jaxdistill.core.bank import Bank
from jaxdistill.core.net import Net
from jaxdistill.core.step import bind, init_state, make_train_step
from jaxdistill.core.types import Ctx, Params, Stage, State
from jaxdistill.run import flops
from jaxdistill.run.experiment import Experiment


@dataclasses.dataclass
class Programs:
    """A stage's compiled parts, still lazy: abstract state with shardings, init, step, and its mean
    model flops.
    """

    abstract: State
    init: Any
    step: Any
    active_at: Any
    flops: float  # model flops of a mean step
    patterns: dict[tuple[int, ...], dict[str, float]]  # active turns -> model flops by role
    batch: dict[str, jax.ShapeDtypeStruct]  # global shapes with their shardings


def make_programs(
    experiment: Experiment,
    nets: Mapping[str, Net],
    stage: Stage,
    start: Mapping[str, Any],
    batch: Mapping[str, Any],
) -> Programs:
    """Shapes, then shardings, then jitted functions; `start` and `batch` may hold arrays or
    ShapeDtypeStructs.
    """
    method = stage.method
    settings = experiment.settings
    roles = experiment.roles
    turns = method.turns
    taken = [tuple(i for i, t in enumerate(turns) if t.when(s)) for s in range(stage.steps)]
    updates = {
        role: sum(sum(role in turns[i].moves for i in active) for active in taken)
        for role in method.inits
    }
    make = lambda role, net: roles[role].optimizer.make(
        updates[role], bank=isinstance(net, Bank), axes=net.axes
    )
    txs = {role: make(role, nets[role]) for role in method.inits}
    key = jax.eval_shape(lambda: jax.random.key(0))
    inits = {role: experiment.inits.get(role, source) for role, source in method.inits.items()}
    build_state = lambda key, start: init_state(method, nets, txs, key, start, inits)
    abstract = jax.eval_shape(build_state, key, start)
    rules, places = ({r: getattr(roles[r], part) for r in roles} for part in ("rules", "place"))
    where = sharding.state_shardings(experiment.mesh, rules, nets, txs, abstract, places)
    abstract = jax.tree.map(
        lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), abstract, where
    )
    step, active_at = make_train_step(
        method,
        nets,
        txs,
        emas={r: roles[r].ema for r in method.ema},
        accumulate=settings.accumulate,
        shardings=where,
    )
    rows = sharding.batch_sharding(experiment.mesh, settings.rules)
    placed = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows), dict(batch)
    )
    # traced once: the first call of the step finds the same trace
    patterns = {
        active: flops.count(step.trace(abstract, placed, key, active).jaxpr.jaxpr)
        for active in dict.fromkeys(taken)
    }
    mean = sum(sum(patterns[active].values()) for active in taken) / max(len(taken), 1)
    return Programs(
        abstract, jax.jit(build_state, out_shardings=where), step, active_at, mean, patterns, placed
    )


def abstract_stages(experiment: Experiment) -> Iterator[tuple[Programs, dict[str, Net]]]:
    """Each stage's programs and networks from shapes alone: no weights, no data but one sample.

    Needs `sharding.use`. Raises Refused where method, networks and data do not fit each other.
    """
    method = experiment.method
    roles = experiment.roles
    nets = dict(experiment.nets)
    method.check(nets, experiment.data)
    warm = [r for r in roles if r in method.frozen or (roles[r].init and r not in experiment.inits)]
    params = {r: experiment.abstract(nets[r], r) for r in warm}
    for stage in method.stages(experiment.settings.steps):
        nets, params, batch = _abstract_start(experiment, stage, nets, params)
        programs = make_programs(experiment, nets, stage, params, batch)
        yield programs, nets
        state = programs.abstract
        result = {role: state.ema.get(role, state.params[role]) for role in stage.method.inits}
        params = {**params, **state.frozen, **result}


def _abstract_start(
    experiment: Experiment, stage: Stage, nets: dict[str, Net], params: dict[str, Params]
):
    """(networks, weights, batch) that a stage begins with, as shapes: after its surgery, of its
    collected data.
    """
    fresh = {}
    spec = experiment.data.spec()

    def operate(params):
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), dict(spec))
        found, weights = (
            (nets, params) if stage.surgery is None else stage.surgery(nets, params, zeros)
        )
        fresh.update(found)
        if stage.collect is None:
            return dict(weights), zeros
        ctx = Ctx(zeros, jax.random.key(0), jnp.int32(0), {})
        return dict(weights), stage.collect.make(bind(found, weights), ctx)

    params, batch = jax.eval_shape(operate, params)
    return fresh, params, batch


def abstract_programs(experiment: Experiment) -> tuple[Programs, dict[str, Net]]:
    """The first stage's programs and networks, as `abstract_stages` makes them."""
    return next(abstract_stages(experiment))
