"""Frozen weights in eight bits.

`core.net.materialise` turns them into floating point: stacked layers one at a time, inside the scan
over layers, and the others when the network is called. So the device memory never holds all weights
of a large teacher in floating point.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdistill.core.net import Net, is_matrix, is_quantized, is_spec, materialise
from jaxdistill.core.types import Params, Refused


@dataclasses.dataclass(frozen=True)
class Quantized(Net):
    """A Net with int8 matrices (`qwix.QArray` leaves), one scale an output channel and layer."""

    plain: Net | None = None

    def init(self, key):
        return self.from_source(self.plain.init(key))

    def from_source(self, params: Params) -> Params:
        """Weights with quantised matrices; those that are quantised already stay the same."""
        if not any(
            map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))
        ):
            params = self.plain.from_source(params)

        def leaf(w: Any, names: P) -> Any:
            if is_quantized(w) or not is_matrix(names):
                return w
            return _quantize(w, names)

        return _map(leaf, params, self.plain.axes)

    @property
    def source(self) -> Net:
        return self.plain.source

    @property
    def whole(self) -> Net:
        return self.plain


def quantized(net: Net, kind: str) -> Quantized:
    """`net` with its matrices in `kind`.

    Raises Refused where `kind` is not int8, or qwix is not installed.
    """
    if kind != "int8":
        raise Refused(f"role.quantize={kind!r}: expected 'int8' or ''")
    try:
        import qwix  # noqa: F401
    except ImportError as error:
        raise Refused(
            "role.quantize=int8 needs qwix: pip install 'jaxdistill[int8]'"
        ) from error
    wrapped = Quantized(
        net.build, net.graphdef, {}, {}, net.wrap, net.config, net.adapts, plain=net
    )
    shapes = jax.eval_shape(wrapped.from_source, net.shapes)
    axes = _map(_axes, net.axes, shapes)
    return dataclasses.replace(wrapped, shapes=shapes, axes=axes)


def _map(f, *trees) -> Any:
    return jax.tree.map(f, *trees, is_leaf=lambda x: is_quantized(x) or is_spec(x))


def _kept(names: P) -> tuple[int, ...]:
    """Axes along which scales differ: the stacking axes and the output channels."""
    return (
        *(i for i, n in enumerate(names) if n in ("layers", "bank")),
        len(names) - 1,
    )


def _quantize(w, names: P):
    import qwix

    return qwix.quantize(materialise(w), jnp.int8, channelwise_axes=_kept(names))


def _axes(names: P, w):
    """The logical axis names of a leaf's parts: values and scales."""
    if not is_quantized(w):
        return names
    kept = _kept(names)
    return dataclasses.replace(
        w,
        qvalue=names,
        scale=P(*(n if i in kept else None for i, n in enumerate(names))),
    )
