"""A network as two pure functions, `init` and `apply`, over a nested dict of weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxdistill.core.types import Array, Params

# What a network stores: weights, and the running statistics of its batch norms.
STORED = (nnx.Param, nnx.BatchStat)
STACKED = ("layers", "bank")  # logical axes that stack weights

_FORWARD: ContextVar[bool] = ContextVar("forward_mode", default=False)


@contextlib.contextmanager
def forward_mode():
    """Context for functions that are differentiated forward (`jax.jvp`).

    Layers then choose programs that have a forward derivative, which fused attention lacks.
    """
    token = _FORWARD.set(True)
    try:
        yield
    finally:
        _FORWARD.reset(token)


def in_forward_mode() -> bool:
    """Whether the caller is traced inside `forward_mode`."""
    return _FORWARD.get()


def identity(call: Callable) -> Callable:
    """`call` itself: the default of `Net.wrap`."""
    return call


@dataclasses.dataclass(frozen=True)
class Net:
    """`init(key) -> params` and `apply(params, *inputs)`; the NNX module stays inside."""

    build: Callable[[nnx.Rngs], nnx.Module]
    graphdef: nnx.GraphDef
    shapes: Params  # jax.ShapeDtypeStruct of each weight
    axes: Params  # PartitionSpec of logical axis names of each weight
    # around the call: raw output -> Pred, say
    wrap: Callable[[Callable], Callable] = identity
    config: Any = None  # the model's dataclass, if the network was made from one
    # the role that owns the base weights, if these weights are adapters
    adapts: str = ""
    # paths of running statistics, which no optimiser moves and `apply_training` replaces
    statistics: frozenset[str] = frozenset()

    def init(self, key: Array) -> Params:
        """Fresh weights, drawn from `key`."""
        with nnx.use_eager_sharding(False):
            return nnx.to_pure_dict(nnx.state(self.build(_rngs(key)), STORED))

    def apply(
        self, params: Params, *args, method: str = "__call__", **kwargs
    ) -> Any:
        """The output of the module's `method` with these weights."""
        return self._method(self._module(params), method)(*args, **kwargs)

    def apply_training(
        self, params: Params, *args, method: str = "__call__", **kwargs
    ) -> tuple[Any, Params]:
        """(output with statistics of the batch in place of running ones, new running statistics).

        The batch is the global one: a mean over samples that are sharded is that over all of them.
        The statistics are what a loss returns in `Out.statistics`.
        """
        module = self._module(params)
        module.train()
        out = self._method(module, method)(*args, **kwargs)
        return out, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    def _module(self, params: Params) -> nnx.Module:
        return _materialised(nnx.merge(self.graphdef, params))

    def _method(self, module: nnx.Module, method: str) -> Callable:
        """The module's method; the call itself is wrapped."""
        call = getattr(module, method)
        return self.wrap(call) if method == "__call__" else call

    def from_source(self, params: Params) -> Params:
        """Weights of `source` in the form that this network keeps them (stacked, quantised)."""
        return params

    @property
    def source(self) -> Net:
        """The network whose weights a folder holds; `from_source` converts them."""
        return self

    def finite(self, grads: Params) -> Array:
        """Whether all entries of gradients are finite, bool []; for each member of a Bank [K]."""
        every = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]
        return functools.reduce(jnp.logical_and, every, jnp.array(True))

    @property
    def whole(self) -> Net:
        """The network of `whole_weights`, in floating point."""
        return self

    def whole_weights(self, role: str, params: Mapping[str, Params]) -> Params:
        """All weights of a role: of one with adapters, those of its base with them.

        Args:
          params: role -> weights, of this role and its bases.
        """
        return params[role]

    @property
    def depth(self) -> int:
        """How many adapters lie on each other; 0: the network has full weights."""
        return 0

    def begun(self, role: str, params: Mapping[str, Params]) -> Params:
        """The first weights of a role: fresh ones (`params[role]`) with what the base gives."""
        return params[role]

    def weight_of(self, path: str) -> str:
        """The path by which patterns know the leaf at `path`: of a factor, that of its matrix."""
        return path

    def sanitise(self, grads: Params) -> Params:
        """Gradients as the optimiser gets them. Bank zeroes those of non-finite members."""
        return grads

    def bind(self, role: str, params: Mapping[str, Params]) -> Callable:
        """The callable that a loss knows as `nets.<role>`, named after the role in profiles."""
        own = self.bound_weights(role, params)
        call = scoped(role, functools.partial(self.apply, own), self.config)
        call.training = scoped(role, functools.partial(self.apply_training, own))
        return call

    def bound_weights(self, role: str, params: Mapping[str, Params]) -> Params:
        """What `apply` takes as the weights of a role; of adapters, with those of their base."""
        return params[role]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(math.prod(s.shape) for s in jax.tree.leaves(self.shapes))


def is_quantized(leaf: Any) -> bool:
    """Whether a weight is quantised (a `qwix.QArray`)."""
    return hasattr(leaf, "qvalue")


def materialise(tree: Any) -> Any:
    """Weights in device memory and in floating point. Others are returned as they are."""

    def on_device(w: Any) -> Any:
        return jax.device_put(w, jax.memory.Space.Device) if _on_host(w) else w

    def leaf(w: Any) -> Any:
        if not is_quantized(w):
            return on_device(w)
        import qwix

        return qwix.dequantize(jax.tree.map(on_device, w))

    return jax.tree.map(leaf, tree, is_leaf=is_quantized)


def constant(tree: Any) -> Any:
    """Weights that no gradient reaches. Those in host memory, which nothing trains, are left."""

    def leaf(w: Any) -> Any:
        is_traced = isinstance(w, jax.core.Tracer)
        return jax.lax.stop_gradient(w) if is_traced and not _on_host(w) else w

    return jax.tree.map(leaf, tree)


def _on_host(w: Any) -> bool:
    aval = getattr(w, "aval", None)
    return (
        getattr(aval, "memory_space", jax.memory.Space.Device)
        == jax.memory.Space.Host
    )


def _materialised(module: nnx.Module) -> nnx.Module:
    """`module` with all weights materialised but those of stacked layers.

    These are materialised one layer at a time by the scan over layers.
    """
    weights = jax.tree.leaves(module, is_leaf=is_quantized)
    if not any(is_quantized(w) or _on_host(w) for w in weights):
        return module
    for _, variable in nnx.iter_graph(module):
        if not isinstance(variable, nnx.Variable):
            continue
        names = variable.get_metadata().get("out_sharding") or (None,)
        if names[0] != "layers":
            variable.set_value(materialise(variable.get_value()))
    return module


def scoped(role: str, call: Callable, config: Any = None) -> Callable:
    """`call` with the role's name on its operations (in profiles), and `config` as an attribute."""

    def named(*args, **kwargs):
        with jax.named_scope(f"role={role}"):
            return call(*args, **kwargs)

    named.config = config
    return named


class _Stream(nnx.RngStream):
    """nnx's stream of random keys with a counter that is replaced, not updated in place.

    An update in place asks the traced counter for its sharding. The error that it has none searches
    the complete program so far, which makes building quadratic in the number of weights.
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
) -> tuple[nnx.GraphDef, Params, Params, frozenset[str]]:
    """(graphdef, shapes, axes, statistics): one trace for all roles of equal networks."""
    with nnx.use_eager_sharding(False):
        graphdef, state = jax.eval_shape(lambda: nnx.split(build(_rngs(0)), STORED))
    statistics = nnx.to_pure_dict(nnx.filter_state(state, nnx.BatchStat))
    return (
        graphdef,
        nnx.to_pure_dict(state),
        nnx.to_pure_dict(nnx.get_partition_spec(state)),
        frozenset(paths(statistics)),
    )


def make_net(
    build: Callable[[nnx.Rngs], nnx.Module], wrap=identity, config: Any = None
) -> Net:
    """The Net of the module that `build` makes. It is only traced: nothing is allocated.

    Raises ValueError where a weight's rank and its number of axis names differ.
    """
    try:
        described = _described(build, jax.config.jax_enable_x64)
    except TypeError:  # not hashable
        described = _described.__wrapped__(build, None)
    graphdef, shapes, axes, statistics = described
    for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
        names = functools.reduce(lambda tree, key: tree[key.key], path, axes)
        if len(names) not in (0, len(shape.shape)):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} {shape.shape} has axis names {names}"
            )
    return Net(build, graphdef, shapes, axes, wrap, config, statistics=statistics)


class Convolution(NamedTuple):
    """What a convolution's kernel does not show."""

    axes: int  # spatial axes
    groups: int


def convolutions(net: Net) -> dict[str, Convolution]:
    """Path of each convolution's kernel [... *size, i / groups, o] -> the convolution."""
    if net.graphdef is None:
        return {}
    module = nnx.merge(net.graphdef, net.shapes)
    found = {}
    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Conv):
            name = "/".join([*map(str, path), "kernel"])
            found[name] = Convolution(
                len(part.kernel_size), part.feature_group_count
            )
    return found


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
        lambda w: w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w,
        params,
    )


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def is_matrix(names: PartitionSpec) -> bool:
    """Whether a weight with these axis names has two dimensions or more, stacking axes apart."""
    return len([n for n in names if n not in STACKED]) >= 2


def decays(names: PartitionSpec) -> bool:
    """Whether weight decay acts on a weight with these logical axis names.

    It acts on matrices, among them token tables (which may be tied to the output's matrix), but not
    on tables of labels, positions or types, whose first axis is "index".
    """
    return is_matrix(names) and "index" not in names


def path_name(path) -> str:
    """ "a/b/c" of a key path."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
        for k in path
    )


def paths(tree: Params, is_leaf=None) -> dict[str, Any]:
    """Leaves under their "a/b/c" paths."""
    return {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    }


def listed(names: Iterable[str], most: int = 6) -> str:
    """The end of a message: the paths of a network's weights, of many the first `most`."""
    names = list(names)
    if not names:
        return "it has no weights"
    more = ", ..." if len(names) > most else ""
    return f"its weights are {', '.join(names[:most])}{more}"
