"""Splash attention, the Pallas kernel on TPU, for as many keys as queries or not, and by blocks.

The kernel cuts queries and keys into tiles. For a mask by blocks it takes two lists in scalar
memory: the tiles of keys that each tile of queries visits, and the same the other way round for
the gradient of keys and values. They are made here from the blocks, by the same operations for
masks that are known when the program is traced and for those that are data.

Shapes: B samples, T queries, S keys, H heads, G groups of heads that share keys, K channels of a
query or key, V channels of a value, I tiles of queries, J tiles of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxdistill.core.sharding import per_shard
from jaxdistill.core.types import Array
from jaxdistill.models.masks import BlockMask, attending
from jaxdistill.models.softmax import blockwise, in_blocks, plain

PLAIN = 2048  # tokens: above it lengths are padded to multiples of LONG_TILE
TILE = 128  # sequence lengths of a kernel are multiples of it
LONG_TILE = 512
TILES = (512, 384, 256, TILE)  # how many queries or keys the kernel takes at a time
SCALARS = 15 * 2**16  # bytes of lists in one call, of 2**20 bytes of scalar memory
INTERPRET = False  # runs the Pallas kernel without a TPU, for tests


def splash(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    mask: Bool[Array, "#B 1 1 S"] | None = None,
    blocks: BlockMask | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """Splash attention (Pallas, TPU), sharded by samples and heads, and queries by sequence too.

    Queries and keys are padded to full tiles, each side for itself; with `blocks` each block is.
    Masked and padded keys are segments of their own, which no query has. A query that attends to no
    key gives 0.
    """
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    of_queries, of_keys = _sides(blocks, queries, keys)
    square = blocks is None and queries == keys
    # causal queries do not see the padding behind the keys, unless they outnumber the keys
    unseen = causal and blocks is None and queries <= keys
    segments = ()
    if mask is not None or (of_keys.padding and not unseen):
        of_key = _segments(mask, batch, of_keys)
        of_query = jnp.ones((batch, of_queries.tokens), jnp.int32)
        segments = (of_query, of_key)
    lists = (
        None if blocks is None else _Lists.of(blocks, of_queries, of_keys, causal)
    )
    tiles = () if lists is None else (lists.tiles,)

    def local(q, k, v, *rest):
        q = q * jnp.asarray(scale, q.dtype)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        ids = rest[len(tiles) :]
        if lists is None:
            kernel = _whole_kernel(q.shape[2], k.shape[2], q.shape[1], causal)
            out = _of_samples(kernel, q, k, v, ids)
        else:
            out = lists.attend(q, k, v, rest[0], ids)
        return jnp.swapaxes(out, 1, 2)

    query_axis = None if causal else "seq"
    query_names = ("batch", query_axis, "heads", None)
    key_names = ("batch", None, "heads", None)
    segment_names = [("batch", query_axis), ("batch", None)][: len(segments)]
    tile_names = [_tile_names(x, query_axis) for x in tiles]
    names = (query_names, key_names, key_names, *tile_names, *segment_names)
    padded = [of_queries.pad(q), of_keys.pad(k), of_keys.pad(v)]
    arrays = (*padded, *tiles, *segments)
    # a device's part of the sequence holds whole tiles where the axis of tiles is divided
    tile = 1 if tiles else TILE
    run = per_shard(local, names, query_names, arrays, tile=tile)
    if run is None:
        options = dict(mask=mask, causal=causal, scale=scale)
        if square:
            return plain(q, k, v, **options)
        return blockwise(q, k, v, blocks=blocks, **options)
    out = of_queries.cut(run(*arrays))
    if blocks is None and mask is None:
        return out
    seen = attending(mask, blocks, causal, queries, keys)
    return jnp.where(jnp.swapaxes(seen, 1, 2)[..., None], out, 0)


def _tile_names(tiles: Array, query_axis: str | None) -> tuple[str | None, ...]:
    """Logical axis names of bool [B H I J] for `per_shard`; axes of length 1 have none."""
    batch, heads = tiles.shape[:2]
    batch_axis = "batch" if batch > 1 else None
    return (batch_axis, "heads" if heads > 1 else None, query_axis, None)


class _Side(NamedTuple):
    """Tokens of queries or of keys, and how they are padded for the kernel."""

    length: int  # tokens
    block: int  # tokens in a block of the mask; all of them where there is none
    padded: int  # tokens in a block with its padding
    tile: int  # tokens in a tile; divides `padded`

    @property
    def blocks(self) -> int:
        return math.ceil(self.length / self.block)

    @property
    def tokens(self) -> int:
        """All tokens, with padding."""
        return self.blocks * self.padded

    @property
    def padding(self) -> int:
        return self.tokens - self.length

    def pad(self, x: Array, value: int = 0) -> Array:
        """Tokens (axis 1) with their padding."""
        if self.blocks == 1 or self.block == self.padded:
            return _pad(x, 1, self.padding, value)
        whole = _pad(x, 1, self.blocks * self.block - self.length, value)
        cut = whole.reshape(len(x), self.blocks, self.block, *x.shape[2:])
        cut = _pad(cut, 2, self.padded - self.block, value)
        return cut.reshape(len(x), self.tokens, *x.shape[2:])

    def cut(self, x: Array) -> Array:
        """Tokens (axis 1) without their padding."""
        if self.blocks > 1 and self.block < self.padded:
            cut = x.reshape(len(x), self.blocks, self.padded, *x.shape[2:])
            cut = cut[:, :, : self.block]
            x = cut.reshape(len(x), -1, *x.shape[2:])
        return x[:, : self.length]

    @property
    def places(self) -> np.ndarray:
        """Where each token stands among the padded ones, int32 [length]."""
        block, token = np.divmod(np.arange(self.length), self.block)
        return (block * self.padded + token).astype(np.int32)


def _pad(x: Array, axis: int, count: int, value: int = 0) -> Array:
    """`x` with `count` more entries along an axis; a numpy array stays one."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, count)
    numbers = np if isinstance(x, np.ndarray) else jnp
    return numbers.pad(x, pads, constant_values=value)


def _sides(
    blocks: BlockMask | None, queries: int, keys: int
) -> tuple[_Side, _Side]:
    if blocks is None:
        return _whole(queries), _whole(keys)
    of_queries = _of_blocks(queries, blocks.query_block)
    return of_queries, _of_blocks(keys, blocks.key_block)


def _whole(length: int) -> _Side:
    padded = length + -length % (TILE if length <= PLAIN else LONG_TILE)
    return _Side(length, length, padded, _largest_tile(padded))


def _of_blocks(length: int, block: int) -> _Side:
    """A side of a mask by blocks.

    The tile is the largest that pads a block by a quarter at most, since a step of the kernel has
    a fixed cost beside that of its scores.
    """
    fits = (tile for tile in TILES if 4 * (-block % tile) <= block)
    tile = next(fits, TILE)
    return _Side(length, block, block + -block % tile, tile)


def _largest_tile(length: int) -> int:
    """The largest tile of the kernel that divides a length, which is a multiple of TILE."""
    return next(size for size in TILES if length % size == 0)


def _segments(mask: Array | None, batch: int, side: _Side) -> Array:
    """int32 [B tokens]: 1 for keys that are attended to, 0 for masked ones, 2 for padding."""
    if mask is None:
        kept = jnp.ones((batch, side.length), jnp.int32)
    else:
        kept = jnp.broadcast_to(mask[:, 0, 0], (batch, side.length)).astype(
            jnp.int32
        )
    return side.pad(kept, 2)


def _of_samples(
    kernel: Callable, q: Array, k: Array, v: Array, ids: tuple[Array, ...]
) -> Array:
    """The kernel of one sample over all samples: [B H T K], [B G S K], [B G S V] -> [B H T V]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    segments = (pallas.SegmentIds(*ids),) if ids else ()
    return jax.vmap(kernel)(q, k, v, *segments)


def _tile_sizes(query_tile: int, key_tile: int):
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    return pallas.BlockSizes(
        block_q=query_tile,
        block_kv=key_tile,
        block_kv_compute=key_tile,
        block_q_dkv=query_tile,
        block_kv_dkv=key_tile,
        block_kv_dkv_compute=key_tile,
        block_q_dq=query_tile,
        block_kv_dq=key_tile,
    )


def _whole_kernel(queries: int, keys: int, heads: int, causal: bool) -> Callable:
    """The kernel of one sample where every query sees every key, or those up to its own index."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    shape = (queries, keys)
    head = pallas.CausalMask(shape) if causal else pallas.FullMask(shape)
    sizes = _tile_sizes(_largest_tile(queries), _largest_tile(keys))
    mask = pallas.MultiHeadMask([head] * heads)
    return pallas.make_splash_mha_single_device(
        mask, block_sizes=sizes, interpret=INTERPRET
    )


def _up_to(query_places: Array, key_places: Array) -> Array:
    """The causal mask of the kernel, between places among the padded keys."""
    return query_places >= key_places


class _Lists(NamedTuple):
    """A mask by blocks as the kernel takes it."""

    tiles: Array  # bool [B H I J], B and H may be 1: the tiles of scores that are computed
    most_keys: int  # tiles of keys that a tile of queries visits, at most
    most_queries: int  # tiles of queries that visit a tile of keys, at most
    query_tile: int
    key_tile: int
    # int32 [padded queries]: where causal queries stand among the padded keys
    places: np.ndarray | None

    @classmethod
    def of(
        cls, blocks: BlockMask, queries: _Side, keys: _Side, causal: bool
    ) -> _Lists:
        numbers = np if blocks.static else jnp
        tiles = numbers.repeat(blocks.grid, queries.padded // queries.tile, -2)
        tiles = numbers.repeat(tiles, keys.padded // keys.tile, -1)
        places = None
        if causal:
            longer = keys._replace(length=queries.length)
            places = queries.pad(longer.places[None])[0]
            last = places.reshape(-1, queries.tile).max(1)
            first = keys.tile * np.arange(tiles.shape[-1])
            tiles = tiles & (last[:, None] >= first)
        # the kernel divides by 0 where queries visit nothing: they visit the first tile
        nothing = ~tiles.any(-1, keepdims=True)
        tiles = tiles | (nothing & (np.arange(tiles.shape[-1]) == 0))
        most_queries, most_keys = tiles.shape[-2:]
        if blocks.static:
            most_keys = int(tiles.sum(-1).max())
            most_queries = int(tiles.sum(-2).max())
        return cls(
            jnp.asarray(tiles),
            most_keys,
            most_queries,
            queries.tile,
            keys.tile,
            places,
        )

    def attend(
        self, q: Array, k: Array, v: Array, tiles: Array, ids: tuple[Array, ...]
    ) -> Array:
        """The attention of a device's samples and heads, heads before tokens."""
        if len(tiles) == 1:
            return self._of_queries(q, k, v, tiles[0], ids)

        def of_sample(arrays):
            q, k, v, tiles, *ids = arrays
            one = [x[None] for x in (q, k, v)]
            return self._of_queries(*one, tiles, tuple(x[None] for x in ids))[0]

        return jax.lax.map(of_sample, (q, k, v, tiles, *ids))

    def _of_queries(
        self, q: Array, k: Array, v: Array, tiles: Array, ids: tuple[Array, ...]
    ) -> Array:
        """All queries in as few parts as the scalar memory allows; `tiles` is bool [H I J]."""
        lines = tiles.shape[1]
        divisors = (n for n in range(lines, 0, -1) if lines % n == 0)
        fits = (n for n in divisors if self._scalars(tiles[:, :n]) <= SCALARS)
        most = next(fits, 1)
        if most == lines:
            return self._of_heads(q, k, v, tiles, ids, self.places)
        tokens = most * self.query_tile
        of_part = (in_blocks(q, 2, tokens), in_blocks(tiles, 1, most))
        segments = in_blocks(ids[0], 1, tokens) if ids else None
        places = None if self.places is None else self.places.reshape(-1, tokens)

        def attend(arrays):
            (q, tiles), segments, places = arrays
            part_ids = (segments, ids[1]) if ids else ()
            return self._of_heads(q, k, v, tiles, part_ids, places)

        out = jax.lax.map(attend, (of_part, segments, places))
        out = jnp.moveaxis(out, 0, 2)
        return out.reshape(*out.shape[:2], -1, out.shape[-1])

    def _of_heads(
        self,
        q: Array,
        k: Array,
        v: Array,
        tiles: Array,
        ids: tuple[Array, ...],
        places: Array | None,
    ) -> Array:
        """All heads in as few calls as the scalar memory allows; `tiles` is bool [H I J]."""
        batch, heads = q.shape[:2]
        groups = k.shape[1]
        repeats = heads // groups
        most = max(1, SCALARS // self._scalars(tiles))
        if len(tiles) == 1 or heads <= most:
            return _of_samples(self._kernel(tiles, places), q, k, v, ids)
        # heads of a call: `inner` heads of each of `outer` groups
        inner = _largest_divisor(repeats, most)
        outer = _largest_divisor(groups, most // repeats) if inner == repeats else 1
        shape = (groups // outer, outer, repeats // inner, inner)
        q = q.reshape(batch, *shape, *q.shape[2:])
        q = q.transpose(1, 3, 0, 2, 4, 5, 6)
        q = q.reshape(shape[0], shape[2], batch, outer * inner, *q.shape[-2:])
        tiles = tiles.reshape(*shape, *tiles.shape[1:]).swapaxes(1, 2)
        tiles = tiles.reshape(shape[0], shape[2], outer * inner, *tiles.shape[-2:])
        k, v = (
            x.reshape(batch, shape[0], outer, *x.shape[2:]).swapaxes(0, 1)
            for x in (k, v)
        )

        def of_groups(arrays):
            q, k, v, tiles = arrays

            def of_heads(arrays):
                q, tiles = arrays
                return _of_samples(self._kernel(tiles, places), q, k, v, ids)

            return jax.lax.map(of_heads, (q, tiles))

        out = jax.lax.map(of_groups, (q, k, v, tiles))
        out = out.reshape(shape[0], shape[2], batch, outer, inner, *out.shape[-2:])
        out = out.transpose(2, 0, 3, 1, 4, 5, 6)
        return out.reshape(batch, heads, *out.shape[-2:])

    def _scalars(self, tiles: Array) -> int:
        """Bytes of the longer list of one head: an index and a flag for each tile.

        Scalar memory pads lines to 128 entries, and their number to 32.
        """
        queries, keys = tiles.shape[-2:]
        by_query = _round_up(queries, 32) * _round_up(
            min(self.most_keys, keys), 128
        )
        by_key = _round_up(min(self.most_queries, queries), 32) * _round_up(
            keys, 128
        )
        index = _index_type(max(queries, keys))
        return max(by_query, by_key) * (index.itemsize + 1)

    def _kernel(self, tiles: Array, places: Array | None) -> Callable:
        """The kernel of one sample for tiles [H I J], H may be 1."""
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as kernels,
        )
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_mask_info as infos,
        )

        def info(indices, flags):
            return infos.MaskInfo(indices, None, flags, None, places)

        by_query = info(*_visits(tiles, self.most_keys))
        columns = _visits(jnp.swapaxes(tiles, 1, 2), self.most_queries)
        by_key = info(*(jnp.swapaxes(x, 1, 2) for x in columns))
        return kernels.SplashAttentionKernel(
            by_query,
            by_query,
            by_key,
            block_sizes=_tile_sizes(self.query_tile, self.key_tile),
            is_mqa=False,
            save_residuals=False,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=None if places is None else _up_to,
            interpret=INTERPRET,
        )


def _visits(
    tiles: Bool[Array, "H I J"], most: int
) -> tuple[Int[Array, "H I W"], Int[Array, "H I W"]]:
    """(the tiles J that each I visits, in order; 2 for a visit and 0 behind the last one).

    Behind the last visit its index is repeated, so that the kernel loads nothing.
    """
    count = tiles.shape[-1]
    visited = jnp.where(tiles, jnp.arange(count), count)
    last = jnp.where(tiles, jnp.arange(count), 0).max(-1, keepdims=True)
    visited = jnp.sort(visited)[..., :most]
    flags = jnp.where(visited < count, 2, 0).astype(jnp.int8)
    return jnp.minimum(visited, last).astype(_index_type(count)), flags


def _index_type(count: int) -> np.dtype:
    """The smallest type of an index below `count`."""
    return np.dtype(np.int8 if count <= 128 else np.int16)


def _round_up(number: int, multiple: int) -> int:
    return number + -number % multiple


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, or 1."""
    fits = (d for d in range(min(number, most), 0, -1) if number % d == 0)
    return next(fits, 1)
