"""Sums over batches, on any mesh: moments, normal equations, Taylor terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.core.net import Net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Batch, Nets, Params


def summed(
    nets: Mapping[str, Net],
    params: Mapping[str, Params],
    batches: Iterable[Batch],
    terms: Callable[[Nets, Batch], Any],
) -> Any:
    """The sum over batches of `terms(bound networks, batch)`, accumulated in float32.

    Args:
        nets: networks by role.
        params: their weights.
        batches: on the mesh. A sum over the samples of a batch is one over all devices.
        terms: sums over the samples of a batch, a tree of arrays of any floating type.

    Raises:
        ValueError: there is no batch.
    """

    def in_float32(params: Mapping[str, Params], batch: Batch) -> Any:
        found = terms(bind(nets, params), batch)
        return jax.tree.map(lambda x: x.astype(jnp.float32), found)

    @jax.jit
    def first(params: Mapping[str, Params], batch: Batch) -> Any:
        return in_float32(params, batch)

    @jax.jit
    def added(total: Any, params: Mapping[str, Params], batch: Batch) -> Any:
        return jax.tree.map(jnp.add, total, in_float32(params, batch))

    total = None
    for batch in batches:
        total = (
            first(params, batch) if total is None else added(total, params, batch)
        )
    if total is None:
        raise ValueError("batches: expected at least one")
    return total
