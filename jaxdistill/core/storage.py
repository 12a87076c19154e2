"""How a frozen role's weights rest: in eight bits, or in the host's memory (a combinator Net ->
Net).

Arithmetic sees what `net.materialise` makes of them: stacked layers one at a time, inside the scan over
them, everything else when the network is called. So a large teacher never stands in device memory
whole and in floating point.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdistill.core.net import Net, is_matrix, is_spec, materialise, resting
from jaxdistill.core.types import Params, Refused


@dataclasses.dataclass(frozen=True)
class Quantized(Net):
    """A Net whose matrices are int8 with one float scale for each output channel (and layer):
    `qwix.QArray` leaves.
    """

    plain: Net | None = None

    def init(self, key):
        return self.from_source(self.plain.init(key))

    def from_source(self, params: Params) -> Params:
        """Float weights as they will rest; quantised ones as they are."""
        params = (
            params
            if any(map(resting, jax.tree.leaves(params, is_leaf=resting)))
            else self.plain.from_source(params)
        )
        return _map(
            lambda w, names: w if resting(w) or not is_matrix(names) else _quantize(w, names),
            params,
            self.plain.axes,
        )

    @property
    def source(self) -> Net:
        return self.plain.source


def quantized(net: Net, kind: str) -> Quantized:
    """`net` with its matrices in `kind`. Raises Refused on another kind than int8, or without qwix."""
    if kind != "int8":
        raise Refused(f"role.quantize={kind!r}: expected 'int8' or ''")
    try:
        import qwix  # noqa: F401
    except ImportError as error:
        raise Refused("role.quantize=int8 needs qwix: pip install 'jaxdistill[int8]'") from error
    wrapped = Quantized(
        net.build, net.graphdef, {}, {}, net.wrap, net.config, net.adapts, plain=net
    )
    shapes = jax.eval_shape(wrapped.from_source, net.shapes)
    axes = _map(_axes, net.axes, shapes)
    return dataclasses.replace(wrapped, shapes=shapes, axes=axes)


def _map(f, *trees) -> Any:
    return jax.tree.map(f, *trees, is_leaf=lambda x: resting(x) or is_spec(x))


def _kept(names: P) -> tuple[int, ...]:
    """Dimensions with a scale of their own: the stacking ones and the output channel."""
    return (*(i for i, n in enumerate(names) if n in ("layers", "bank")), len(names) - 1)


def _quantize(w, names: P):
    import qwix

    return qwix.quantize(materialise(w), jnp.int8, channelwise_axes=_kept(names))


def _axes(names: P, w):
    """The logical names of a leaf's parts."""
    if not resting(w):
        return names
    kept = _kept(names)
    return dataclasses.replace(
        w, qvalue=names, scale=P(*(n if i in kept else None for i, n in enumerate(names)))
    )
