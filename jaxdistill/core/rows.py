"""Work on the rows of arrays [... V], in the program that suits where it runs. Nothing but speed
and memory depends on it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxdistill.core.sharding import mesh_in_use
from jaxdistill.core.types import Array

BLOCK = (
    2**18
    # numbers that `by_rows` takes of an array at a time, one MiB in float32: about what a core's cache
    # holds
)
SMALL = 2**22  # numbers of an array up to which it takes all at once
KEPT = "kept of a row"


def project(x: Array, kernel: Array, dtype=None) -> Array:
    """x [... D] times kernel [D V] -> [... V], in `dtype` (None: theirs).

    On one device with all leading axes as one: else XLA's CPU programs copy the whole [... V]
    gradient, transposed, to make the kernel's. On a mesh two of these may be sharded, which one
    axis cannot be.
    """
    rows = x.reshape(-1, x.shape[-1]) if mesh_in_use() is None else x
    return jnp.matmul(rows, kernel, preferred_element_type=dtype).reshape(
        *x.shape[:-1], kernel.shape[-1]
    )


def by_rows(fn: Callable[..., Array], *arrays: Array) -> Array:
    """fn([... V], ..) -> [...], where every row's value comes from that row alone.

    Large arrays on one CPU go through a few rows at a time, and the backward pass makes them anew
    from the arrays and what `keep` has named: fn's temporaries stay in the cache, where XLA's CPU
    programs would write each of them out whole. Elsewhere, and on a mesh, it is fn(*arrays).
    """
    first = arrays[0]
    if mesh_in_use() is not None or first.size <= SMALL:
        return fn(*arrays)

    def in_blocks(*arrays: Array) -> Array:
        block = jax.checkpoint(
            lambda rows: fn(*rows),
            prevent_cse=False,
            policy=jax.checkpoint_policies.save_only_these_names(KEPT),
        )
        flat = [x.reshape(-1, x.shape[-1]) for x in arrays]
        return jax.lax.map(block, flat, batch_size=max(1, BLOCK // first.shape[-1])).reshape(
            first.shape[:-1]
        )

    return jax.lax.platform_dependent(*arrays, cpu=in_blocks, default=fn)


def keep(x: Array) -> Array:
    """Marks a number of a row that the backward pass of `by_rows` shall not compute again."""
    return checkpoint_name(x, KEPT)
