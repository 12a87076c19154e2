"""A network as two pure functions over a plain dict of weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxdistill.core.types import Array, Params

_FORWARD: ContextVar[bool] = ContextVar("forward_mode", default=False)


@contextlib.contextmanager
def forward_mode():
    """What is traced inside gets differentiated forward: layers take programs that have such a
    derivative (attention).
    """
    token = _FORWARD.set(True)
    try:
        yield
    finally:
        _FORWARD.reset(token)


def in_forward_mode() -> bool:
    """Whether the caller is traced inside `forward_mode`."""
    return _FORWARD.get()


def identity(call):
    return call


@dataclasses.dataclass(frozen=True)
class Net:
    """`init(key) -> params` and `apply(params, *inputs)` over plain dicts; NNX stays inside.

    `shapes` holds ShapeDtypeStruct leaves and `axes` PartitionSpec leaves of logical names, both in
    the structure of the params. `wrap` turns the module's call into another one (a raw denoiser
    output into a `Pred`, say).
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    graphdef: nnx.GraphDef
    shapes: Params
    axes: Params
    wrap: Callable[[Callable], Callable] = identity
    config: Any = None  # the model's dataclass, where the net came from one
    adapts: str = ""  # the role whose frozen weights these are adapters of

    def init(self, key: Array) -> Params:
        """Fresh weights, drawn from `key`."""
        with nnx.use_eager_sharding(False):
            return nnx.to_pure_dict(nnx.state(self.build(_rngs(key)), nnx.Param))

    def apply(self, params: Params, *args, method: str = "__call__", **kwargs) -> Any:
        """Calls the module's `method` with these weights."""
        call = getattr(_awake(nnx.merge(self.graphdef, params)), method)
        return (self.wrap(call) if method == "__call__" else call)(*args, **kwargs)

    def from_source(self, params: Params) -> Params:
        """Weights that came from elsewhere, as this network's first ones."""
        return params

    @property
    def source(self) -> Net:
        """The network whose weights are loaded from a folder, to be adopted by this one."""
        return self

    def sanitise(self, grads: Params) -> Params:
        """What the optimiser gets of these gradients."""
        return grads

    def bind(self, role: str, params: Mapping[str, Params]) -> Callable:
        """The callable that a loss sees as `nets.<role>`; its operations carry the role's name in
        profiles.
        """
        return scoped(role, functools.partial(self.apply, params[role]), self.config)

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(math.prod(s.shape) for s in jax.tree.leaves(self.shapes))


def resting(leaf: Any) -> bool:
    """Whether a weight is quantised (a `qwix.QArray`)."""
    return hasattr(leaf, "qvalue")


def materialise(tree: Any) -> Any:
    """Weights as arithmetic takes them: in device memory, dequantised. What is so already stays the
    same array.
    """
    place = lambda w: jax.device_put(w, jax.memory.Space.Device) if _on_host(w) else w

    def one(w):
        if not resting(w):
            return place(w)
        import qwix

        return qwix.dequantize(jax.tree.map(place, w))

    return jax.tree.map(one, tree, is_leaf=resting)


def _on_host(w: Any) -> bool:
    return (
        getattr(getattr(w, "aval", None), "memory_space", jax.memory.Space.Device)
        == jax.memory.Space.Host
    )


def _awake(module: nnx.Module) -> nnx.Module:
    """`module` with every weight restored but those of stacked layers, whose scan restores them one
    by one.
    """
    if any(resting(w) or _on_host(w) for w in jax.tree.leaves(module, is_leaf=resting)):
        for _, variable in nnx.iter_graph(module):
            if (
                isinstance(variable, nnx.Variable)
                and (variable.get_metadata().get("out_sharding") or (None,))[0] != "layers"
            ):
                variable.set_value(materialise(variable.get_value()))
    return module


def scoped(role: str, call: Callable, config: Any = None) -> Callable:
    """`call` with its operations named after the role in profiles and compiled programs, and the
    model's dataclass as `.config`.
    """

    def named(*args, **kwargs):
        with jax.named_scope(f"role={role}"):
            return call(*args, **kwargs)

    named.config = config
    return named


class _Stream(nnx.RngStream):
    """nnx's stream with a count that is replaced, not updated in place: an update asks a traced
    count for its sharding, and the message that it has none searches the whole program so far,
    which makes building quadratic in the number of weights.
    """

    def __call__(self) -> Array:
        key = jax.random.fold_in(self.key[...], self.count[...])
        self.count.set_value(self.count[...] + 1)
        return key


def _rngs(key: Array | int) -> nnx.Rngs:
    rngs = nnx.Rngs(key)
    rngs.default = _Stream(rngs.default.key[...], tag="default")
    return rngs


@functools.lru_cache(64)
def _described(
    build: Callable[[nnx.Rngs], nnx.Module], x64: bool | None
) -> tuple[nnx.GraphDef, Params, Params]:
    """(graphdef, shapes, axes): one trace for all roles of equal networks."""
    with nnx.use_eager_sharding(False):
        graphdef, state = jax.eval_shape(lambda: nnx.split(build(_rngs(0)), nnx.Param))
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(nnx.get_partition_spec(state))


def make_net(build: Callable[[nnx.Rngs], nnx.Module], wrap=identity, config: Any = None) -> Net:
    """Traces `build` for shapes and axis names; nothing is allocated.

    Raises ValueError where a weight's rank and number of axis names differ (an unnamed stacking
    axis would shift every name).
    """
    try:
        graphdef, shapes, axes = _described(build, jax.config.jax_enable_x64)
    except TypeError:  # not hashable
        graphdef, shapes, axes = _described.__wrapped__(build, None)
    for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
        names = functools.reduce(lambda tree, key: tree[key.key], path, axes)
        if len(names) not in (0, len(shape.shape)):
            raise ValueError(f"{jax.tree_util.keystr(path)} {shape.shape} has axis names {names}")
    return Net(build, graphdef, shapes, axes, wrap, config)


@dataclasses.dataclass(frozen=True)
class Fixed(Net):
    """A network without weights: a closed-form teacher, a constant."""

    call: Callable = identity

    def init(self, key):
        return {}

    def apply(self, params, *args, **kwargs):
        return self.wrap(self.call)(*args, **kwargs)


def fixed_net(call: Callable, wrap=identity, config: Any = None) -> Net:
    """Wraps a plain function `(*inputs) -> output` as a Net with no weights."""
    return Fixed(None, None, {}, {}, wrap, config, call=call)


def cast(params: Params, dtype) -> Params:
    """Floating leaves in `dtype`; integer leaves untouched."""
    return jax.tree.map(
        lambda w: w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w, params
    )


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def is_matrix(names: PartitionSpec) -> bool:
    """Whether a weight with these logical names has two dimensions or more of its own, besides
    those it is stacked along.
    """
    return len([n for n in names if n not in ("layers", "bank")]) >= 2


def decays(names: PartitionSpec) -> bool:
    """Whether weight decay acts on a weight with these logical names: on matrices, token tables
    among them (they are the output's matrix too where the two are tied), but not on what is looked
    up by another index: labels, positions, types ("index").
    """
    return is_matrix(names) and "index" not in names


def path_name(path) -> str:
    """ "a/b/c" of a key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def paths(tree: Params, is_leaf=None) -> dict[str, Any]:
    """Leaves under their "a/b/c" paths."""
    return {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    }
