"""Means over different counts in one loss: tokens of two kinds of target, or tokens and samples.

`Out.count` is one number, so it cannot divide such a loss. Instead `Turn.gather` writes the counts
of the complete batch into it; each micro-batch divides its own sums by them, and the results of all
micro-batches add up to the means over the complete batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxdistill.core.types import Array, Batch

PREFIX = "global_"


def with_counts(batch: Batch, masks: Mapping[str, Bool[Array, "B ..."]]) -> Batch:
    """The batch with its number of samples, and the number of True entries of each mask.

    Both are constant along the batch axis, so that micro-batches keep them: global_samples and
    global_<name of the mask>, float32 [B].
    """
    samples = len(next(iter(masks.values())))
    counts = {
        name: jnp.sum(mask.astype(jnp.float32)) for name, mask in masks.items()
    }
    counts["samples"] = jnp.float32(samples)
    repeated = {
        PREFIX + name: jnp.broadcast_to(n, (samples,)) for name, n in counts.items()
    }
    return {**batch, **repeated}


def mean(
    batch: Batch, name: str, total: Float[Array, ""], count: Float[Array, ""]
) -> Array:
    """`total` divided by the complete batch's count of the mask `name`; 0 where that is 0.

    A batch without counts is complete, and `count` is its own.
    """
    key = PREFIX + name
    if key in batch:
        count = batch[key][0]
    return total / jnp.maximum(count, 1.0)


def share_of_batch(batch: Batch) -> Array | float:
    """The part of the complete batch that this micro-batch is; 1 for a batch without counts.

    It is the `Out.count` of a loss made of such means, and the factor of a mean over samples.
    """
    samples = batch.get(PREFIX + "samples")
    return 1.0 if samples is None else len(samples) / samples[0]
