"""Decoding: the stores of layers, their caches of keys and values.

Shapes of stores: B samples, G key/value heads, S slots (the most tokens that the store can hold), K
channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxdistill.core.net import materialise
from jaxdistill.core.types import Array
from jaxdistill.models.layers import SHORT, check_taps, scan_layers


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
