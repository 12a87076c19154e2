"""Row-wise work on large arrays [... V], by the program that is fastest on the device.

Only speed and memory depend on the choice.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxdistill.core.sharding import mesh_in_use
from jaxdistill.core.types import Array

# numbers of an array that `by_rows` works on at a time: 1 MiB, a core's cache
BLOCK = 2**18
SMALL = 2**22  # an array of at most so many numbers is worked on at once
KEPT = "kept of a row"


def project(x: Array, kernel: Array, dtype=None) -> Array:
    """The product of x [... D] and kernel [D V], [... V], in `dtype` (None: that of the inputs).

    On one device the leading axes are flattened, because XLA's CPU programs otherwise transpose a
    copy of the [... V] gradient for that of the kernel. On a mesh they stay, because two of them
    may be sharded.
    """
    rows = x.reshape(-1, x.shape[-1]) if mesh_in_use() is None else x
    out = jnp.matmul(rows, kernel, preferred_element_type=dtype)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def by_rows(fn: Callable[..., Array], *arrays: Array) -> Array:
    """fn(*arrays), for arrays [... V] and a result [...] of which each value needs its row only.

    On one CPU, large arrays are worked on in blocks of rows, so that temporaries stay in the cache;
    the backward pass computes them again from the arrays and from what `keep` marked. Elsewhere
    and on a mesh this is fn(*arrays).
    """
    first = arrays[0]
    if mesh_in_use() is not None or first.size <= SMALL:
        return fn(*arrays)

    def in_blocks(*arrays: Array) -> Array:
        policy = jax.checkpoint_policies.save_only_these_names(KEPT)
        block = jax.checkpoint(
            lambda rows: fn(*rows), prevent_cse=False, policy=policy
        )
        flat = [x.reshape(-1, x.shape[-1]) for x in arrays]
        size = max(1, BLOCK // first.shape[-1])
        return jax.lax.map(block, flat, batch_size=size).reshape(first.shape[:-1])

    return jax.lax.platform_dependent(*arrays, cpu=in_blocks, default=fn)


def keep(x: Array) -> Array:
    """`x`, marked so that the backward pass of `by_rows` keeps it instead of computing it again."""
    return checkpoint_name(x, KEPT)
