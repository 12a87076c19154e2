"""Low-rank adaptation (arXiv:2106.09685): a Net whose weights adapt those of another role.

A matched matrix W becomes W + (alpha / rank) A B. B starts at zero, so that the adapted network
starts as its base. Several roles may adapt the same frozen base: teacher, student and fake score of
a large model share it.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdistill.core.fields import check_range
from jaxdistill.core.net import (
    Net,
    is_matrix,
    is_quantized,
    is_spec,
    listed,
    materialise,
    path_name,
    paths,
    scoped,
)
from jaxdistill.core.types import Params, Refused


@dataclasses.dataclass(frozen=True)
class Adapter(Net):
    """A Net whose params are {"path/to/kernel": {"a": [..., i, r], "b": [..., r, o]}}.

    `apply` takes {"base": ..., "adapter": ...}; `bind` finds the base among the roles.
    """

    scale: float = 1.0

    def init(self, key):
        fresh = {}
        for i, (path, pair) in enumerate(self.shapes.items()):
            a = jax.random.normal(
                jax.random.fold_in(key, i), pair["a"].shape, pair["a"].dtype
            )
            fresh[path] = {
                "a": a / pair["a"].shape[-2] ** 0.5,
                "b": jnp.zeros(pair["b"].shape, pair["b"].dtype),
            }
        return fresh

    def apply(self, params, *args, method: str = "__call__", **kwargs):
        merged = merge(params["base"], params["adapter"], self.scale)
        return super().apply(merged, *args, method=method, **kwargs)

    def bind(self, role, params):
        own = {"base": params[self.adapts], "adapter": params[role]}
        return scoped(role, functools.partial(self.apply, own), self.config)


def base_of(role: str, base: str, roles: Mapping[str, Any]) -> str:
    """`base`, if the role `role` can adapt its weights.

    Args:
      roles: name -> config of every role.

    Raises:
      Refused: `base` is no role, the role itself, or has adapters too.
    """
    others = [
        name for name, other in roles.items() if name != role and not other.lora.rank
    ]
    if base in others:
        return base
    if base == role:
        why = "the role itself"
    elif base not in roles:
        why = "no such role"
    else:
        why = "it has adapters too"
    names = ", ".join(others) or "none"
    raise Refused(
        f"lora.base={base!r}: {why}; expected one with full weights: {names}"
    )


def adapt(
    net: Net, *, base: str, rank: int, alpha: float = 0.0, targets: str = r".*kernel"
) -> Adapter:
    """`net` with adapters of `rank` on the matrices whose path matches `targets`.

    All other weights are those of the role `base`.

    Raises:
      Refused: nothing matches, `targets` is no regular expression, or a size is out of range.
    """
    check_range(
        "lora.rank",
        rank,
        "a positive integer",
        lambda v: v >= 1,
        kind=numbers.Integral,
    )
    check_range(
        "lora.alpha", alpha, "0 (for the rank) or a number above it", lambda v: v >= 0
    )
    if not isinstance(base, str) or not base:
        raise Refused(f"lora.base={base!r}: expected the role that has the weights")
    try:
        wanted = re.compile(targets)
    except (re.error, TypeError) as error:
        raise Refused(
            f"lora.targets={targets!r} is no regular expression: {error}"
        ) from None
    shapes = {}
    axes = {}
    names_of = paths(net.axes, is_leaf=is_spec)
    for path, shape in paths(net.shapes).items():
        matrix = (
            is_matrix(names_of[path]) if names_of[path] else len(shape.shape) >= 2
        )
        if not matrix or not wanted.fullmatch(path):
            continue
        *lead, i, o = shape.shape
        *names, ni, no = names_of[path] or (None,) * len(shape.shape)
        like = lambda *dims: jax.ShapeDtypeStruct((*lead, *dims), jnp.float32)
        shapes[path] = {"a": like(i, rank), "b": like(rank, o)}
        axes[path] = {"a": P(*names, ni, None), "b": P(*names, None, no)}
    if not shapes:
        raise Refused(
            f"lora.targets={targets!r} matches no matrix of lora.base={base!r}:"
            f" {listed(net.shapes)}"
        )
    return Adapter(
        net.build,
        net.graphdef,
        shapes,
        axes,
        net.wrap,
        net.config,
        base,
        scale=(alpha or rank) / rank,
    )


def merge(base: Params, adapter: Params, scale: float) -> Params:
    """The weights of the base with the adapters added, as they are exported."""

    def leaf(path, w):
        pair = adapter.get(path_name(path))
        if pair is None:
            return w
        w = materialise(w)
        return w + (scale * pair["a"] @ pair["b"]).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(leaf, base, is_leaf=is_quantized)
