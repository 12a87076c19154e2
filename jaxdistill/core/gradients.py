"""What surrounds an optimiser's algorithm: clipping, and gradients that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float

from jaxdistill.core.net import Net
from jaxdistill.core.types import Array, Means, Params, Turn


def clip_by_member_norm(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` for stacked weights: each member has its own norm."""

    def update(updates, state, params=None):
        norm = member_norms(updates)
        scale = jnp.where(norm < limit, 1.0, limit / jnp.maximum(norm, limit))
        return scale_members(updates, scale), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def member_norms(updates: Params) -> Float[Array, " K"]:
    """The global norm of each member's part of stacked updates."""
    squares = [
        jnp.sum(g.reshape(g.shape[0], -1) ** 2, axis=1)
        for g in jax.tree.leaves(updates)
    ]
    return jnp.sqrt(sum(squares))


def scale_members(updates: Params, scale: Float[Array, " K"]) -> Params:
    """Stacked updates times a number for each member."""
    return jax.tree.map(
        lambda g: g * scale.reshape(-1, *[1] * (g.ndim - 1)), updates
    )


def members_shape(params: Params, bank: bool) -> tuple[int, ...]:
    """The shape of one number for each member of a bank, [K]; [] of one network."""
    leaves = jax.tree.leaves(params)
    return leaves[0].shape[:1] if bank and leaves else ()


class Window(NamedTuple):
    """The last norms of the gradient before clipping, a ring, for each member of a bank."""

    norms: Array  # float32 [window] or [K window]
    seen: Array  # int32 [] or [K]: finite norms so far


def clip_by_percentile(
    limit: float, percentile: float, window: int, *, bank: bool = False
) -> optax.GradientTransformation:
    """Clips the global norm to a percentile of the norms of the last updates.

    The limit of an update is the percentile of the `window` finite norms before it, at most
    `limit`. It is `limit` alone until there are as many.

    Args:
      limit: inf for none.
      bank: each member of the stacked weights has norms of its own.
    """

    def init(params: Params) -> Window:
        shape = members_shape(params, bank)
        return Window(jnp.zeros((*shape, window)), jnp.zeros(shape, jnp.int32))

    def update(updates, state, params=None):
        norm = member_norms(updates) if bank else optax.tree.norm(updates)
        typical = jnp.percentile(state.norms, percentile, axis=-1)
        full = state.seen >= window
        most = jnp.where(full, jnp.minimum(typical, limit), limit)
        scale = jnp.where(norm <= most, 1.0, most / norm)
        finite = jnp.isfinite(norm)
        place = jnp.arange(window) == (state.seen % window)[..., None]
        written = place & finite[..., None]
        norms = jnp.where(written, norm[..., None], state.norms)
        clipped = (
            scale_members(updates, scale)
            if bank
            else optax.tree.scale(scale, updates)
        )
        return clipped, Window(norms, state.seen + finite)

    return optax.GradientTransformation(init, update)


class Later(NamedTuple):
    """State of a clipping that begins at an update."""

    count: Array  # int32 []: updates so far
    clip: Any


def clip_later(
    clip: optax.GradientTransformation, start: int
) -> optax.GradientTransformation:
    """`clip` without effect on the first `start` updates."""

    def init(params: Params) -> Later:
        return Later(jnp.zeros((), jnp.int32), clip.init(params))

    def update(updates, state, params=None):
        clipped, inner = clip.update(updates, state.clip, params)
        kept = chosen(state.count >= start, clipped, updates)
        return kept, Later(optax.safe_increment(state.count), inner)

    return optax.GradientTransformation(init, update)


def zero_nonfinite() -> optax.GradientTransformation:
    """Zeros in place of entries that are not finite."""

    def update(updates, state, params=None):
        def finite(g: Array) -> Array:
            return jnp.where(jnp.isfinite(g), g, 0.0)

        return jax.tree.map(finite, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def chosen(mask: Array, new: Any, old: Any) -> Any:
    """The leaves of `new` where `mask` holds, else those of `old`.

    Args:
      mask: bool [], or [K] for each member of stacked leaves; of leaves without axes (counts) `new`
        is taken if any member holds.
    """

    def leaf(a: Array, b: Array) -> Array:
        if mask.ndim and jnp.ndim(a):
            return jnp.where(mask.reshape(-1, *[1] * (jnp.ndim(a) - 1)), a, b)
        return jnp.where(jnp.any(mask), a, b)

    return jax.tree.map(leaf, new, old)


class Skipping(NamedTuple):
    """State of an optimiser that skips updates whose gradient is not finite."""

    # int32 [], or [K] for the members of a bank: such updates so far
    skipped: Array
    inner: Any


class Zeroing(NamedTuple):
    """State of an optimiser that replaces entries that are not finite."""

    zeroed: Array  # int32 [], or [K] for the members of a bank: such updates so far
    inner: Any


def skipping(
    inner: optax.GradientTransformation, *, bank: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`inner` with nothing changed by updates, or by members' updates, that are not `finite`.

    `update` takes the keyword `finite`, bool [] or [K]: what `finite_updates` returns.
    """

    def init(params: Params) -> Skipping:
        count = jnp.zeros(members_shape(params, bank), jnp.int32)
        return Skipping(count, inner.init(params))

    def update(updates, state, params=None, *, finite: Array):
        updates, after = inner.update(updates, state.inner, params)
        # x + -0.0 is x to the bit, x + 0.0 is not where x is -0.0
        still = jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)
        number = state.skipped + ~finite
        state = Skipping(number, chosen(finite, after, state.inner))
        return chosen(finite, updates, still), state

    return optax.GradientTransformationExtraArgs(init, update)


def zeroing(
    inner: optax.GradientTransformation, *, bank: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`inner`, which has `zero_nonfinite`, with a count of the updates that are not `finite`."""

    def init(params: Params) -> Zeroing:
        count = jnp.zeros(members_shape(params, bank), jnp.int32)
        return Zeroing(count, inner.init(params))

    def update(updates, state, params=None, *, finite: Array):
        updates, after = inner.update(updates, state.inner, params)
        return updates, Zeroing(state.zeroed + ~finite, after)

    return optax.GradientTransformationExtraArgs(init, update)


def finite_updates(
    turn: Turn,
    nets: Mapping[str, Net],
    opt: Mapping[str, Any],
    grads: Mapping[str, Params],
    loss: Array,
) -> dict[str, Array]:
    """Role -> whether its gradient and the loss are finite, bool [], or [K] in a bank.

    It has the roles of the turn whose optimiser goes on after those that are not. A norm that
    overflows is not finite either. Where one member of a bank has a gradient that is not finite,
    the loss is not finite because of it, and the other members move.
    """
    finite = {}
    for role in turn.moves:
        if not isinstance(opt[role], (Skipping, Zeroing)):
            continue
        own = nets[role].finite(grads[role])
        norm = optax.tree.norm(nets[role].sanitise(grads[role]))
        sound = jnp.isfinite(loss) | ~jnp.all(own)
        finite[role] = own & jnp.isfinite(norm) & sound
    return finite


def taken_updates(
    opt: Mapping[str, Any], finite: Mapping[str, Array]
) -> dict[str, Array]:
    """The entries of `finite` whose role skips an update that is not finite."""
    return {r: mask for r, mask in finite.items() if isinstance(opt[r], Skipping)}


def any_taken(
    turn: Turn, opt: Mapping[str, Any], finite: Mapping[str, Array]
) -> Bool[Array, ""]:
    """Whether a turn updates anything."""
    taken = taken_updates(opt, finite)
    return jnp.any(jnp.stack([jnp.any(taken.get(r, True)) for r in turn.moves]))


def without_skipped(
    means: Means, turn: Turn, opt: Mapping[str, Any], finite: Mapping[str, Array]
) -> Means:
    """The metrics of a turn, where those that must not count are 0 with a count of 0.

    These are metrics that are not finite, and metrics of skipped updates. The metrics of the loss
    belong to all roles of the turn, so that one role that stops the run has them left as they are.
    `<role>/skipped` or `<role>/zeroed` is the share of updates (of members, in a bank) that were
    not finite.
    """
    metrics = dict(means)
    counts = dict(means.counts)
    taken = taken_updates(opt, finite)

    def weigh(name: str, counted: Array) -> None:
        valid = counted & jnp.isfinite(metrics[name])
        counts[name] = jnp.where(valid, counts.get(name, 1.0), 0.0)
        metrics[name] = jnp.where(valid, metrics[name], 0.0)

    norms = {role: f"{role}/grad_norm" for role in turn.moves}
    if set(turn.moves) <= finite.keys():
        for name in means.keys() - set(norms.values()):
            weigh(name, any_taken(turn, opt, finite))
    for role in finite:
        weigh(norms[role], jnp.any(taken.get(role, True)))
        name = "skipped" if role in taken else "zeroed"
        metrics[f"{role}/{name}"] = jnp.mean(~finite[role], dtype=jnp.float32)
    return Means(metrics, counts)
