"""What the model families share: layers with named axes, norms, embeddings, positions, stacks.

The *store* of a layer is its cache of keys and values for decoding. Shapes of stores: B samples,
G key/value heads, S slots (the most tokens that the store can hold), K channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Bool, Float, Int, Integer, Num, Shaped

from jaxdistill.core.net import in_forward_mode, materialise
from jaxdistill.core.rows import project
from jaxdistill.core.sharding import constrain, mesh_in_use, rules_in_use
from jaxdistill.core.types import Array, Refused
from jaxdistill.core.types import lookup as lookup_name
from jaxdistill.models.attention import attention as attention

XAVIER = nnx.initializers.xavier_uniform()
LECUN = nnx.initializers.lecun_normal()
ZEROS = nnx.initializers.zeros_init()

# name in a config -> what the forward pass keeps for the backward pass
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def dense(
    i: int,
    o: int,
    names: tuple,
    *,
    rngs: nnx.Rngs,
    bias: bool = True,
    init=LECUN,
    dtype=None,
) -> nnx.Linear:
    """A linear map whose kernel [i, o] has two logical axis names.

    The names are for sharding; core/sharding.py, Rules, lists those that are sharded. Weights are
    float32; `dtype` is that of the arithmetic.
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
    """core.rows.project with the signature of a dot_general, for nnx.Linear.

    The dimension numbers and the precision that nnx passes are ignored: nnx.Linear always contracts
    the last axis of x with the first axis of the kernel.
    """
    return project(x, kernel)


def rms_norm(
    dim: int, *, rngs: nnx.Rngs, eps: float = 1e-6, dtype=None
) -> nnx.RMSNorm:
    """Root-mean-square norm over the last axis, statistics in float32."""
    ones = nnx.with_partitioning(nnx.initializers.ones_init(), (None,))
    return nnx.RMSNorm(dim, epsilon=eps, rngs=rngs, dtype=dtype, scale_init=ones)


def layer_norm(
    dim: int, *, rngs: nnx.Rngs, eps: float = 1e-5, bias: bool = True, dtype=None
) -> nnx.LayerNorm:
    """Layer norm over the last axis with a gain, and with a bias if `bias` is set.

    Statistics are float32.
    """
    named = nnx.with_partitioning
    return nnx.LayerNorm(
        dim,
        epsilon=eps,
        use_fast_variance=False,
        use_bias=bias,
        rngs=rngs,
        dtype=dtype,
        scale_init=named(nnx.initializers.ones_init(), (None,)),
        bias_init=named(ZEROS, (None,)),
    )


def group_norm(
    dim: int, groups: int, *, rngs: nnx.Rngs, eps: float = 1e-5, dtype=None
) -> nnx.GroupNorm:
    """Group norm over the channels of [B ... C] with gain and bias, statistics in float32."""
    named = nnx.with_partitioning
    return nnx.GroupNorm(
        dim,
        num_groups=groups,
        epsilon=eps,
        rngs=rngs,
        dtype=dtype,
        scale_init=named(nnx.initializers.ones_init(), (None,)),
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
    """A convolution over the spatial axes of [B ... C] with kernel [*size, i / groups, o].

    Args:
        i: channels of the input.
        o: channels of the output.
        size: of the kernel along each spatial axis.
        names: logical names of the kernel's last two axes.
        padding: "SAME", "VALID", or (low, high) of every spatial axis. PyTorch's padding p is
          [(p, p)] * len(size).
        kind: nnx.Conv or a subclass.
    """
    named = nnx.with_partitioning
    spatial = (None,) * len(size)
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
        kernel_init=named(init, (*spatial, *names)),
        bias_init=named(ZEROS, names[1:]),
    )


def plain_norm(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """Layer norm over the last axis without gain or bias, statistics in float32."""
    h = x.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    variance = jnp.mean(h**2, -1, keepdims=True)
    return (h * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def embedding(
    count: int,
    dim: int,
    *,
    rngs: nnx.Rngs,
    std: float = 0.02,
    names=("vocab", "embed"),
) -> nnx.Embed:
    """A table [count, dim] of N(0, std^2).

    Its first axis is named "vocab" if tokens are looked up in it, and "index" for anything else
    (labels, positions, token types). A table of the latter kind is replicated along that axis, and
    it is not decayed.
    """
    init = nnx.with_partitioning(nnx.initializers.normal(std), names)
    return nnx.Embed(count, dim, rngs=rngs, embedding_init=init)


def lookup(table: nnx.Embed, index: Integer[Array, "*B"]) -> Float[Array, "*B D"]:
    """Rows of the table.

    The second axis is all-gathered first, because otherwise XLA replicates the complete table for
    a look-up if the table is sharded along both axes.
    """
    return jnp.take(constrain(table.embedding[...], "vocab", None), index, axis=0)


def fourier(
    t: Num[Array, " B"], dim: int, *, max_period: float = 10000.0, shift: float = 1.0
) -> Float[Array, "B D"]:
    """Sinusoidal features of a time: `dim` / 2 cosines, then as many sines.

    The frequencies are max_period^(-i / (dim/2 - shift)).
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half) / (half - shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


# cosines, sines [.. T 1 K/2]
Rotary = tuple[Float[Array, "... _ 1 _"], Float[Array, "... _ 1 _"]]


def rotate(x: Float[Array, "B T H K"], rotary: Rotary) -> Float[Array, "B T H K"]:
    """Rotary positions, channel i with channel i + K / 2 (transformers' convention), in float32."""
    cos, sin = rotary
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return rotated.astype(x.dtype)


def rotate_pairs(
    x: Float[Array, "B T H K"], rotary: Rotary
) -> Float[Array, "B T H K"]:
    """Rotary positions, channel 2i with channel 2i + 1 (RoFormer's and most video models')."""
    cos, sin = rotary
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = jnp.moveaxis(pairs, -1, 0)
    rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return rotated.reshape(x.shape).astype(x.dtype)


def split_heads(x: Float[Array, "*B D"], heads: int) -> Float[Array, "*B {heads} K"]:
    """The channels cut into `heads` heads of K = D / `heads` channels."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:-2], -1)


def add_gated(
    x: Float[Array, "B N D"],
    branch: Float[Array, "B N D"],
    gate: Float[Array, "#B #N D"],
) -> Float[Array, "B N D"]:
    """x + gate * branch, returned in x's dtype.

    The product is computed in the dtype to which `gate` and `branch` promote, the sum in float32.
    """
    return (x.astype(jnp.float32) + branch * gate).astype(x.dtype)


def patchify(x: Float[Array, "B H W C"], patch: int) -> Float[Array, "B N D"]:
    """Squares of `patch` x `patch` pixels as tokens, row by row.

    A token's channels are ordered (row, column, channel), the last one fastest.
    """
    return rearrange(x, "b (i p) (j q) c -> b (i j) (p q c)", p=patch, q=patch)


def unpatchify(
    tokens: Float[Array, "B N D"], rows: int, patch: int
) -> Float[Array, "B {rows*patch} W C"]:
    """The inverse of `patchify` for a picture of `rows` patches from top to bottom."""
    return rearrange(
        tokens, "b (i j) (p q c) -> b (i p) (j q) c", i=rows, p=patch, q=patch
    )


def key_mask(mask: Shaped[Array, "B S"] | None) -> Bool[Array, "B 1 1 S"] | None:
    """A padding mask (True on tokens) as `attention` takes it, shared by all heads and queries."""
    return None if mask is None else mask[:, None, None, :].astype(bool)


def stack(
    make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs
) -> nnx.Module:
    """`depth` layers as one module whose weights have a leading axis called `layers`."""
    named = nnx.transform_metadata(make, in_axes=0, out_axes=0, partition="layers")
    return nnx.vmap(named)(rngs.split(depth))


# Stacks of up to so many layers are unrolled and have one store per layer. A scan would copy each
# layer's part out of a common array and back.
SHORT = 8
# A stack is unrolled only while samples * T^2 is at most this: the attention scores of one head
# over the batch, 2 MiB in float32.
SCORES = 2**19


def scan_layers(
    body: Callable,
    x: Any,
    layers: Any,
    depth: int,
    *,
    remat: str = "none",
    taps: Sequence[int] = (),
) -> tuple[Any, Any, tuple]:
    """Scans `body(x, layer) -> (x, y)` over stacked layers, rematerialised by the policy `remat`.

    The scan is split after each tap, so that x is kept only at the taps. A short stack on one
    device is unrolled if it rematerialises nothing and the sequences of x [B T ..] are short. Then
    the residuals of each layer for the backward pass need not be written into a common array, but
    XLA keeps the attention scores among them.

    Returns:
        x after the last layer; the y of all layers, stacked; x after each layer of `taps`.
    """
    policy = lookup_name(REMAT, remat, "remat")
    check_taps(taps, depth)

    def apply_layer(x, layer):
        return body(x, materialise(layer))

    if policy is not None:
        apply_layer = jax.checkpoint(apply_layer, policy=policy, prevent_cse=False)
    unrolled = (
        policy is None and depth <= SHORT and _few_scores(x) and mesh_in_use() is None
    )
    bounds = sorted({0, depth, *(tap + 1 for tap in taps)})
    features = {}
    ys = []
    for low, high in zip(bounds, bounds[1:]):
        part = layers
        if (low, high) != (0, depth):
            part = jax.tree.map(lambda w: w[low:high], layers)
        x, y = jax.lax.scan(
            apply_layer, x, part, unroll=high - low if unrolled else 1
        )
        features[high - 1] = x
        ys.append(y)
    if len(ys) == 1:
        stacked = ys[0]
    else:
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *ys)
    return x, stacked, tuple(features[tap] for tap in taps)


def _few_scores(x: Any) -> bool:
    """Whether self-attention over x [B T ..] has at most SCORES scores per head, over the batch."""
    # x may have the batch axis alone; it then counts as one token per sample.
    batch, tokens = (*jax.tree.leaves(x)[0].shape, 1)[:2]
    return batch * tokens**2 <= SCORES


def check_taps(taps: Sequence[int], depth: int, what: str = "taps") -> None:
    """Checks that every number in `taps` is a layer, 0 to `depth` - 1.

    Args:
        taps: indices of layers.
        depth: number of layers.
        what: the name of the option in the message.

    Raises:
        Refused: a number in `taps` is negative or not below `depth`.
    """
    if any(not 0 <= tap < depth for tap in taps):
        raise Refused(f"{what}={tuple(taps)}: layers are numbered 0 to {depth - 1}")


def empty_stores(depth: int, zeros: Callable[..., Any]) -> tuple[Any, ...]:
    """The stores that `scan_stores` fills: one per layer in a short stack, else one for all layers.

    `zeros()` makes the store of a layer, `zeros(n)` that of n layers.
    """
    if depth <= SHORT:
        return tuple(zeros() for _ in range(depth))
    return (zeros(depth),)


def unstacked(layers: Any, depth: int) -> list[Any]:
    """Each layer's weights by themselves if `scan_stores` is a loop.

    Empty if it is a scan: then the weights stay stacked. A decoding cache keeps this list, so that
    the weights are sliced once and not for every token.
    """
    # A single layer has one store, without a layer axis, and `scan_stores` runs it as a scan.
    if not 1 < depth <= SHORT:
        return []
    return [jax.tree.map(lambda w: w[i], layers) for i in range(depth)]


def append_to_store(
    store: tuple[Float[Array, "*layers B G S K"], ...],
    i: Int[Array, ""] | int,
    start: Int[Array, ""] | int,
    parts: tuple[Float[Array, "B T G K"], ...],
) -> tuple[
    tuple[Float[Array, "*layers B G S K"], ...], tuple[Float[Array, "B S G K"], ...]
]:
    """Writes new keys and values of layer i into its store, from slot `start` on.

    Slots are the next to last axis, the order in which decoding reads them.

    Args:
        store: the layer's own, or one that layers share.
        i: the layer's index in a shared store; not used if the store is the layer's own.
        start: the slot of the first new token.
        parts: the new keys and values.

    Returns:
        The store, and all keys and values of the layer in it.
    """
    shared = store[0].ndim == 5
    offsets = (0, 0, start, 0)
    if shared:
        offsets = (i, *offsets)
    written = []
    complete = []
    for old, part in zip(store, parts):
        new = jnp.swapaxes(part, 1, 2)
        kept = jax.lax.dynamic_update_slice(
            old, new[None] if shared else new, offsets
        )
        written.append(kept)
        complete.append(jnp.swapaxes(kept[i] if shared else kept, 1, 2))
    return tuple(written), tuple(complete)


def scan_stores(
    body: Callable,
    x: Any,
    layers: Any,
    stores: Sequence[Any],
    depth: int,
    *,
    remat: str = "none",
    taps: Sequence[int] = (),
) -> tuple[Any, tuple, tuple]:
    """`scan_layers` over layers that each keep a store.

    If each of several layers has its own store, they run as an unrolled loop, not as a scan, and
    nothing is rematerialised.

    Args:
        body: ((x, store), (layer, i)) -> ((x, store), None), where i is the layer's index in the
          stack, the one that `append_to_store` takes.
        x: the input of the first layer.
        layers: stacked, or the list of `unstacked`.
        stores: those of `empty_stores`.
        depth: number of layers.
        remat: as in `scan_layers`.
        taps: as in `scan_layers`.

    Returns:
        x after the last layer, the stores, x after each layer of `taps`.
    """
    if len(stores) == 1:
        numbered = (layers, jnp.arange(depth))
        carry = (x, stores[0])
        carry, _, tapped = scan_layers(
            body, carry, numbered, depth, remat=remat, taps=taps
        )
        return carry[0], (carry[1],), tuple(x for x, _ in tapped)
    check_taps(taps, depth)
    if not isinstance(layers, list):
        layers = unstacked(layers, depth)
    kept = []
    features = []
    for i, (layer, store) in enumerate(zip(layers, stores)):
        (x, store), _ = body((x, store), (materialise(layer), i))
        kept.append(store)
        features.append(x)
    return x, tuple(kept), tuple(features[tap] for tap in taps)


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
    """`block` as a jitted program, rematerialised by the policy `remat`.

    This is for networks whose layers differ, so that they cannot be stacked and scanned. Blocks of
    the same structure share the program: it is traced and differentiated once for all of them, and
    for all calls of their networks. A U-Net has dozens of blocks, and a step may call three U-Nets
    five times. The compiled step is the same as without this function.
    """
    lookup_name(REMAT, remat, "remat")
    graphdef, weights = nnx.split(block)
    program = _program(graphdef, remat, rules_in_use(), in_forward_mode())
    return functools.partial(program, weights)


@functools.lru_cache(1024)
def _program(graphdef: nnx.GraphDef, remat: str, *_) -> Callable:
    """The program of all blocks with this graph.

    The other arguments (sharding rules, `in_forward_mode()`) are not read: they are part of the
    cache key, because a trace depends on them.
    """

    def call(weights, *args):
        return nnx.merge(graphdef, weights)(*args)

    return jax.jit(
        call if remat == "none" else jax.checkpoint(call, policy=REMAT[remat])
    )


def modulate(
    x: Float[Array, "B N D"],
    shift: Float[Array, "#B #N D"],
    scale: Float[Array, "#B #N D"],
    eps: float,
) -> Float[Array, "B N D"]:
    """Layer norm without gain or bias, then scale and shift: in float32, returned in x's dtype."""
    normed = plain_norm(x.astype(jnp.float32), eps)
    return (normed * (1 + scale) + shift).astype(x.dtype)


class EmbeddingMLP(nnx.Module):
    """Linear, SiLU, linear, in float32: an embedding of a time's features or a pooled condition."""

    def __init__(self, i: int, o: int, rngs: nnx.Rngs):
        self.linear_1 = dense(i, o, (None, "embed"), rngs=rngs)
        self.linear_2 = dense(o, o, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B D"]:
        return self.linear_2(nnx.silu(self.linear_1(x.astype(jnp.float32))))


class GatedConv(nnx.Module):
    """The MLP of SANA, GLUMBConv: a gated linear unit behind a depthwise 3x3 convolution.

    A linear map to 2 * `hidden` channels, SiLU and the depthwise convolution; then the first half
    of the channels times SiLU of the second half; then a linear map from `hidden` channels back.

    Source: arXiv:2410.10629.
    """

    def __init__(
        self, dim: int, hidden: int, *, rngs: nnx.Rngs, init=LECUN, dtype=None
    ):
        make = functools.partial(dense, rngs=rngs, init=init, dtype=dtype)
        wide = 2 * hidden  # values, then gates
        self.up = make(dim, wide, ("embed", "mlp"))
        # the depthwise convolution; the attribute's name is a path of weights
        self.depth = conv(
            wide, wide, (3, 3), (None, "mlp"), rngs=rngs, groups=wide, dtype=dtype
        )
        self.down = make(hidden, dim, ("mlp", "embed"), bias=False)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        h = self.depth(nnx.silu(self.up(x)))
        value, gate = jnp.split(h, 2, -1)
        return self.down(value * nnx.silu(gate))


def axial_rotary(
    positions: Sequence[np.ndarray], dims: Sequence[int], *, theta: float = 10000.0
) -> Rotary:
    """Factors of `rotate_pairs` for a grid, its first axis outermost.

    Axis i rotates dims[i] channels of a head, by angles proportional to positions[i]. The angles
    are computed on the host in float64, one small table per axis; the program broadcasts them.

    Returns:
        Cosines and sines [1, N, 1, sum(dims) / 2], N the product of the axes' lengths.
    """
    grid = tuple(len(p) for p in positions)
    angles = []
    for indices, dim in zip(positions, dims):
        frequencies = theta ** -(np.arange(0, dim, 2) / dim)
        angles.append(np.outer(indices, frequencies))

    def spread(axis: int, table: np.ndarray) -> Array:
        shape = [1] * len(grid)
        shape[axis] = len(table)
        table32 = jnp.asarray(table, jnp.float32).reshape(*shape, -1)
        return jnp.broadcast_to(table32, (*grid, table.shape[1]))

    def factors(f: Callable[[np.ndarray], np.ndarray]) -> Array:
        parts = [spread(axis, f(table)) for axis, table in enumerate(angles)]
        return jnp.concatenate(parts, -1).reshape(1, -1, 1, sum(dims) // 2)

    return factors(np.cos), factors(np.sin)


def sincos_2d(dim: int, rows: int, cols: int, base: float) -> Float[Array, "N D"]:
    """Fixed sinusoidal positions of a grid, row by row.

    The first half of the channels is for columns, the second for rows. Positions are evenly spaced
    from 0 to `base`, which is excluded. The tables per axis are constants made on the host; only
    their broadcast to the grid is part of the program, so that it need not hold all N * D numbers
    as a constant.
    """
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))

    def axis_table(n: int) -> Array:
        angles = np.outer(np.arange(n) * base / n, frequencies)
        table = np.concatenate([np.sin(angles), np.cos(angles)], 1)
        return jnp.asarray(table, jnp.float32)

    shape = (rows, cols, dim // 2)
    of_columns = jnp.broadcast_to(axis_table(cols)[None], shape)
    of_rows = jnp.broadcast_to(axis_table(rows)[:, None], shape)
    return jnp.concatenate([of_columns, of_rows], -1).reshape(rows * cols, dim)
