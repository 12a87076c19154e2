"""Logical axis names -> mesh axes. The only file that knows the mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from contextvars import ContextVar

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdistill.core.net import is_matrix, is_spec
from jaxdistill.core.types import Refused, State, nearest

AXES = ("data", "fsdp", "sequence", "tensor")
Axes = str | tuple[str, ...]  # a mesh axis, several, or "": none


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each mesh axis; -1 (at most once) takes what is left."""

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Logical axis -> mesh axis. Default: FSDP on `embed`, over the devices that share a sample's
    tokens too; tensor parallel on `mlp`, `heads`, `vocab`.
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
                    raise Refused(f"rules.{field.name}={axis!r}: no mesh axis{nearest(axis, AXES)}")

    # rows of small tables that are looked up (labels, positions); a constant: they stay whole
    index = ""

    def spec(self, names) -> P:
        """The PartitionSpec of an array whose dimensions have these logical names (None:
        replicated).
        """
        return P(*[None if n is None else (getattr(self, n) or None) for n in names])


_RULES: ContextVar[Rules] = ContextVar("rules", default=Rules())


def shape_of(shape: MeshShape) -> list[int]:
    return [getattr(shape, axis) for axis in AXES]


def make_mesh(shape: MeshShape = MeshShape(), devices=None) -> Mesh:
    """A mesh over all devices, or the given ones; a smaller shape takes the first of them, in a
    single process.

    Raises Refused where there are too few, or where -1 leaves some over.
    """
    devices = jax.devices() if devices is None else devices
    sizes = shape_of(shape)
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise Refused(f"mesh={dict(zip(AXES, sizes))}: axes are positive, and at most one is -1")
    known = math.prod(s for s in sizes if s != -1)
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    needed = math.prod(sizes)
    if (
        needed > len(devices)
        or not needed
        or (needed < len(devices) and (-1 in shape_of(shape) or jax.process_count() > 1))
    ):
        raise Refused(
            f"mesh={dict(zip(AXES, shape_of(shape)))} does not fit the {len(devices)} devices there are"
        )
    devices = devices[:needed]
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = Rules()):
    """Makes `mesh` and `rules` those of `constrain` and of every program built inside.

    A mesh of devices that are only described (a TPU slice to compile for) enters by its shape:
    nothing can run on it.
    """
    token = _RULES.set(rules)
    here = mesh.devices.flat[0].platform == jax.default_backend()
    try:
        with jax.set_mesh(mesh) if here else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _RULES.reset(token)


def rules_in_use() -> Rules:
    """Those of `constrain`."""
    return _RULES.get()


def mesh_in_use():
    """The mesh that programs built here are split over; None where they are for one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x, *names):
    """Pins an activation's layout by logical names; a no-op outside `use(mesh)`, so that models run
    anywhere.

    An axis that does not divide its dimension is left out.
    """
    if (mesh := mesh_in_use()) is None:
        return x
    return jax.lax.with_sharding_constraint(x, _divides(mesh, rules_in_use().spec(names), x.shape))


def per_shard(fn, inputs: tuple[tuple, ...], output: tuple, arrays: tuple, *, tile: int = 1):
    """`fn` as a program of each device on its own shards, for kernels that the compiler cannot
    split; None where a named axis does not divide its dimension, or leaves a sequence that is no
    multiple of `tile`.

    `inputs` and `output` are logical names of every dimension. Without a mesh it is `fn` itself.
    """
    if (mesh := mesh_in_use()) is None:
        return fn
    specs = [rules_in_use().spec(names) for names in inputs]
    for names, spec, x in zip(inputs, specs, arrays):
        if _divides(mesh, spec, x.shape) != spec:
            return None
        if (
            "seq" in names
            and x.shape[names.index("seq")] // _ways(mesh, spec[names.index("seq")]) % tile
        ):
            return None
    return jax.shard_map(
        fn, mesh=mesh, in_specs=tuple(specs), out_specs=rules_in_use().spec(output), check_vma=False
    )


def _ways(mesh, axis) -> int:
    return (
        1
        if axis is None
        else math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis))
    )


def _divides(mesh, spec: P, shape: tuple[int, ...]) -> P:
    """`spec` without the mesh axes that do not divide their dimension (a 10-class table over 4
    devices stays whole); of several for one dimension the last go first.
    """

    def most(size: int, axis):
        while axis and size % _ways(mesh, axis):
            axis = axis[:-1] if isinstance(axis, tuple) else None
        return axis or None

    return P(*(most(shape[i], axis) for i, axis in enumerate(spec)))


def batch_sharding(mesh: Mesh, rules: Rules = Rules()) -> NamedSharding:
    """Samples over the batch axes, every other dimension whole."""
    return NamedSharding(mesh, rules.spec(("batch",)))


def put_batch(mesh: Mesh, rules: Rules = Rules()):
    """A function from this process's rows of a batch (numpy) to global arrays on the mesh."""
    where = batch_sharding(mesh, rules)
    return lambda batch: jax.tree.map(
        lambda v: jax.make_array_from_process_local_data(where, v), batch
    )


def local_rows(batch: dict) -> dict:
    """This process's rows of global arrays that are sharded along their first axis, as numpy."""

    def rows(x) -> np.ndarray:
        shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(rows, batch)


def whole(tree):
    """Arrays of any sharding as numpy, on every process alike: what is spread over processes is
    gathered.
    """
    local = lambda x: x.is_fully_addressable or x.is_fully_replicated
    fetch = lambda x: (
        np.asarray(x)
        if not isinstance(x, jax.Array) or local(x)
        else multihost_utils.process_allgather(x, tiled=True)
    )
    return jax.tree.map(fetch, tree)


def check_batch(mesh: Mesh, rules: Rules, size: int, accumulate: int = 1) -> None:
    """Raises Refused unless `size` samples split over micro-batches, the mesh's batch axes and the
    processes.
    """
    ways = math.prod(mesh.shape[a] for a in rules.batch)
    if size % (ways * accumulate):
        raise Refused(
            f"data.batch_size={size} is not divisible by {ways} (mesh {'x'.join(rules.batch)}) x {accumulate} (accumulate)"
        )


def param_shardings(mesh: Mesh, rules: Rules, axes):
    """Tree of NamedSharding with the structure of a net's params."""
    return jax.tree.map(lambda names: NamedSharding(mesh, rules.spec(names)), axes, is_leaf=is_spec)


def fits(shardings, shapes):
    """Drops the mesh axes that do not divide their dimension."""
    return jax.tree.map(
        lambda s, shape: NamedSharding(s.mesh, _divides(s.mesh, s.spec, shape.shape)),
        shardings,
        shapes,
    )


def resting_in(place: str, shardings, axes):
    """The same shardings, those of matrices in the memory called `place` ("device" | "host");
    vectors stay on the device.
    """
    if place == "device":
        return shardings
    return jax.tree.map(
        lambda s, names: s.with_memory_kind("pinned_host") if is_matrix(names) else s,
        shardings,
        axes,
    )


def state_shardings(
    mesh: Mesh, rules: dict[str, Rules], nets, txs, abstract: State, places: dict[str, str] = {}
) -> State:
    """Tree of NamedSharding with the structure of the state; optimiser moments follow their
    weights. `places` of frozen roles.
    """
    whole = NamedSharding(mesh, P())

    def role(name: str, shapes):
        return fits(param_shardings(mesh, rules[name], nets[name].axes), shapes)

    def opt(name: str):
        follow = lambda _, sharding: sharding
        return optax.tree.map_params(
            txs[name],
            follow,
            abstract.opt[name],
            role(name, abstract.params[name]),
            transform_non_params=lambda _: whole,
        )

    return State(
        step=whole,
        count=jax.tree.map(lambda _: whole, abstract.count),
        params={r: role(r, p) for r, p in abstract.params.items()},
        opt={r: opt(r) for r in abstract.opt},
        ema={r: role(r, p) for r, p in abstract.ema.items()},
        frozen={
            r: resting_in(places.get(r, "device"), role(r, p), nets[r].axes)
            for r, p in abstract.frozen.items()
        },
        memory=jax.tree.map(lambda _: whole, abstract.memory),
    )
