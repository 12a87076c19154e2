"""From logical axis names to mesh axes. The only file that knows the device mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from contextvars import ContextVar

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdistill.core.net import is_matrix, is_spec
from jaxdistill.core.parts import like
from jaxdistill.core.types import Refused, State, nearest

AXES = ("data", "fsdp", "sequence", "tensor")
Axes = str | tuple[str, ...]  # one mesh axis, several, or none ("")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Number of devices along each mesh axis; one of them may be -1, for all remaining devices."""

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Logical axis -> mesh axes.

    The default is FSDP on `embed`, also over the devices of the sequence axis, and tensor
    parallelism on `mlp`, `heads` and `vocab`.
    """

    batch: Axes = ("data", "fsdp")
    seq: Axes = "sequence"  # tokens of activations; keys and values are gathered for attention
    embed: Axes = ("fsdp", "sequence")
    mlp: Axes = "tensor"
    heads: Axes = "tensor"
    vocab: Axes = "tensor"
    layers: Axes = ""
    bank: Axes = ""  # members of a bank of networks (core/bank.py)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for axis in value if isinstance(value, (tuple, list)) else (value,):
                if axis and axis not in AXES:
                    raise Refused(
                        f"rules.{field.name}={axis!r}: no mesh axis{nearest(axis, AXES)}"
                    )

    # Rows of small lookup tables (labels, positions): always replicated.
    index = ""

    def spec(self, names) -> P:
        """The PartitionSpec of an array with these logical axis names; None is replicated."""
        return P(
            *[
                None if name is None else (getattr(self, name) or None)
                for name in names
            ]
        )


_RULES: ContextVar[Rules] = ContextVar("rules", default=Rules())


def shape_of(shape: MeshShape) -> list[int]:
    """The sizes in the order of AXES."""
    return [getattr(shape, axis) for axis in AXES]


def make_mesh(shape: MeshShape = MeshShape(), devices=None) -> Mesh:
    """A mesh over all devices, or over the given ones.

    In a single process a smaller shape takes the first devices. Raises Refused where there are too
    few devices, or where -1 leaves a remainder.
    """
    devices = jax.devices() if devices is None else devices
    sizes = shape_of(shape)
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise Refused(
            f"mesh={dict(zip(AXES, sizes))}: axes are positive, and at most one is -1"
        )
    known = math.prod(s for s in sizes if s != -1)
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    needed = math.prod(sizes)
    all_needed = -1 in shape_of(shape) or jax.process_count() > 1
    too_few = needed < len(devices) and all_needed
    if needed > len(devices) or needed == 0 or too_few:
        given = dict(zip(AXES, shape_of(shape)))
        raise Refused(
            f"mesh={given} does not fit the {len(devices)} devices there are"
        )
    devices = devices[:needed]
    return Mesh(
        np.asarray(devices).reshape(sizes),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = Rules()):
    """Context in which `constrain`, and every program that is built, use `mesh` and `rules`.

    Of devices that exist only as a description (a TPU slice to compile for) the shape of the mesh
    is used; nothing can run on it.
    """
    token = _RULES.set(rules)
    here = mesh.devices.flat[0].platform == jax.default_backend()
    try:
        with (
            jax.set_mesh(mesh)
            if here
            else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
        ):
            yield
    finally:
        _RULES.reset(token)


def rules_in_use() -> Rules:
    """The rules of the innermost `use`."""
    return _RULES.get()


def mesh_in_use():
    """The mesh of the innermost `use`; None without one, or where it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x, *names):
    """The activation `x` with the sharding of these logical axis names; `x` without a mesh.

    Mesh axes that do not divide their dimension are left out.
    """
    if (mesh := mesh_in_use()) is None:
        return x
    return jax.lax.with_sharding_constraint(
        x, _divides(mesh, rules_in_use().spec(names), x.shape)
    )


def per_shard(
    fn, inputs: tuple[tuple, ...], output: tuple, arrays: tuple, *, tile: int = 1
):
    """`fn` run by each device on its own shards, for kernels that the compiler cannot partition.

    Returns None where a mesh axis does not divide its dimension, or where a device's part of a
    sequence is no multiple of `tile`. Without a mesh this is `fn`.

    Args:
      inputs, output: logical axis names of every dimension.
    """
    if (mesh := mesh_in_use()) is None:
        return fn
    specs = [rules_in_use().spec(names) for names in inputs]
    for names, spec, x in zip(inputs, specs, arrays):
        if _divides(mesh, spec, x.shape) != spec:
            return None
        if "seq" in names:
            axis = names.index("seq")
            length = x.shape[axis] // _ways(mesh, spec[axis])
            if length % tile:
                return None
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=rules_in_use().spec(output),
        check_vma=False,
    )


def _ways(mesh, axis) -> int:
    """Number of shards along one dimension."""
    if axis is None:
        return 1
    axes = (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[a] for a in axes)


def _divides(mesh, spec: P, shape: tuple[int, ...]) -> P:
    """`spec` without the mesh axes that do not divide their dimension.

    A table of 10 classes over 4 devices stays replicated, say. Of several axes on one dimension the
    last ones are left out first.
    """

    def most(size: int, axis):
        while axis and size % _ways(mesh, axis):
            axis = axis[:-1] if isinstance(axis, tuple) else None
        return axis or None

    return P(*(most(shape[i], axis) for i, axis in enumerate(spec)))


def batch_sharding(mesh: Mesh, rules: Rules = Rules()) -> NamedSharding:
    """Samples split over the batch axes; no other dimension is split."""
    return NamedSharding(mesh, rules.spec(("batch",)))


def put_batch(mesh: Mesh, rules: Rules = Rules()):
    """A function from this process's samples of a batch (numpy) to global arrays on the mesh."""
    where = batch_sharding(mesh, rules)
    return lambda batch: jax.tree.map(
        lambda v: jax.make_array_from_process_local_data(where, v), batch
    )


def local_samples(batch: dict) -> dict:
    """This process's samples of global arrays that are sharded along their first axis, as numpy."""

    def samples(x: jax.Array) -> np.ndarray:
        shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
        return np.concatenate(
            [np.asarray(shards[start]) for start in sorted(shards)]
        )

    return jax.tree.map(samples, batch)


def as_first_process(values: Sequence[bool]) -> list[bool]:
    """What the first process found, on all of them, so that they take the same way.

    Files of another process may be seen later than they were written.
    """
    if jax.process_count() == 1:
        return list(values)
    found = multihost_utils.broadcast_one_to_all(np.array(values, bool))
    return [bool(value) for value in found]


def gathered(tree):
    """Arrays of any sharding as numpy, complete on every process."""

    def fetch(x):
        if (
            not isinstance(x, jax.Array)
            or x.is_fully_addressable
            or x.is_fully_replicated
        ):
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


def check_batch(mesh: Mesh, rules: Rules, size: int, accumulate: int = 1) -> None:
    """Raises Refused unless `size` samples divide over micro-batches and the mesh's batch axes."""
    ways = math.prod(mesh.shape[a] for a in rules.batch)
    if size % (ways * accumulate):
        axes = "x".join(rules.batch)
        raise Refused(
            f"data.batch_size={size} is not divisible by"
            f" {ways} (mesh {axes}) x {accumulate} (accumulate)"
        )


def param_shardings(mesh: Mesh, rules: Rules, axes):
    """The shardings of a network's weights, as a tree like them."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, rules.spec(names)), axes, is_leaf=is_spec
    )


def fits(shardings, shapes):
    """The shardings without the mesh axes that do not divide their dimension."""
    return jax.tree.map(
        lambda s, shape: NamedSharding(
            s.mesh, _divides(s.mesh, s.spec, shape.shape)
        ),
        shardings,
        shapes,
    )


def in_memory(place: str, shardings, axes):
    """The shardings with matrices in the memory of `place` ("device" or "host").

    Vectors stay in device memory.
    """
    if place == "device":
        return shardings
    return jax.tree.map(
        lambda s, names: (
            s.with_memory_kind("pinned_host") if is_matrix(names) else s
        ),
        shardings,
        axes,
    )


def state_shardings(
    mesh: Mesh,
    rules: dict[str, Rules],
    nets,
    txs,
    abstract: State,
    places: dict[str, str] = {},
) -> State:
    """The shardings of a state, as a tree like it; optimiser moments have those of their weights.

    A moment whose axes are those of its weight, but some of size 1, is not split over these.
    `places` says in which memory the weights of frozen roles stay.
    """
    replicated = NamedSharding(mesh, P())

    def role(name: str, shapes):
        axes = like(nets[name].axes, shapes)
        return fits(param_shardings(mesh, rules[name], axes), shapes)

    def opt(name: str):
        return optax.tree.map_params(
            txs[name],
            lambda moment, sharding: fits(sharding, moment),
            abstract.opt[name],
            role(name, abstract.params[name]),
            transform_non_params=lambda _: replicated,
        )

    return State(
        step=replicated,
        count=jax.tree.map(lambda _: replicated, abstract.count),
        params={r: role(r, p) for r, p in abstract.params.items()},
        opt={r: opt(r) for r in abstract.opt},
        ema={r: role(r, p) for r, p in abstract.ema.items()},
        frozen={
            r: in_memory(places.get(r, "device"), role(r, p), nets[r].axes)
            for r, p in abstract.frozen.items()
        },
        memory=jax.tree.map(lambda _: replicated, abstract.memory),
        rest={r: role(r, p) for r, p in abstract.rest.items()},
        statistics={r: role(r, p) for r, p in abstract.statistics.items()},
    )
