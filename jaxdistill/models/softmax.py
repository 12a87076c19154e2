"""Softmax attention by XLA alone, differentiable in every mode: through all scores, or by blocks.

Shapes: B samples, T queries, S keys, H heads, G groups of heads that share keys, K channels of a
query or key, V channels of a value.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from jaxdistill.core.types import Array
from jaxdistill.models.masks import BlockMask, expand


def plain(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    blocks: BlockMask | None = None,
    causal: bool = False,
    bias: Float[Array, "#B #H #T #S"] | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Float[Array, "B T H V"]:
    """Attention by XLA through all T x S scores.

    The backward pass computes the scores again from q, k and v rather than keep them. Inside, heads
    come before tokens: XLA's programs for the CPU take a quarter less time than with the library's
    order. A query that attends to no key gives 0 with `blocks`, and without them the mean of all
    values.
    """
    batch, queries, heads, size = q.shape
    keys, groups = k.shape[1:3]
    score_dtype = jnp.promote_types(q.dtype, jnp.float32)
    scale = size**-0.5 if scale is None else scale
    if blocks is not None:
        kept = expand(blocks, queries, keys)
        mask = kept if mask is None else mask & kept

    def attend(q, k, v, mask, bias):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        q = q.reshape(batch, groups, -1, queries, size)
        scores = jnp.einsum(
            "bgrtk,bgsk->bgrts", q, k, preferred_element_type=score_dtype
        )
        scores = scores.reshape(batch, heads, queries, keys) * scale
        if bias is not None:
            scores = scores + bias
        if cap:
            scores = cap * jnp.tanh(scores / cap)
        masks = [jnp.tri(queries, keys, dtype=bool)] if causal else []
        if mask is not None:
            masks.append(mask)
        if masks:
            visible = functools.reduce(jnp.logical_and, masks)
            scores = jnp.where(visible, scores, -1e30)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        weights = weights.reshape(batch, groups, -1, queries, keys)
        out = jnp.einsum("bgrts,bgsk->bgrtk", weights, v)
        out = out.reshape(batch, heads, queries, -1)
        if blocks is not None:
            out = jnp.where(visible.any(-1, keepdims=True), out, 0)
        return jnp.swapaxes(out, 1, 2)

    return jax.checkpoint(attend, prevent_cse=False)(q, k, v, mask, bias)


def blockwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    mask: Bool[Array, "#B #H #T #S"] | None = None,
    blocks: BlockMask | None = None,
    causal: bool = False,
    scale: float | None = None,
    block: int = 512,
) -> Float[Array, "B T H V"]:
    """Attention by online softmax over blocks of `block` queries and keys.

    Memory grows with T + S, not T x S. It is differentiable in every mode. The running maximum that
    keeps the exponentials finite cancels from the result, so it carries no derivative. What no
    sample and no head attends to by `blocks` is not computed. A query that attends to no key gives
    0.

    Source: arXiv:1805.02867, 2112.05682.
    """
    batch, queries, heads, size = q.shape
    keys, groups = k.shape[1:3]
    repeats = heads // groups
    scale = size**-0.5 if scale is None else scale
    rows = min(block, queries)
    columns = min(block, keys)
    grouped = (
        q.astype(jnp.float32).reshape(batch, queries, groups, repeats, size) * scale
    )
    q_blocks = in_blocks(grouped, 1, rows)
    k_blocks = in_blocks(k, 1, columns)
    v_blocks = in_blocks(v, 1, columns)
    mask_blocks = (
        None
        if mask is None
        else _mask_blocks(mask, keys, groups, repeats, rows, columns)
    )

    visible = functools.partial(_visible, mask_blocks, causal, keys, rows, columns)
    kept = functools.partial(_kept, blocks, groups, repeats, rows, columns)

    @jax.checkpoint
    def query_block(inputs):
        i, q_block = inputs

        @jax.checkpoint
        def key_block(softmax, inputs):
            j, k_block, v_block = inputs

            def attend(softmax, seen):
                scores = jnp.einsum(
                    "bqgrk,bsgk->bgrqs", q_block, k_block.astype(jnp.float32)
                )
                scores = jnp.where(seen, scores, -jnp.inf)
                return softmax.with_block(scores, v_block)

            seen = visible(i, j)
            if blocks is None:
                return attend(softmax, seen), None
            seen = seen & kept(i, j)
            skip = lambda softmax, _: softmax
            return jax.lax.cond(seen.any(), attend, skip, softmax, seen), None

        start = OnlineSoftmax.empty((batch, groups, repeats, rows), v.shape[-1])
        inputs = (jnp.arange(len(k_blocks)), k_blocks, v_blocks)
        softmax, _ = jax.lax.scan(key_block, start, inputs)
        return softmax.mean()

    # [blocks B G R rows V]
    out = jax.lax.map(query_block, (jnp.arange(len(q_blocks)), q_blocks))
    channels = v.shape[-1]
    out = jnp.moveaxis(out, 0, 3)
    out = out.reshape(batch, groups, repeats, -1, channels)
    out = jnp.moveaxis(out[..., :queries, :], 3, 1)
    return out.reshape(batch, queries, heads, channels).astype(q.dtype)


class OnlineSoftmax(NamedTuple):
    """Values weighted by the softmax of the scores so far, in float32 (arXiv:1805.02867)."""

    maximum: Array  # [B G R T], of the scores so far; -inf: all of them masked
    norm: Array  # [B G R T]: the sum of exp(score - maximum)
    # [B G R T V]: the sum of exp(score - maximum) times the key's value
    total: Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], channels: int) -> OnlineSoftmax:
        total = jnp.zeros((*shape, channels))
        return cls(jnp.full(shape, -jnp.inf), jnp.zeros(shape), total)

    def with_block(
        self, scores: Float[Array, "B G R T S"], values: Float[Array, "B S G V"]
    ) -> OnlineSoftmax:
        """After one more block of keys."""
        maximum = jnp.maximum(self.maximum, jax.lax.stop_gradient(scores.max(-1)))
        finite = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        weights = jnp.exp(scores - finite[..., None])
        shrink = jnp.exp(self.maximum - finite)
        added = jnp.einsum("bgrqs,bsgk->bgrqk", weights, values.astype(jnp.float32))
        total = self.total * shrink[..., None] + added
        return OnlineSoftmax(maximum, self.norm * shrink + weights.sum(-1), total)

    def mean(self) -> Float[Array, "B G R T V"]:
        """The attended values; 0 where every key is masked."""
        norm = jnp.where(self.norm == 0, 1.0, self.norm)
        return self.total / norm[..., None]


def in_blocks(
    x: Shaped[Array, "*before"], axis: int, size: int
) -> Shaped[Array, "*after"]:
    """`x` padded with zeros and cut along `axis` into blocks of `size`, a new first axis."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % size)
    before = x.shape[:axis]
    behind = x.shape[axis + 1 :]
    cut = jnp.pad(x, pads).reshape(*before, -1, size, *behind)
    return jnp.moveaxis(cut, axis, 0)


def _visible(
    mask_blocks: Array | None,
    causal: bool,
    keys: int,
    rows: int,
    columns: int,
    i: Array,
    j: Array,
) -> Array:
    """Which keys of block j the queries of block i attend to: bool [.. rows or 1, columns]."""
    key_indices = j * columns + jnp.arange(columns)
    visible = key_indices < keys  # the rest is padding
    if causal:
        query_indices = i * rows + jnp.arange(rows)
        visible = visible & (key_indices <= query_indices[:, None])
    if mask_blocks is not None:
        visible = visible & mask_blocks[i if mask_blocks.shape[0] > 1 else 0, j]
    return visible


def _kept(
    blocks: BlockMask,
    groups: int,
    repeats: int,
    rows: int,
    columns: int,
    i: Array,
    j: Array,
) -> Array:
    """What `blocks` keeps in block (i, j) of `blockwise`: bool [B G R rows columns].

    B, and G and R, are 1 where the mask is the same for all.
    """
    grid = jnp.asarray(blocks.grid)
    batch, heads = grid.shape[:2]
    grouped = (1, 1) if heads == 1 else (groups, repeats)
    grid = grid.reshape(batch, *grouped, *grid.shape[2:])
    of_queries = (i * rows + jnp.arange(rows)) // blocks.query_block
    of_keys = (j * columns + jnp.arange(columns)) // blocks.key_block
    # tokens of the padding are in the last block
    of_queries = jnp.minimum(of_queries, grid.shape[-2] - 1)
    of_keys = jnp.minimum(of_keys, grid.shape[-1] - 1)
    return jnp.take(jnp.take(grid, of_queries, -2), of_keys, -1)


def _mask_blocks(
    mask: Array, keys: int, groups: int, repeats: int, rows: int, columns: int
) -> Array:
    """A mask [B H T S] (1 where it is the same for all) in blocks.

    Returns bool [query blocks, key blocks, B, G, R, rows, columns]; for a mask that is the same for
    all queries the first and the sixth axis are 1.
    """
    batch, heads, queries = mask.shape[:3]
    mask = jnp.broadcast_to(mask, (batch, heads, queries, keys))
    grouped = (1, 1) if heads == 1 else (groups, repeats)
    mask = mask.reshape(batch, *grouped, queries, keys)
    mask = in_blocks(mask, 4, columns)
    return mask[None] if queries == 1 else in_blocks(mask, 4, rows)
