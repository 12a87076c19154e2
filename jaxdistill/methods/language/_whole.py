"""For losses that add up means over different things (tokens of two targets, tokens and samples):
no single count divides them, so each micro-batch is told the counts of the whole batch, and what it
has of each mean is a part of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch

PREFIX = "whole_"


def counted(batch: Batch, masks: Mapping[str, Array]) -> Batch:
    """The whole batch with how often each mask holds in it, and how many rows it has, in every row:
    whole_<name>, float32 [B]. What a `Turn.gather` returns.
    """
    rows = len(next(iter(masks.values())))
    counts = {name: jnp.sum(mask.astype(jnp.float32)) for name, mask in masks.items()} | {
        "rows": jnp.float32(rows)
    }
    return {
        **batch,
        **{PREFIX + name: jnp.broadcast_to(count, (rows,)) for name, count in counts.items()},
    }


def mean(batch: Batch, name: str, total: Array, count: Array) -> Array:
    """`total` over the count of mask `name` in the whole batch; over its own `count` where nothing
    was gathered. 0 for none.
    """
    return total / jnp.maximum(batch[PREFIX + name][0] if PREFIX + name in batch else count, 1.0)


def share(batch: Batch) -> Array | float:
    """Which part of the whole batch these rows are: the `Out.count` of such a loss, and the factor
    of means over rows. 1 where nothing was gathered.
    """
    rows = batch.get(PREFIX + "rows")
    return 1.0 if rows is None else len(rows) / rows[0]
