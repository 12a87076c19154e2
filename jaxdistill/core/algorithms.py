"""The optimisers by name, with the two that optax lacks: LAMB of stacked layers, and CAME."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdistill.core.net import STACKED, is_spec, path_name, paths
from jaxdistill.core.types import Array, Params

# (key path of a weight, weight) -> its axes within one layer of one member of a bank
OwnAxes = Callable[[tuple, Array], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An optimiser, and the names of its parameters."""

    make: Callable[..., optax.GradientTransformation]
    # field of Optimizer -> parameter; other fields have no effect
    takes: Mapping[str, str]
    # How weights decay. "own": by its parameters `weight_decay` and `mask`. "decoupled": added to
    # the update, times lr. "gradient": added to the gradient.
    decay: str
    # Whether it takes norms or means over a weight; `make` then has a parameter `own`, OwnAxes.
    by_layer: bool = False


def own_axes(axes: Params | None, bank: bool = False) -> OwnAxes:
    """The function that gives a weight's axes without those that stack layers and members.

    Args:
      axes: logical axis names of the weights. Without them only the members of a bank are stacked,
        on the first axis.
      bank: the role is a bank of networks.
    """
    names_of = {} if axes is None else paths(axes, is_leaf=is_spec)
    unnamed = ("bank",) if bank else ()

    def own(path: tuple, weight: Array) -> tuple[int, ...]:
        names = names_of.get(path_name(path), unnamed)
        stacked = [i for i, name in enumerate(names) if name in STACKED]
        return tuple(i for i in range(weight.ndim) if i not in stacked)

    return own


def lamb(
    lr: Any,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    mask: Callable,
    own: OwnAxes,
) -> optax.GradientTransformation:
    """LAMB with a trust ratio for each layer and member.

    Source: algorithm 2 of arXiv:1904.00962, with phi(z) = z.
    """
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(own),
        optax.scale_by_learning_rate(lr),
    )


def scale_by_trust_ratio(own: OwnAxes) -> optax.GradientTransformation:
    """Updates times |weight| / |update|, or times 1 where either norm is 0."""

    def scaled(path: tuple, update: Array, weight: Array) -> Array:
        axes = own(path, weight)
        length = _norm(weight, axes)
        step = _norm(update, axes)
        fixed = (length == 0) | (step == 0)
        ratio = length / jnp.where(fixed, 1.0, step)
        return update * jnp.where(fixed, 1.0, ratio)

    def update(updates, state, params):
        return jax.tree_util.tree_map_with_path(scaled, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _norm(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))


class CameState(NamedTuple):
    """The averages of CAME, in the structure of the weights.

    `rows` and `columns` keep all axes of a weight: those that they are means over have size 1, so
    that they are sharded as the weight is.
    """

    mean: Params  # of the updates
    rows: Params  # of the squared gradients
    columns: Params
    doubt_rows: Params  # of the squared distances of updates from their mean
    doubt_columns: Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Came:
    """CAME for each layer and member, with a learning rate of 1.

    The factors are over the last two axes of one layer's matrix. A weight with one axis is a matrix
    of one column, whose second moment is thus not factored; it has no confidence.

    Source: algorithm 2 of arXiv:2307.02047 with d = 1, without bias correction.
    """

    b1: float
    b2: float
    b3: float
    eps1: float
    eps2: float
    own: OwnAxes

    def init(self, params: Params) -> CameState:
        """Zeros, in buffers of their own."""

        def made(part: Callable) -> Params:
            return jax.tree_util.tree_map_with_path(part, params)

        return CameState(
            mean=jax.tree.map(jnp.zeros_like, params),
            rows=made(self._rows),
            columns=made(self._columns),
            doubt_rows=made(self._doubt_rows),
            doubt_columns=made(self._columns),
        )

    def _rows(self, path: tuple, weight: Array) -> Array:
        over_row, _ = _factors(self.own(path, weight))
        return _mean(jnp.zeros_like(weight), over_row)

    def _columns(self, path: tuple, weight: Array) -> Array:
        _, over_column = _factors(self.own(path, weight))
        return _mean(jnp.zeros_like(weight), over_column)

    def _doubt_rows(self, path: tuple, weight: Array) -> Array:
        """A vector needs none: the smallest array that is sharded as the weight is."""
        is_matrix = len(self.own(path, weight)) >= 2
        return (self._rows if is_matrix else self._columns)(path, weight)

    def update(self, grads, state, params=None):
        """(updates, state) as of an optax transformation."""
        found = jax.tree_util.tree_map_with_path(self._of_weight, grads, *state)
        parts = jax.tree.structure((0,) * (1 + len(state)))
        outer = jax.tree.structure(grads)
        updates, *entries = jax.tree.transpose(outer, parts, found)
        return updates, CameState(*entries)

    def _of_weight(
        self,
        path: tuple,
        g: Array,
        mean: Array,
        rows: Array,
        columns: Array,
        doubt_rows: Array,
        doubt_columns: Array,
    ) -> tuple[Array, ...]:
        """(update, new entries of the state) of one weight."""
        axes = self.own(path, g)
        over_row, over_column = _factors(axes)
        square = g**2 + self.eps1
        rows = _average(self.b2, rows, _mean(square, over_row))
        columns = _average(self.b2, columns, _mean(square, over_column))
        step = g * _inverse_root(rows, columns, over_column)
        rms = jnp.sqrt(_mean(step**2, axes))
        step = step / jnp.maximum(rms, 1.0)
        mean = _average(self.b1, mean, step)
        if len(axes) < 2:
            return mean, mean, rows, columns, doubt_rows, doubt_columns
        doubt = (step - mean) ** 2 + self.eps2
        doubt_rows = _average(self.b3, doubt_rows, _mean(doubt, over_row))
        doubt_columns = _average(self.b3, doubt_columns, _mean(doubt, over_column))
        sure = mean * _inverse_root(doubt_rows, doubt_columns, over_column)
        return sure, mean, rows, columns, doubt_rows, doubt_columns


def came(lr: Any, **parameters: Any) -> optax.GradientTransformation:
    """CAME; `parameters` are the fields of `Came`."""
    rule = Came(**parameters)
    steps = optax.GradientTransformation(rule.init, rule.update)
    return optax.chain(steps, optax.scale_by_learning_rate(lr))


def _factors(axes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that means by row are over, and those that means by column are over."""
    return (axes[-1:], axes[-2:-1]) if len(axes) >= 2 else ((), axes)


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.mean(x, axes, keepdims=True)


def _average(rate: float, old: Array, new: Array) -> Array:
    return rate * old + (1 - rate) * new


def _inverse_root(
    rows: Array, columns: Array, over_column: tuple[int, ...]
) -> Array:
    """1 / sqrt(rows columns / mean(rows)), in factors, since the product may underflow."""
    relative = rows / _mean(rows, over_column)
    return jax.lax.rsqrt(relative) * jax.lax.rsqrt(columns)


MOMENTS = {"b1": "b1", "b2": "b2", "eps": "eps"}
CONFIDENCE = {name: name for name in ("b1", "b2", "b3", "eps1", "eps2")}

# Those without `by_layer` are elementwise.
ALGORITHMS = {
    "adamw": Algorithm(optax.adamw, MOMENTS, "own"),
    "adam": Algorithm(optax.adamw, MOMENTS, "own"),
    "nadamw": Algorithm(optax.nadamw, MOMENTS, "own"),
    "nadam": Algorithm(optax.nadamw, MOMENTS, "own"),
    "adamaxw": Algorithm(optax.adamaxw, MOMENTS, "own"),
    "adamax": Algorithm(optax.adamaxw, MOMENTS, "own"),
    "lion": Algorithm(optax.lion, {"b1": "b1", "b2": "b2"}, "own"),
    "radam": Algorithm(optax.radam, MOMENTS, "decoupled"),
    "adabelief": Algorithm(optax.adabelief, MOMENTS, "decoupled"),
    "amsgrad": Algorithm(optax.amsgrad, MOMENTS, "decoupled"),
    "rmsprop": Algorithm(optax.rmsprop, {"b2": "decay", "eps": "eps"}, "decoupled"),
    "adagrad": Algorithm(optax.adagrad, {"eps": "eps"}, "decoupled"),
    "sgd": Algorithm(optax.sgd, {"momentum": "momentum"}, "gradient"),
    "lamb": Algorithm(lamb, MOMENTS, "own", by_layer=True),
    "came": Algorithm(came, CONFIDENCE, "decoupled", by_layer=True),
}
