"""What the model families share: layers with named axes, norms, embeddings, positions, stacks.

`Stacked` is what every network of stacked blocks answers; `scan_layers` runs the blocks.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Bool, Float, Integer, Key, Num, Shaped

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


class BatchNorm(nnx.Module):
    """Batch norm over the channels of [B ... C], as PyTorch's, statistics in float32.

    With `use_running_average` (the state of a new module) it normalises by the running statistics.
    Otherwise (`core.net.Net.apply_training`) it normalises by those of the batch, and moves the
    running ones towards them: the mean, and the unbiased variance. The batch is the global one.

    Source: arXiv:1502.03167.
    """

    def __init__(
        self,
        dim: int,
        *,
        rngs: nnx.Rngs,
        eps: float = 1e-5,
        momentum: float = 0.1,
        dtype=None,
    ):
        """`momentum` is the weight of the batch in the running statistics."""
        named = nnx.with_partitioning
        ones = named(nnx.initializers.ones_init(), (None,))
        zeros = named(ZEROS, (None,))
        self.scale = nnx.Param(ones(rngs.params(), (dim,)))
        self.bias = nnx.Param(zeros(rngs.params(), (dim,)))
        self.mean = nnx.BatchStat(jnp.zeros((dim,)))
        self.var = nnx.BatchStat(jnp.ones((dim,)))
        self.eps = eps
        self.momentum = momentum
        self.dtype = dtype
        self.use_running_average = True

    def __call__(self, x: Float[Array, "B ... C"]) -> Float[Array, "B ... C"]:
        h = x.astype(jnp.float32)
        mean = self.mean[...]
        var = self.var[...]
        if not self.use_running_average:
            axes = tuple(range(h.ndim - 1))
            mean = h.mean(axes)
            var = jnp.mean((h - mean) ** 2, axes)
            count = h.size // h.shape[-1]
            self._move(self.mean, mean)
            self._move(self.var, var * count / max(count - 1, 1))
        normed = (h - mean) * jax.lax.rsqrt(var + self.eps)
        out = normed * self.scale[...] + self.bias[...]
        return out.astype(self.dtype or x.dtype)

    def _move(self, running: nnx.BatchStat, found: Array) -> None:
        """Moves a running statistic towards that of the batch."""
        target = jax.lax.stop_gradient(found)
        new = (1 - self.momentum) * running[...] + self.momentum * target
        running.set_value(new)


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
    t: Num[Array, " B"],
    dim: int,
    *,
    max_period: float = 10000.0,
    shift: float = 1.0,
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


def split_heads(
    x: Float[Array, "*B D"], heads: int
) -> Float[Array, "*B {heads} K"]:
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


def drop(
    x: Float[Array, "*B"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "*B"]:
    """Dropout: numbers set to 0 with probability `rate`, the others divided by 1 - rate.

    x itself where there is no key. Source: arXiv:1207.0580.
    """
    if key is None or not rate:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def part_keys(
    key: Key[Array, ""] | None, parts: int
) -> list[Key[Array, ""] | None]:
    """A key for each part of a block; None for each where there is no key."""
    return [None] * parts if key is None else list(jax.random.split(key, parts))


def attention_scores(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], *, cap: float = 0.0
) -> Float[Array, "B H T S"]:
    """The scores of attention (query, key) before any mask, in float32.

    Where `cap` is not 0, scores s become cap tanh(s / cap).
    """
    repeats = q.shape[2] // k.shape[2]
    keys = jnp.repeat(k, repeats, 2) if repeats > 1 else k
    products = jnp.einsum(
        "bthk,bshk->bhts", q, keys, preferred_element_type=jnp.float32
    )
    scores = products * q.shape[-1] ** -0.5
    return cap * jnp.tanh(scores / cap) if cap else scores


def key_mask(mask: Shaped[Array, "B S"] | None) -> Bool[Array, "B 1 1 S"] | None:
    """A padding mask (True on tokens) as `attention` takes it, shared by all heads and queries."""
    return None if mask is None else mask[:, None, None, :].astype(bool)


def stack(
    make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs
) -> nnx.Module:
    """`depth` layers as one module whose weights have a leading axis called `layers`."""
    named = nnx.transform_metadata(make, in_axes=0, out_axes=0, partition="layers")
    return nnx.vmap(named)(rngs.split(depth))


class Runs(nnx.Module):
    """A stack of unlike blocks: runs of equal ones, each stacked under `run0`, `run1`, ...

    Layers are numbered through all runs.
    """

    def __init__(
        self, makes: Sequence[Callable[[nnx.Rngs], nnx.Module]], rngs: nnx.Rngs
    ):
        """`makes` has the maker of each layer; a run is a row of equal makers."""
        grouped = [(make, len(list(run))) for make, run in itertools.groupby(makes)]
        for n, (make, count) in enumerate(grouped):
            setattr(self, f"run{n}", stack(make, count, rngs))
        ends = itertools.accumulate(count for _, count in grouped)
        # the first layer of each run, and the number of layers
        self.starts = (
            0,
            *ends,
        )

    def part(self, low: int, high: int) -> nnx.Module:
        """The weights of the layers `low` to `high` - 1, which are of one run."""
        n = bisect.bisect_right(self.starts, low) - 1
        start = self.starts[n]
        run = getattr(self, f"run{n}")
        if (low, high) == self.starts[n : n + 2]:
            return run
        return jax.tree.map(lambda w: w[low - start : high - start], run)


def _is_runs(node: Any) -> bool:
    return isinstance(node, Runs)


def _part(layers: Any, low: int, high: int, depth: int) -> Any:
    """The layers `low` to `high` - 1 of stacked arrays, in which `Runs` may stand."""

    def part(node: Any) -> Any:
        return node.part(low, high) if _is_runs(node) else node[low:high]

    nodes = jax.tree.leaves(layers, is_leaf=_is_runs)
    if (low, high) == (0, depth) and not any(map(_is_runs, nodes)):
        return layers
    return jax.tree.map(part, layers, is_leaf=_is_runs)


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
    chosen: Sequence[int] | None = None,
    instead: Mapping[int, Callable[[Any], Any]] = {},
) -> tuple[Any, Any, tuple]:
    """Scans `body(x, layer) -> (x, y)` over stacked layers, rematerialised by the policy `remat`.

    Consecutive layers of one kind are one scan. It is split after each tap, so that x is kept only
    at the taps. A short stack on one device is unrolled if it rematerialises nothing and the
    sequences of x [B T ..] are short. Then the residuals of each layer for the backward pass need
    not be written into a common array, but XLA keeps the attention scores among them.

    Args:
        body: computes one layer.
        x: the input of the first layer.
        layers: arrays with a leading axis of layers, among which may be `Runs`.
        depth: number of layers.
        remat: a key of REMAT.
        taps: indices of layers.
        chosen: indices of the layers that are applied, in this order; None: all.
        instead: index of a layer -> x -> x, applied in its place.

    Returns:
        x after the last layer; the y of all layers that `body` computed, stacked; x after each
        layer of `taps`.

    Raises:
        Refused: a layer is not there, or a tap is not among the chosen ones.
    """
    policy = lookup_name(REMAT, remat, "remat")
    check_taps(taps, depth)
    order = range(depth) if chosen is None else tuple(chosen)
    check_taps(order, depth, "layers")
    check_taps(tuple(instead), depth, "instead")
    if missing := set(taps) - set(order):
        raise Refused(f"taps={sorted(missing)}: expected some of layers={[*order]}")

    def apply_layer(x, layer):
        return body(x, materialise(layer))

    if policy is not None:
        apply_layer = jax.checkpoint(apply_layer, policy=policy, prevent_cse=False)
    unrolled = (
        policy is None
        and depth <= SHORT
        and _few_scores(x)
        and mesh_in_use() is None
    )
    features = {}
    ys = []
    for low, high in _segments(layers, order, {*taps, *instead}, instead):
        if low in instead:
            x = instead[low](x)
        else:
            part = _part(layers, low, high, depth)
            unroll = high - low if unrolled else 1
            x, y = jax.lax.scan(apply_layer, x, part, unroll=unroll)
            ys.append(y)
        features[high - 1] = x
    if not ys:
        stacked = None
    elif len(ys) == 1:
        stacked = ys[0]
    else:
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *ys)
    return x, stacked, tuple(features[tap] for tap in taps)


def _segments(
    layers: Any, order: Sequence[int], ends: Collection[int], alone: Collection[int]
) -> list[tuple[int, int]]:
    """`order` cut into ranges [low, high) of consecutive layers of one kind.

    A range ends at each layer of `ends`, and a layer of `alone` is a range of its own.
    """
    runs = [n for n in jax.tree.leaves(layers, is_leaf=_is_runs) if _is_runs(n)]
    starts = {start for node in runs for start in node.starts}
    found = []
    for layer in order:
        follows = found and found[-1][1] == layer
        cut = not follows or layer - 1 in ends or layer in alone or layer in starts
        if cut:
            found.append((layer, layer + 1))
        else:
            found[-1] = (found[-1][0], layer + 1)
    return found


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


class Inside(NamedTuple):
    """What a block computes on the way to its output."""

    attended: Float[Array, "B N E"]  # by attention, before its output projection
    neurons: Float[Array, "B N M"]  # the hidden activations of the MLP


@flax.struct.dataclass
class Residual:
    """A term that is added to the output of attention in every block, after its projection."""

    weights: Any  # arrays with a leading axis of layers
    # (weights of a layer, input of its attention [B N D]) -> [B #N D]
    add: Callable[[Any, Array], Array] = flax.struct.field(pytree_node=False)


def with_residual(
    out: Float[Array, "B N D"],
    x: Float[Array, "B N D"],
    residual: Callable[[Array], Array] | None,
) -> Float[Array, "B N D"]:
    """The output of attention on x plus the residual of the layer, where there is one."""
    return out if residual is None else out + residual(x).astype(out.dtype)


class Applied(NamedTuple):
    """The result of `Stacked.apply_blocks`."""

    state: Any  # after the last layer
    reads: Any  # the results of `read`, stacked over the layers
    features: tuple  # after the tapped layers


class Stacked(nnx.Module):
    """A network of stacked blocks: `head(apply_blocks(embed_inputs(inputs)))`.

    A *state* is what the blocks change: tokens [B N D], or a tuple of streams of tokens. A
    *context* is what they only read: embedded times, masks, positions, the text. Layers are
    numbered from 0.
    """

    @property
    def layers(self) -> Any:
        """The stacked weights of the blocks, or `Runs` of them."""
        return self.blocks

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.cfg.depth

    def layer(self, index: int) -> nnx.Module:
        """One block by itself. Raises Refused where there is no such layer."""
        check_taps((index,), self.depth, "layer")
        run = _part(self.layers, index, index + 1, self.depth)
        return jax.tree.map(lambda w: w[0], run)

    def embed_inputs(self, *inputs: Any, **options: Any) -> tuple[Any, Any]:
        """(state, context) of the inputs of a call, before the first block."""
        raise NotImplementedError

    def apply_block(
        self,
        block: nnx.Module,
        state: Any,
        context: Any,
        residual: Callable[[Array], Array] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Any, Inside]:
        """The state after one block, and what the block computed on the way.

        `residual` is added to the output of its attention (`with_residual`). `key` is that of
        dropout; networks whose config has no `dropout` are given none.
        """
        raise NotImplementedError

    def head(self, state: Any, context: Any) -> Any:
        """The output of the network from the state after the last block."""
        raise NotImplementedError

    def feature(self, state: Any, context: Any) -> Any:
        """What a tap hands out of a state."""
        return state

    def apply_blocks(
        self,
        state: Any,
        context: Any,
        layers: Sequence[int] | None = None,
        read: Callable[[Any, Inside, Any], Any] | None = None,
        *,
        taps: Sequence[int] = (),
        residual: Residual | None = None,
        instead: Mapping[int, Callable[[Any], Any]] = {},
        dropout: Key[Array, ""] | None = None,
    ) -> Applied:
        """The blocks applied to a state, rematerialised as the config says.

        Args:
            state: before the first layer.
            context: of `embed_inputs`.
            layers: indices of the layers that are applied, in this order; None: all.
            read: (state before, inside, state after) -> arrays to keep of each layer.
            taps: indices of layers whose `feature` is kept.
            residual: added to the output of each attention.
            instead: index of a layer -> state -> state, applied in its place; `read` does not see
              it.
            dropout: the key of dropout, at the rate of the config; None: nothing is dropped.

        Raises:
            Refused: a layer is not there.
        """

        def body(state, scanned):
            block, weights, key = scanned
            options = {}
            if residual is not None:
                options["residual"] = functools.partial(residual.add, weights)
            if key is not None:
                options["key"] = key
            after, inside = self.apply_block(block, state, context, **options)
            return after, None if read is None else read(state, inside, after)

        weights = None if residual is None else residual.weights
        keys = None
        if dropout is not None and getattr(self.cfg, "dropout", 0):
            keys = jax.random.split(dropout, self.depth)
        state, reads, tapped = scan_layers(
            body,
            state,
            (self.layers, weights, keys),
            self.depth,
            remat=self.cfg.remat,
            taps=taps,
            chosen=layers,
            instead=instead,
        )
        features = tuple(self.feature(one, context) for one in tapped)
        return Applied(state, reads, features)

    def apply_each(self, states: Any, context: Any) -> Any:
        """Every layer on an input of its own, all at once.

        Args:
            states: the inputs, with a leading axis of layers.
            context: of `embed_inputs`.

        Returns:
            The outputs, with a leading axis of layers.
        """

        def one(block, state):
            return self.apply_block(materialise(block), state, context)[0]

        outputs = []
        for low, high in _segments(self.layers, range(self.depth), (), ()):
            blocks, inputs = _part((self.layers, states), low, high, self.depth)
            outputs.append(jax.vmap(one)(blocks, inputs))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)

    def probe(self, read: Callable, *inputs: Any, **options: Any) -> Any:
        """The results of `read(before, inside, after)` of every block, stacked over the blocks.

        `inputs` and `options` are those of `embed_inputs`; the head is not computed.
        """
        state, context = self.embed_inputs(*inputs, **options)
        return self.apply_blocks(state, context, read=read).reads

    def through(
        self, state: Any, context: Any, *, taps: Sequence[int] = (), **options: Any
    ) -> Any:
        """The output of the network from an embedded state; with `taps`, (output, features).

        `options` are those of `apply_blocks`.
        """
        applied = self.apply_blocks(state, context, taps=taps, **options)
        out = self.head(applied.state, context)
        return (out, applied.features) if taps else out


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
        return self.down(self.neurons(x))

    def neurons(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W M"]:
        """The `hidden` activations before the last linear map."""
        h = self.depth(nnx.silu(self.up(x)))
        value, gate = jnp.split(h, 2, -1)
        return value * nnx.silu(gate)


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
