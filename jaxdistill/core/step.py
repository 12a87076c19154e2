"""The one train step. Every method runs through this file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill.core.net import Net, materialise
from jaxdistill.core.optim import Ema
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Batch, Ctx, Means, Method, Nets, Params, Refused, State, Turn


def init_state(
    method: Method, nets: Mapping[str, Net], txs, key, start: Mapping[str, Params], inits=None
) -> State:
    """Initial state. `start` holds the frozen roles and the warm starts; the rest is copied or
    fresh, as `inits` (by default the method's) says.

    Pure, to be jitted with the state's shardings. Every tree owns its buffers, because they get
    donated.
    """
    params = {}
    for i, (role, source) in enumerate((inits or method.inits).items()):
        if role in start:
            init = nets[role].from_source(materialise(start[role]))
        elif source is not None and not nets[role].adapts:
            given = nets[role].from_source(materialise({**start, **params}[source]))
            init = overlay(nets[role].init(jax.random.fold_in(key, i)), given, role, source)
        else:
            init = nets[role].init(jax.random.fold_in(key, i))
        params[role] = jax.tree.map(lambda w: jnp.copy(w.astype(jnp.float32)), init)
    zero = jnp.zeros((), jnp.int32)
    return State(
        step=zero,
        count={role: jnp.copy(zero) for role in params},
        params=params,
        opt={role: txs[role].init(p) for role, p in params.items()},
        ema={role: jax.tree.map(jnp.copy, params[role]) for role in method.ema},
        frozen=frozen_weights(method, nets, start),
        memory=method.memory(),
    )


def frozen_weights(
    method: Method, nets: Mapping[str, Net], start: Mapping[str, Params]
) -> dict[str, Params]:
    """role -> what a state holds of each frozen role, in buffers of its own."""
    return {
        role: jax.tree.map(jnp.copy, nets[role].from_source(start[role])) for role in method.frozen
    }


def overlay(fresh: Params, source: Params, role: str, name: str) -> Params:
    """`source` copied into `fresh`; weights that only `fresh` has keep their initialisation.

    Raises Refused where `source` has a weight that `fresh` lacks, or one of another shape.
    """
    for key, value in source.items():
        where = f"{role} <- {name}: {key}"
        if key not in fresh:
            raise Refused(f"{where}: no such weight in {role}")
        if isinstance(value, dict):
            overlay(fresh[key], value, role, f"{name}/{key}")
        elif value.shape != fresh[key].shape:
            raise Refused(f"{where}: shape {value.shape}, expected {fresh[key].shape}")
    merge = lambda new, old: {
        k: merge(v, old[k]) if isinstance(v, dict) and k in old else old.get(k, v)
        for k, v in new.items()
    }
    return merge(fresh, source)


def bind(nets: Mapping[str, Net], params: Mapping[str, Params]) -> Nets:
    """role -> network with its weights bound; `ema_student` runs the student's averaged weights."""
    return SimpleNamespace(
        **{role: nets[role.removeprefix("ema_")].bind(role, params) for role in params}
    )


def bound(nets: Mapping[str, Net], state: State) -> dict[str, Params]:
    """Every role's weights under the name that losses know it by."""
    return {**state.frozen, **state.params, **{f"ema_{role}": p for role, p in state.ema.items()}}


def take_turn(
    turn: Turn, nets, txs, emas: Mapping[str, Ema], accumulate: int, state: State, batch: Batch, rng
) -> tuple[State, Means]:
    """One optimiser update of `turn.moves`: gather, differentiate, normalise by the global count,
    move, average.
    """
    rest = bound(nets, state)
    if turn.gather:
        ctx = Ctx(batch, rng, state.step, state.memory)
        batch = jax.lax.stop_gradient(turn.gather(bind(nets, rest), ctx))

    def objective(moving, batch, rng, memory):
        out = turn.loss(bind(nets, {**rest, **moving}), Ctx(batch, rng, state.step, memory))
        own = None if out.count is None else jnp.asarray(out.count, jnp.float32)
        sums = {
            k: v if isinstance(v, tuple) else (v, own)
            for k, v in {"loss": out.loss, **out.metrics}.items()
        }
        return out.loss, (sums, jnp.float32(1) if own is None else own, {**memory, **out.memory})

    differentiate = jax.grad(objective, has_aux=True)
    moving = {role: state.params[role] for role in turn.moves}
    if accumulate == 1:
        grads, (sums, count, memory) = differentiate(moving, batch, rng, state.memory)
    else:
        grads, (sums, count, memory) = _accumulate(
            differentiate, moving, batch, rng, state.memory, accumulate
        )
    grads = {
        role: nets[role].sanitise(g)
        for role, g in jax.tree.map(lambda g: g / _nonzero(count), grads).items()
    }

    params = dict(state.params)
    opt = dict(state.opt)
    ema = dict(state.ema)
    counts = dict(state.count)
    sums = {f"{turn.moves[0] if turn.moves else 'measured'}/{k}": pair for k, pair in sums.items()}
    metrics = {
        name: total / _nonzero(count if n is None else n) for name, (total, n) in sums.items()
    }
    for role in turn.moves:
        updates, opt[role] = txs[role].update(grads[role], opt[role], params[role])
        params[role] = optax.apply_updates(params[role], updates)
        counts[role] = counts[role] + 1
        metrics[f"{role}/grad_norm"] = optax.tree.norm(grads[role])
        if role in ema:
            decay = turn.decay or emas[role].decay
            ema[role] = optax.incremental_update(params[role], ema[role], 1.0 - decay(counts[role]))
    state = state.replace(params=params, opt=opt, ema=ema, count=counts, memory=memory)
    if turn.after:
        state = state.replace(params={**params, **turn.after(bound(nets, state), state.step)})
    return state, Means(metrics, {name: n for name, (_, n) in sums.items() if n is not None})


def _nonzero(count):
    return jnp.where(count == 0, 1.0, count)


def _accumulate(differentiate, moving, batch, rng, memory, n: int):
    """Sums gradients, losses and counts over `n` micro-batches; each takes every n-th sample, so
    shards stay put.
    """
    split = lambda x: constrain(
        x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), None, "batch"
    )
    add = lambda a, b: jax.tree.map(jnp.add, a, b)

    def one(carry, inp):
        i, micro = inp
        grads, (sums, count, memory) = differentiate(
            moving, micro, jax.random.fold_in(rng, i), carry[1]
        )
        return (add(carry[0], (grads, sums, count)), memory), None

    micro = jax.tree.map(split, batch)
    first = jax.eval_shape(differentiate, moving, jax.tree.map(lambda x: x[0], micro), rng, memory)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), (first[0], first[1][0], first[1][1])
    )
    ((grads, sums, count), memory), _ = jax.lax.scan(one, (zeros, memory), (jnp.arange(n), micro))
    return grads, (sums, count, memory)


def make_train_step(
    method: Method,
    nets: Mapping[str, Net],
    txs,
    *,
    emas: Mapping[str, Ema] = {},
    accumulate: int = 1,
    shardings: Any = None,
) -> tuple[Callable, Callable[[int], tuple[int, ...]]]:
    """Returns `train_step(state, batch, rng, active) -> (state, metrics)` and `active_at(step) ->
    active`.

    Metrics are `Means`: a dict of scalars named `role/name`, the means of this step, with the
    counts that they are over.

    The step is pure, jitted and donates its state; `active` (the indices of the turns to take) is
    static, so that every pattern is a program of its own. Raises Refused on an average in `emas`
    whose decay a turn gives.
    """
    turns = method.turns
    emas = {role: emas.get(role, Ema()) for role in method.ema}
    for role in {role for turn in turns if turn.decay for role in turn.moves if role in emas}:
        if emas[role] != Ema():
            raise Refused(
                f"config.roles.{role}.ema={emas[role]}: {type(method).__name__} has a decay of its own; expected none here"
            )

    def train_step(state: State, batch: Batch, rng, active: tuple[int, ...]) -> tuple[State, Means]:
        rng = jax.random.fold_in(rng, state.step)
        metrics = {}
        counts = {}
        for n, i in enumerate(active):
            if n:  # one after the other: a turn that starts early only holds memory
                state, batch = jax.lax.optimization_barrier((state, batch))
            with jax.named_scope(f"turn={i}"):
                key = jax.random.fold_in(rng, i)
                state, new = take_turn(turns[i], nets, txs, emas, accumulate, state, batch, key)
            counts = {name: n for name, n in counts.items() if name not in new} | new.counts
            metrics |= new
        return state.replace(step=state.step + 1), Means(metrics, counts)

    jitted = jax.jit(
        train_step,
        static_argnums=3,
        donate_argnums=0,
        out_shardings=None if shardings is None else (shardings, None),
    )
    return jitted, lambda step: tuple(i for i, turn in enumerate(turns) if turn.when(step))
