"""What the model families share: dense layers with named axes, norms, embeddings, attention,
stacked layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdistill.core.net import in_forward_mode, materialise
from jaxdistill.core.rows import project
from jaxdistill.core.sharding import constrain, mesh_in_use, rules_in_use
from jaxdistill.core.types import Array, Refused
from jaxdistill.core.types import lookup as lookup_name
from jaxdistill.models.attention import attention as attention

XAVIER = nnx.initializers.xavier_uniform()
LECUN = nnx.initializers.lecun_normal()
ZEROS = nnx.initializers.zeros_init()

REMAT: dict[str, Any] = {  # name in the config -> what the forward pass keeps for the backward pass
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def dense(
    i: int, o: int, names: tuple, *, rngs: nnx.Rngs, bias: bool = True, init=LECUN, dtype=None
) -> nnx.Linear:
    """A linear map whose kernel [i, o] carries two logical axis names; float32 weights, `dtype`
    arithmetic.
    """
    named = nnx.with_partitioning
    return nnx.Linear(
        i,
        o,
        use_bias=bias,
        rngs=rngs,
        dtype=dtype,
        dot_general=_project,
        kernel_init=named(init, names),
        bias_init=named(ZEROS, names[1:]),
    )


def _project(x: Array, kernel: Array, *_, **__) -> Array:
    """`project` where nnx calls for a dot_general: always over the last axis of x and the first of
    the kernel.
    """
    return project(x, kernel)


def rms_norm(dim: int, *, rngs: nnx.Rngs, eps: float = 1e-6, dtype=None) -> nnx.RMSNorm:
    """Root-mean-square norm over the last axis, statistics in float32."""
    ones = nnx.with_partitioning(nnx.initializers.ones_init(), (None,))
    return nnx.RMSNorm(dim, epsilon=eps, rngs=rngs, dtype=dtype, scale_init=ones)


def layer_norm(
    dim: int, *, rngs: nnx.Rngs, eps: float = 1e-5, bias: bool = True, dtype=None
) -> nnx.LayerNorm:
    """Layer norm over the last axis with a gain, and a bias unless told otherwise; statistics in
    float32.
    """
    named = nnx.with_partitioning
    ones = named(nnx.initializers.ones_init(), (None,))
    return nnx.LayerNorm(
        dim,
        epsilon=eps,
        use_fast_variance=False,
        use_bias=bias,
        rngs=rngs,
        dtype=dtype,
        scale_init=ones,
        bias_init=named(ZEROS, (None,)),
    )


def group_norm(
    dim: int, groups: int, *, rngs: nnx.Rngs, eps: float = 1e-5, dtype=None
) -> nnx.GroupNorm:
    """Group norm over the channels (last axis) of [B ... C] with gain and bias; statistics in
    float32.
    """
    named = nnx.with_partitioning
    ones = named(nnx.initializers.ones_init(), (None,))
    return nnx.GroupNorm(
        dim,
        num_groups=groups,
        epsilon=eps,
        rngs=rngs,
        dtype=dtype,
        scale_init=ones,
        bias_init=named(ZEROS, (None,)),
    )


def conv(
    i: int,
    o: int,
    size: Sequence[int],
    names: tuple = ("embed", "mlp"),
    *,
    rngs: nnx.Rngs,
    strides=1,
    padding: Any = "SAME",
    groups: int = 1,
    bias: bool = True,
    init=LECUN,
    dtype=None,
    kind: type = nnx.Conv,
) -> nnx.Conv:
    """A convolution over the spatial axes of [B ... C], kernel [*size, i / groups, o]; `names` are
    those of its last two axes.

    `padding` is "SAME", "VALID", or (low, high) of every spatial axis (PyTorch's padding p is [(p,
    p)] * len(size)); `kind` is nnx.Conv or a subclass.
    """
    named = nnx.with_partitioning
    lead = (None,) * len(size)
    return kind(
        i,
        o,
        tuple(size),
        strides,
        padding=padding,
        feature_group_count=groups,
        use_bias=bias,
        rngs=rngs,
        dtype=dtype,
        kernel_init=named(init, (*lead, *names)),
        bias_init=named(ZEROS, names[1:]),
    )


def plain_norm(x: Array, eps: float) -> Array:
    """Layer norm over the last axis without gain or bias, statistics in float32."""
    h = x.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    return (h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + eps)).astype(x.dtype)


def embedding(
    count: int, dim: int, *, rngs: nnx.Rngs, std: float = 0.02, names=("vocab", "embed")
) -> nnx.Param:
    """A table [count, dim] of N(0, std^2). Its first axis is "vocab" where tokens are looked up,
    "index" where anything else is (labels, positions, types): such a table stays whole there, and
    weight decay spares it.
    """
    return nnx.Embed(
        count,
        dim,
        rngs=rngs,
        embedding_init=nnx.with_partitioning(nnx.initializers.normal(std), names),
    )


def lookup(table: nnx.Embed, index: Array) -> Array:
    """Rows of the table. It is gathered over its second axis first: a gather from a table that is
    sharded on both makes XLA rematerialise it whole.
    """
    return jnp.take(constrain(table.embedding[...], "vocab", None), index, axis=0)


def fourier(t: Array, dim: int, *, max_period: float = 10000.0, shift: float = 1.0) -> Array:
    """Sinusoidal features [B, dim] of t [B]: cosines, then sines, of frequencies max_period^(-i /
    (dim/2 - shift)).
    """
    half = dim // 2
    freqs = jnp.exp(-jnp.log(max_period) * jnp.arange(half) / (half - shift))
    args = t.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(args), jnp.sin(args)], -1)


def rotate(x: Array, rotary: tuple[Array, Array]) -> Array:
    """Rotary positions on x [B T H K], rotary (cosines, sines) [B or 1, T, 1, K / 2]: channel i
    turns with channel i + K / 2 (transformers' convention). Float32 inside.
    """
    cos, sin = rotary
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def rotate_pairs(x: Array, rotary: tuple[Array, Array]) -> Array:
    """Rotary positions on x [B T H K] where channel 2i turns with channel 2i + 1 (RoFormer's and
    most video models').
    """
    cos, sin = rotary
    a, b = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), -1, 0)
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape).astype(x.dtype)


def split_heads(x: Array, heads: int) -> Array:
    """[B T H*K] -> [B T H K]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` layers as one module whose weights have a leading axis called `layers`."""
    named = nnx.transform_metadata(make, in_axes=0, out_axes=0, partition="layers")
    return nnx.vmap(named)(rngs.split(depth))


def scan_layers(
    body: Callable,
    x: Any,
    layers: Any,
    depth: int,
    *,
    remat: str = "none",
    taps: Sequence[int] = (),
):
    """Scans `body(x, layer) -> (x, y)` over stacked layers, rematerialised by the policy called
    `remat`.

    Returns (x, ys stacked, states after the layers listed in `taps`); a tap splits the scan,
    nothing else is stored. A short stack on one device is unrolled where it rematerialises nothing
    and the sequences of x [B T ..] are short: that saves writing what each layer keeps into a
    common array, but XLA keeps the scores of attention then.
    """
    policy = lookup_name(REMAT, remat, "remat")
    awake = lambda x, layer: body(x, materialise(layer))
    each = awake if policy is None else jax.checkpoint(awake, policy=policy, prevent_cse=False)
    bounds = sorted({0, depth, *(tap + 1 for tap in taps)})
    check_taps(taps, depth)
    after = {}
    ys = []
    rows, tokens = (*jax.tree.leaves(x)[0].shape, 1)[:2]
    walked = (
        policy is None and depth <= SHORT and rows * tokens**2 <= SCORES and mesh_in_use() is None
    )
    for low, high in zip(bounds, bounds[1:]):
        part = layers if (low, high) == (0, depth) else jax.tree.map(lambda w: w[low:high], layers)
        x, y = jax.lax.scan(each, x, part, unroll=high - low if walked else 1)
        after[high - 1] = x
        ys.append(y)
    ys = ys[0] if len(ys) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *ys)
    return x, ys, tuple(after[tap] for tap in taps)


def check_taps(taps: Sequence[int], depth: int, what: str = "taps") -> None:
    """Raises Refused where one of the layers called `what` is not among `depth`."""
    if any(not 0 <= tap < depth for tap in taps):
        raise Refused(f"{what}={tuple(taps)}: layers are numbered 0 to {depth - 1}")


# layers: up to so many have a store each, since a scan copies a layer's part out of a common one
SHORT = 8
SCORES = 2**19  # of a head, over the batch: 2 MiB in float32


def empty_stores(depth: int, zeros: Callable[..., Any]) -> tuple[Any, ...]:
    """What `scan_stores` fills: `zeros()` makes a layer's store, `zeros(n)` one of n layers, which
    share a program.
    """
    return tuple(zeros() for _ in range(depth)) if depth <= SHORT else (zeros(depth),)


def unstacked(layers: Any, depth: int) -> list[Any]:
    """Each layer's weights by themselves where `scan_stores` walks, for a cache to keep: sliced
    once, not for every token. Empty where it scans.
    """
    return (
        [jax.tree.map(lambda w: w[i], layers) for i in range(depth)] if 1 < depth <= SHORT else []
    )


def remember(store: tuple[Array, ...], i: Array, start: Array, parts: tuple[Array, ...]):
    """Layer i's new keys and values [B T G K] written into its store, [B G S K] or [layers B G S
    K], from slot `start` on: (the store, all that the layer holds [B S G K]). Slots are innermost
    but channels, as decoding reads them.
    """
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    common = store[0].ndim == 5
    at = ((i,) if common else ()) + (0, 0, start, 0)
    new = [heads_first(part)[None] if common else heads_first(part) for part in parts]
    store = tuple(jax.lax.dynamic_update_slice(old, part, at) for old, part in zip(store, new))
    return store, tuple(heads_first(kept[i] if common else kept) for kept in store)


def scan_stores(
    body: Callable,
    x: Any,
    layers: Any,
    stores: Sequence[Any],
    depth: int,
    *,
    remat: str = "none",
    taps: Sequence[int] = (),
):
    """`scan_layers` over layers that each keep something: body((x, store), (layer, i)) -> ((x,
    store), None), where layer i is number i of those that share `store`. Layers with a store each,
    stacked or `unstacked`, are walked, not scanned, and nothing is rematerialised.

    Returns (x, stores, states after the taps).
    """
    if len(stores) == 1:
        (x, store), _, states = scan_layers(
            body, (x, stores[0]), (layers, jnp.arange(depth)), depth, remat=remat, taps=taps
        )
        return x, (store,), tuple(state for state, _ in states)
    check_taps(taps, depth)
    kept = []
    after = []
    for i, (layer, store) in enumerate(
        zip(layers if isinstance(layers, list) else unstacked(layers, depth), stores)
    ):
        (x, store), _ = body((x, store), (materialise(layer), i))
        kept.append(store)
        after.append(x)
    return x, tuple(kept), tuple(after[tap] for tap in taps)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {  # transformers' names
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "gelu_fast": functools.partial(nnx.gelu, approximate=True),
    "gelu_new": functools.partial(nnx.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nnx.gelu, approximate=True),
    "quick_gelu": lambda x: x * nnx.sigmoid(1.702 * x),
    "relu": nnx.relu,
    "silu": nnx.silu,
}


def as_program(block: nnx.Module, remat: str) -> Callable:
    """`block` as a program of its own, rematerialised by the policy called `remat`: for layers that
    cannot be scanned.

    Blocks of one kind share it. It is traced and differentiated once for all of them, and for all
    calls of their networks: a U-Net has dozens of blocks, and a step may call three U-Nets five
    times. XLA sees what it would have seen.
    """
    lookup_name(REMAT, remat, "remat")
    graphdef, weights = nnx.split(block)
    return functools.partial(_program(graphdef, remat, rules_in_use(), in_forward_mode()), weights)


@functools.lru_cache(1024)
def _program(graphdef: nnx.GraphDef, remat: str, *_) -> Callable:
    """The rest is what a trace depends on besides its arguments."""
    call = lambda weights, *args: nnx.merge(graphdef, weights)(*args)
    return jax.jit(call if remat == "none" else jax.checkpoint(call, policy=REMAT[remat]))


def modulate(x: Array, shift: Array, scale: Array, eps: float) -> Array:
    """Layer norm without gain or bias, then scale and shift (each [B 1 or N, D]), in float32;
    returned in x's dtype.
    """
    return (plain_norm(x.astype(jnp.float32), eps) * (1 + scale) + shift).astype(x.dtype)


class Mapper(nnx.Module):
    """Linear, SiLU, linear, in float32: from the features of a time or a pooled condition [B i] to
    an embedding [B o].
    """

    def __init__(self, i: int, o: int, rngs: nnx.Rngs):
        self.linear_1 = dense(i, o, (None, "embed"), rngs=rngs)
        self.linear_2 = dense(o, o, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(nnx.silu(self.linear_1(x.astype(jnp.float32))))


class GatedConv(nnx.Module):
    """To 2 H channels, SiLU, depthwise 3x3 convolution, one half times SiLU of the other, back from
    H: on [B H W C] (SANA's GLUMBConv, arXiv:2410.10629).
    """

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs, init=LECUN, dtype=None):
        self.up = dense(
            dim, 2 * hidden, ("embed", "mlp"), rngs=rngs, init=init, dtype=dtype
        )  # values, then gates
        self.depth = conv(
            2 * hidden, 2 * hidden, (3, 3), (None, "mlp"), rngs=rngs, groups=2 * hidden, dtype=dtype
        )
        self.down = dense(
            hidden, dim, ("mlp", "embed"), rngs=rngs, bias=False, init=init, dtype=dtype
        )

    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(self.depth(nnx.silu(self.up(x))), 2, -1)
        return self.down(value * nnx.silu(gate))


def axial_waves(
    positions: Sequence[np.ndarray], dims: Sequence[int], *, theta: float = 10000.0
) -> tuple[Array, Array]:
    """Waves of `rotate_pairs` for a grid, the first axis outermost: axis i turns dims[i] channels
    of a head by positions[i].

    Returns (cosines, sines) [1, N, 1, sum(dims) / 2], N the product of the axes' lengths. The
    angles are float64 and made on the host, one small table for each axis; the program broadcasts
    them.
    """
    grid = tuple(len(p) for p in positions)
    angles = [np.outer(p, theta ** -(np.arange(0, d, 2) / d)) for p, d in zip(positions, dims)]

    def spread(axis: int, table: np.ndarray) -> Array:
        shape = [len(table) if i == axis else 1 for i in range(len(grid))]
        return jnp.broadcast_to(
            jnp.asarray(table, jnp.float32).reshape(*shape, -1), (*grid, table.shape[1])
        )

    wave = lambda f: jnp.concatenate([spread(i, f(a)) for i, a in enumerate(angles)], -1).reshape(
        1, -1, 1, sum(dims) // 2
    )
    return wave(np.cos), wave(np.sin)


def sincos_2d(dim: int, rows: int, cols: int, base: float) -> Array:
    """Fixed position table [rows * cols, dim]: first half of the channels for columns, second half
    for rows, each 0 to `base`.

    Put together inside the program: at 32 k tokens a constant would take gigabytes of it.
    """
    freqs = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    wave = lambda n: np.outer(np.arange(n) * base / n, freqs)
    one = lambda n: jnp.asarray(np.concatenate([np.sin(wave(n)), np.cos(wave(n))], 1), jnp.float32)
    spread = lambda table, axis: jnp.broadcast_to(
        jnp.expand_dims(table, axis), (rows, cols, dim // 2)
    )
    return jnp.concatenate([spread(one(cols), 0), spread(one(rows), 1)], -1).reshape(
        rows * cols, dim
    )
