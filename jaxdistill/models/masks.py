"""Masks by block: which blocks of keys a block of queries attends to, without T x S entries.

Shapes: B samples, T queries, S keys, H heads, I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from jaxdistill.core.types import Array, Refused

_static = dict(static=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Which blocks of keys each block of queries attends to.

    A numpy array is known when a program is traced: the TPU kernel then visits the kept blocks
    alone. A jax array is data: it may be computed from the queries, or be scanned with the weights
    of a stack of layers, with a leading axis of layers. The last block of either side may be short.
    """

    seen: Any  # bool [I J], [H I J] or [B H I J]; H and B may be 1
    query_block: int = dataclasses.field(metadata=_static)  # queries in a block
    key_block: int = dataclasses.field(metadata=_static)  # keys in a block

    @property
    def grid(self) -> Bool[Array, "#B #H I J"]:
        """`seen` with all four axes."""
        missing = 4 - self.seen.ndim
        return self.seen.reshape((1,) * missing + self.seen.shape)

    @property
    def static(self) -> bool:
        """Whether the blocks are known when a program is traced."""
        return isinstance(self.seen, np.ndarray)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raises Refused unless the mask is one of `queries` x `keys` tokens."""
        shape = self.seen.shape
        if not 2 <= len(shape) <= 4:
            expected = "expected [I J], [H I J] or [B H I J]"
            raise Refused(f"blocks.seen: shape {shape}, {expected}")
        if self.seen.dtype != bool:
            raise Refused(f"blocks.seen: {self.seen.dtype}, expected bool")
        if self.query_block < 1 or self.key_block < 1:
            sizes = f"query_block={self.query_block}, key_block={self.key_block}"
            raise Refused(f"blocks: {sizes}, expected positive numbers of tokens")
        sides = (
            math.ceil(queries / self.query_block),
            math.ceil(keys / self.key_block),
        )
        leading = self.grid.shape[:2]
        fits = leading[0] in (1, batch) and leading[1] in (1, heads)
        if shape[-2:] != sides or not fits:
            of = (
                f"{batch} samples, {heads} heads, {queries} queries and {keys} keys"
            )
            blocks = f"blocks of {self.query_block} and {self.key_block}"
            raise Refused(
                f"blocks.seen: shape {shape} does not fit {of} in {blocks},"
                f" expected [.. {sides[0]} {sides[1]}]"
            )


def expand(blocks: BlockMask, queries: int, keys: int) -> Bool[Array, "#B #H T S"]:
    """The mask by tokens: True where a query attends to a key."""
    rows = np.arange(queries) // blocks.query_block
    columns = np.arange(keys) // blocks.key_block
    return blocks.grid[..., rows[:, None], columns]


def attending(
    mask: Bool[Array, "#B 1 1 S"] | None,
    blocks: BlockMask | None,
    causal: bool,
    queries: int,
    keys: int,
) -> Bool[Array, "#B #H T"]:
    """Which queries attend to any key at all, without T x S entries."""
    block = keys if blocks is None else blocks.key_block
    kept = jnp.ones((1, keys), bool) if mask is None else mask[:, 0, 0]
    kept = jnp.pad(kept, ((0, 0), (0, -keys % block)))
    kept = kept.reshape(len(kept), -1, block)
    # the first key of each block that is attended to
    starts = block * jnp.arange(kept.shape[1])
    first = jnp.where(kept.any(-1), starts + jnp.argmax(kept, -1), keys)
    first = first[:, None, None]
    rows = np.zeros(queries, int)
    if blocks is not None:
        first = jnp.where(blocks.grid, first, keys)
        rows = np.arange(queries) // blocks.query_block
    first = first.min(-1)[..., rows]
    last = np.full(queries, keys - 1)
    if causal:
        last = np.minimum(np.arange(queries), last)
    return first <= last
