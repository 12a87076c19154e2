"""The one train step. Every method runs through this file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdistill.core.gradients import (
    any_taken,
    chosen,
    finite_updates,
    taken_updates,
    without_skipped,
)
from jaxdistill.core.net import Net, materialise
from jaxdistill.core.optim import Ema
from jaxdistill.core.parts import joined, like, split
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import (
    Array,
    Batch,
    Ctx,
    Means,
    Method,
    Nets,
    Params,
    Refused,
    State,
    Turn,
)


def init_state(
    method: Method,
    nets: Mapping[str, Net],
    txs: Mapping[str, optax.GradientTransformation],
    key: Array,
    start: Mapping[str, Params],
    inits: Mapping[str, str | None] | None = None,
) -> State:
    """The state before the first step. Pure, to be jitted with the state's shardings.

    Every tree of the state has buffers of its own, because the train step donates them.

    Args:
      start: weights of the frozen roles, and of trained roles whose first weights are given; these
        override `inits`.
      inits: role -> the role that it is copied from, or None; by default the method's.
    """
    weights = first_weights(method, nets, key, start, inits)
    parts = {r: split(nets[r], w, method.trains.get(r)) for r, w in weights.items()}
    params = {role: part.moving for role, part in parts.items()}
    zero = jnp.zeros((), jnp.int32)
    return State(
        step=zero,
        count={role: jnp.copy(zero) for role in params},
        params=params,
        opt={role: txs[role].init(p) for role, p in params.items()},
        ema={role: jax.tree.map(jnp.copy, params[role]) for role in method.ema},
        frozen=frozen_weights(method, nets, start),
        memory=method.memory(),
        rest={role: part.rest for role, part in parts.items() if part.rest},
        statistics={
            r: part.statistics for r, part in parts.items() if part.statistics
        },
    )


def first_weights(
    method: Method,
    nets: Mapping[str, Net],
    key: Array,
    start: Mapping[str, Params],
    inits: Mapping[str, str | None] | None = None,
) -> dict[str, Params]:
    """Trained role -> all its weights before the first step, float32, in new buffers.

    Arguments as in `init_state`.
    """
    # `materialise` gives floating-point arrays in device memory, and `from_source` converts them to
    # the form that a role's network has (stacked members, say). A role with adapters (`adapts`)
    # starts from fresh ones, since its base belongs to another role. A source may be a role that
    # was initialised before in this loop.
    params = {}
    for i, (role, source) in enumerate((inits or method.inits).items()):
        if role in start:
            init = nets[role].from_source(materialise(start[role]))
        elif source is not None and not nets[role].adapts:
            given = nets[role].from_source(materialise({**start, **params}[source]))
            init = overlay(
                nets[role].init(jax.random.fold_in(key, i)), given, role, source
            )
        else:
            init = nets[role].init(jax.random.fold_in(key, i))
        params[role] = jax.tree.map(lambda w: jnp.copy(w.astype(jnp.float32)), init)
    # Adapters may have leaves that start as their base's, which may have adapters itself.
    for role in sorted(params, key=lambda role: nets[role].depth):
        if role not in start:
            params[role] = nets[role].begun(role, {**start, **params})
    return params


def resting_weights(
    method: Method,
    nets: Mapping[str, Net],
    key: Array,
    start: Mapping[str, Params],
    inits: Mapping[str, str | None] | None = None,
) -> dict[str, Params]:
    """`State.rest` of the first state. Arguments as in `init_state`."""
    weights = first_weights(method, nets, key, start, inits)
    rest = {
        r: split(nets[r], w, method.trains.get(r)).rest for r, w in weights.items()
    }
    return {role: part for role, part in rest.items() if part}


def frozen_weights(
    method: Method, nets: Mapping[str, Net], start: Mapping[str, Params]
) -> dict[str, Params]:
    """Frozen role -> its weights in the form of its network (quantised, say), in new buffers."""
    kept = {role: nets[role].from_source(start[role]) for role in method.frozen}
    return jax.tree.map(jnp.copy, kept)


def overlay(fresh: Params, source: Params, role: str, name: str) -> Params:
    """`fresh` with the weights of `source`. Weights that `source` lacks stay as initialised.

    Args:
      role, name: what messages call `fresh` and `source`.

    Raises:
      Refused: `source` has a weight that `fresh` lacks, or one of another shape.
    """
    merged = dict(fresh)
    for key, value in source.items():
        where = f"{role} <- {name}: {key}"
        if key not in fresh:
            raise Refused(f"{where}: no such weight in {role}")
        if isinstance(value, dict):
            merged[key] = overlay(fresh[key], value, role, f"{name}/{key}")
        elif value.shape != fresh[key].shape:
            raise Refused(
                f"{where}: shape {value.shape}, expected {fresh[key].shape}"
            )
        else:
            merged[key] = value
    return merged


def bind(nets: Mapping[str, Net], params: Mapping[str, Params]) -> Nets:
    """Role -> its network with weights bound. "ema_student" is the student's network
    with its averaged weights, "last_student" that with its last ones.

    A network gets the weights of all roles, because adapters need those of their base.
    """
    roles = {}
    for role in params:
        owner = role.removeprefix("ema_").removeprefix("last_")
        roles[role] = nets[owner].bind(role, params)
    return SimpleNamespace(**roles)


def complete(state: State, role: str, moving: Params) -> Params:
    """All weights of a trained role, given those that move."""
    rest = state.rest.get(role, {})
    return joined(moving, rest, state.statistics.get(role, {}))


def all_weights(state: State) -> dict[str, Params]:
    """All weights of a state, under the names that losses know: roles, and `ema_<role>`."""
    trained = {role: complete(state, role, p) for role, p in state.params.items()}
    averages = {
        f"ema_{role}": complete(state, role, p) for role, p in state.ema.items()
    }
    return {**state.frozen, **trained, **averages}


def parts_of(state: State, role: str) -> dict[str, Any]:
    """What a state has of a role: its weights, optimiser state, average and frozen weights."""
    weights = [state.params.get(role, {}), state.statistics.get(role, {})]
    resting = [state.frozen.get(role, {}), state.rest.get(role, {})]
    return {
        "params": weights,
        "opt": state.opt.get(role, {}),
        "ema": state.ema.get(role, {}),
        "frozen": resting,
    }


def results(state: State, last: Collection[str] = ()) -> dict[str, Params]:
    """What a stage hands on: trained role -> its weights, averaged where it has an average.

    `last_<role>` are the weights after the last step, of the roles in `last`.
    """
    found = {}
    for role, moving in state.params.items():
        found[role] = complete(state, role, state.ema.get(role, moving))
        if role in last:
            found[f"last_{role}"] = complete(state, role, moving)
    return found


class Carried(NamedTuple):
    """What a loss hands to that of the next micro-batch, and to the next turn."""

    memory: Mapping[str, Any]
    statistics: Mapping[str, Params]


def take_turn(
    turn: Turn,
    nets: Mapping[str, Net],
    txs: Mapping[str, optax.GradientTransformation],
    emas: Mapping[str, Ema],
    accumulate: int,
    state: State,
    batch: Batch,
    rng: Array,
) -> tuple[State, Means]:
    """One optimiser update of `turn.moves`.

    The order: gather the batch, differentiate, divide by the global count, update, average,
    `turn.after`.
    """
    weights = all_weights(state)
    if turn.gather:
        ctx = Ctx(batch, rng, state.step, state.memory)
        batch = jax.lax.stop_gradient(turn.gather(bind(nets, weights), ctx))

    moving = {role: state.params[role] for role in turn.moves}
    objective = _objective(turn, nets, state, weights)
    differentiate = jax.grad(objective, has_aux=True)
    carried = Carried(state.memory, state.statistics)
    if accumulate == 1:
        grads, (sums, count, carried) = differentiate(moving, batch, rng, carried)
    else:
        grads, (sums, count, carried) = _accumulate(
            differentiate, moving, batch, rng, carried, accumulate
        )
    grads = jax.tree.map(lambda g: g / _nonzero(count), grads)
    finite = finite_updates(turn, nets, state.opt, grads, sums["loss"][0])
    # In a bank (several networks in one role) a member whose gradient is not finite gets zeros.
    grads = {role: nets[role].sanitise(g) for role, g in grads.items()}

    means = _means(turn, sums, count, grads)
    if finite:
        means = without_skipped(means, turn, state.opt, finite)
        before = Carried(state.memory, state.statistics)
        carried = chosen(any_taken(turn, state.opt, finite), carried, before)
    state = state.replace(memory=carried.memory, statistics=carried.statistics)
    state = _update(turn, txs, emas, state, grads, finite)
    if turn.after:
        changed = turn.after(all_weights(state), state.step)
        moved = {role: like(w, state.params[role]) for role, w in changed.items()}
        state = state.replace(params={**state.params, **moved})
    return state, means


def _objective(
    turn: Turn, nets: Mapping[str, Net], state: State, weights: Mapping[str, Params]
) -> Callable[..., tuple[Array, tuple[dict[str, Any], Array, Carried]]]:
    """The loss of a turn as a function of (moving weights, batch, rng, carried).

    It returns (loss, (sums, count, carried)). The loss is to be divided by `count`, which is 1 for
    a mean. `sums` holds (sum, count) of each metric: the count is that of the loss if the metric
    has no other, and None if both are means.

    Args:
      weights: of all roles, as `all_weights` gives them.
    """

    def objective(
        moving: dict[str, Params], batch: Batch, rng: Array, carried: Carried
    ):
        current = state.replace(statistics=carried.statistics)
        own = {role: complete(current, role, part) for role, part in moving.items()}
        ctx = Ctx(batch, rng, state.step, carried.memory)
        out = turn.loss(bind(nets, {**weights, **own}), ctx)
        count = None if out.count is None else jnp.asarray(out.count, jnp.float32)
        sums = {}
        for name, value in {"loss": out.loss, **out.metrics}.items():
            sums[name] = value if isinstance(value, tuple) else (value, count)
        divisor = jnp.float32(1) if count is None else count
        memory = {**carried.memory, **out.memory}
        statistics = {**carried.statistics, **out.statistics}
        return out.loss, (sums, divisor, Carried(memory, statistics))

    return objective


def _means(
    turn: Turn,
    sums: Mapping[str, tuple[Array, Array | None]],
    count: Array,
    grads: Mapping[str, Params],
) -> Means:
    """The metrics of a turn; `sums` and `count` are those of its objective."""
    first = turn.moves[0] if turn.moves else "measured"
    metrics = {}
    counts = {}
    for name, (total, own) in sums.items():
        metrics[f"{first}/{name}"] = total / _nonzero(count if own is None else own)
        if own is not None:
            counts[f"{first}/{name}"] = own
    for role in turn.moves:
        metrics[f"{role}/grad_norm"] = optax.tree.norm(grads[role])
    return Means(metrics, counts)


def _update(
    turn: Turn,
    txs: Mapping[str, optax.GradientTransformation],
    emas: Mapping[str, Ema],
    state: State,
    grads: Mapping[str, Params],
    finite: Mapping[str, Array],
) -> State:
    """The state after the optimisers' updates of `turn.moves` and of their averages.

    `finite` is what `finite_updates` returns.
    """
    params = dict(state.params)
    opt = dict(state.opt)
    ema = dict(state.ema)
    count = dict(state.count)
    taken = taken_updates(opt, finite)
    for role in turn.moves:
        given = {"finite": finite[role]} if role in finite else {}
        updates, opt[role] = txs[role].update(
            grads[role], opt[role], params[role], **given
        )
        params[role] = optax.apply_updates(params[role], updates)
        count[role] = count[role] + 1
        if role in ema:
            decay = turn.decay or emas[role].decay
            ema[role] = optax.incremental_update(
                params[role], ema[role], 1.0 - decay(count[role])
            )
    for role, mask in taken.items():
        count[role] = chosen(mask, count[role], state.count[role])
        if role in ema:
            ema[role] = chosen(mask, ema[role], state.ema[role])
    return state.replace(params=params, opt=opt, ema=ema, count=count)


def _nonzero(count: Array) -> Array:
    return jnp.where(count == 0, 1.0, count)


def _accumulate(
    differentiate: Callable,
    moving: Mapping[str, Params],
    batch: Batch,
    rng: Array,
    carried: Carried,
    n: int,
):
    """Sums of gradients, metrics and counts over `n` micro-batches, one after the other.

    Each micro-batch takes every n-th sample. Devices hold contiguous parts of the batch, so this
    stride leaves every sample on its device.
    """

    def split(x: Array) -> Array:
        micro = x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
        return constrain(micro, None, "batch")

    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def one(carry, inputs):
        total, carried = carry
        i, micro = inputs
        key = jax.random.fold_in(rng, i)
        grads, (sums, count, carried) = differentiate(moving, micro, key, carried)
        return (add(total, (grads, sums, count)), carried), None

    micro = jax.tree.map(split, batch)
    one_micro = jax.tree.map(lambda x: x[0], micro)
    grads, (sums, count, _) = jax.eval_shape(
        differentiate, moving, one_micro, rng, carried
    )
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), (grads, sums, count)
    )
    (total, carried), _ = jax.lax.scan(
        one, (zeros, carried), (jnp.arange(n), micro)
    )
    grads, sums, count = total
    return grads, (sums, count, carried)


def active_turns(turns: Sequence[Turn], step: int) -> tuple[int, ...]:
    """The indices of the turns that a step takes."""
    return tuple(i for i, turn in enumerate(turns) if turn.when(step))


def make_train_step(
    method: Method,
    nets: Mapping[str, Net],
    txs: Mapping[str, optax.GradientTransformation],
    *,
    emas: Mapping[str, Ema] = {},
    accumulate: int = 1,
    shardings: Any = None,
) -> tuple[Callable, Callable[[int], tuple[int, ...]]]:
    """The train step, and the function that tells which turns a step takes.

    Args:
      emas: role -> how its weights are averaged.
      accumulate: micro-batches per step.
      shardings: of the state; None leaves them to the compiler.

    Returns:
      `train_step(state, batch, rng, active) -> (state, metrics)`, pure, jitted, donating its state.
      Metrics are named `role/name`. `active`, the indices of the turns, is static: each
      combination is a program of its own.
      `active_at(step) -> active`.

    Raises:
      Refused: the config gives `ema` for a role whose turn has its own `decay`.
    """
    turns = method.turns
    emas = {role: emas.get(role, Ema()) for role in method.ema}
    own_decay = {
        role for turn in turns if turn.decay for role in turn.moves if role in emas
    }
    for role in own_decay:
        if emas[role] != Ema():
            raise Refused(
                f"config.roles.{role}.ema={emas[role]}: {type(method).__name__} has a decay of its"
                " own; expected none here"
            )

    def train_step(
        state: State, batch: Batch, rng: Array, active: tuple[int, ...]
    ) -> tuple[State, Means]:
        rng = jax.random.fold_in(rng, state.step)
        metrics = {}
        counts = {}
        for n, i in enumerate(active):
            if (
                n > 0
            ):  # else XLA may overlap turns, which then need device memory at once
                state, batch = jax.lax.optimization_barrier((state, batch))
            with jax.named_scope(f"turn={i}"):
                key = jax.random.fold_in(rng, i)
                state, new = take_turn(
                    turns[i], nets, txs, emas, accumulate, state, batch, key
                )
            # a later metric of the same name replaces the earlier one and its count
            counts = {
                name: count for name, count in counts.items() if name not in new
            }
            counts |= new.counts
            metrics |= new
        return state.replace(step=state.step + 1), Means(metrics, counts)

    def active_at(step: int) -> tuple[int, ...]:
        return active_turns(turns, step)

    out_shardings = None if shardings is None else (shardings, None)
    jitted = jax.jit(
        train_step, static_argnums=3, donate_argnums=0, out_shardings=out_shardings
    )
    return jitted, active_at
