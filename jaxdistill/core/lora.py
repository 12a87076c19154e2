"""Low-rank adaptation (arXiv:2106.09685): a Net whose weights adapt those of another role.

A matched matrix W becomes W + (alpha / rank) A B. B starts at zero, so that the adapted network
starts as its base. Of a convolution, A is one of the same size to `rank` channels and B one of size
1. Several roles may adapt the same base: teacher, student and fake score of a large model share it.
A base may have adapters itself.

Other leaves may be the role's own as a whole: copies of the base's, or leaves that the base lacks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdistill.core.fields import check_range, expression
from jaxdistill.core.net import (
    Net,
    constant,
    convolutions,
    is_matrix,
    is_quantized,
    is_spec,
    listed,
    materialise,
    path_name,
    paths,
)
from jaxdistill.core.types import Array, Params, Refused


@dataclasses.dataclass(frozen=True)
class Adapter(Net):
    """A Net whose params are {"path/to/kernel": {"a": [..., i, r], "b": [..., r, o]}} for adapted
    matrices and {"path/to/leaf": array} for whole leaves.

    `apply` takes {"base": all weights of the base, "adapter": params}; `bind` finds the base among
    the roles.
    """

    scale: float = 1.0
    under: Net | None = None  # the network of the base
    merged: Net | None = None  # the network of the merged weights
    # paths of the whole leaves that start as the base's; other whole leaves are drawn
    copied: frozenset[str] = frozenset()

    def init(self, key):
        """Fresh weights; leaves that start as the base's are drawn, until `begun` copies them."""
        fresh = {}
        for i, (path, pair) in enumerate(self.pairs.items()):
            a = jax.random.normal(
                jax.random.fold_in(key, i), pair["a"].shape, pair["a"].dtype
            )
            layers = math.prod(pair["b"].shape[:-2])
            inputs = math.prod(pair["a"].shape[:-1]) // layers
            fresh[path] = {
                "a": a / inputs**0.5,
                "b": jnp.zeros(pair["b"].shape, pair["b"].dtype),
            }
        if self.whole_leaves:
            key = jax.random.fold_in(key, len(self.pairs))
            drawn = paths(self.merged.init(key))
            fresh |= {path: drawn[path] for path in self.whole_leaves}
        return fresh

    @functools.cached_property
    def pairs(self) -> dict[str, Params]:
        """Path of each adapted matrix -> the shapes of its factors."""
        return {path: s for path, s in self.shapes.items() if isinstance(s, dict)}

    @functools.cached_property
    def whole_leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path of each leaf that is the role's own as a whole -> its shape."""
        return {
            path: s for path, s in self.shapes.items() if not isinstance(s, dict)
        }

    @property
    def whole(self) -> Net:
        return self.merged

    @property
    def depth(self) -> int:
        return 1 + self.under.depth

    def apply(self, params, *args, method: str = "__call__", **kwargs):
        return super().apply(self._merge(params), *args, method=method, **kwargs)

    def apply_training(self, params, *args, method: str = "__call__", **kwargs):
        weights = self._merge(params)
        out, found = super().apply_training(weights, *args, method=method, **kwargs)
        own = {p: leaf for p, leaf in paths(found).items() if p in self.statistics}
        return out, own

    def bound_weights(self, role, params):
        base = constant(self.under.whole_weights(self.adapts, params))
        return {"base": base, "adapter": params[role]}

    def whole_weights(self, role, params):
        base = self.under.whole_weights(self.adapts, params)
        return self._merge({"base": base, "adapter": params[role]})

    def begun(self, role, params):
        if not self.copied:
            return params[role]
        base = self.under.whole_weights(self.adapts, params)
        leaves = paths(base, is_leaf=is_quantized)
        copies = {}
        for path in self.copied:
            copies[path] = jnp.copy(materialise(leaves[path]).astype(jnp.float32))
        return {**params[role], **copies}

    def weight_of(self, path):
        head, _, factor = path.rpartition("/")
        return head if factor in ("a", "b") and head in self.pairs else path

    def _merge(self, params: Params) -> Params:
        return merge(
            params["base"], params["adapter"], self.scale, self.merged.shapes
        )


def base_of(role: str, base: str, roles: Mapping[str, Any]) -> str:
    """`base`, if the role `role` can adapt its weights.

    Args:
      roles: name -> config of every role.

    Raises:
      Refused: `base` is no role, the role itself, or a role that is adapted to `role`.
    """
    chains = {name: _bases(name, roles) for name in roles if name != role}
    others = [name for name, chain in chains.items() if role not in chain]
    if base in others:
        return base
    if base == role:
        why = "the role itself"
    elif base not in roles:
        why = "no such role"
    else:
        chain = chains[base][: chains[base].index(role) + 1]
        why = f"a circle, {' <- '.join([role, base, *chain])}"
    names = ", ".join(others) or "none"
    raise Refused(f"lora.base={base!r}: {why}; expected another role: {names}")


def _bases(role: str, roles: Mapping[str, Any]) -> list[str]:
    """The base of a role, the base of that, and so on, until a role comes again."""
    found = []
    while role in roles and roles[role].lora.adapts:
        role = roles[role].lora.base
        if role in found:
            break
        found.append(role)
    return found


def adapt(
    net: Net,
    *,
    base: str,
    rank: int,
    alpha: float = 0.0,
    targets: str = r".*kernel",
    full: str = "",
    own: Net | None = None,
) -> Adapter:
    """`net` with adapters of `rank` on the matrices whose path matches `targets`.

    Grouped convolutions have none. All other weights are those of the role `base`, but for leaves
    that match `full` and leaves that `net` lacks.

    Args:
      full: matches the leaves that the role has as a whole, first equal to the base's.
      own: the role's own network; None: that of the base. Leaves that `net` lacks, and leaves of
        another shape that match `full`, start as `own` initialises them.

    Raises:
      Refused: nothing matches; a pattern is no regular expression; a size is out of range; a leaf
        is adapted and whole; or a leaf that does not match `full` has another shape in `own`.
    """
    merged = net.whole if own is None else own.whole
    _check_numbers(base, rank, alpha, full)
    adapted = expression(targets if rank else "", "lora.targets=")
    copied = expression(full, "lora.full=")
    there = paths(net.whole.shapes)
    axes_of = paths(merged.axes, is_leaf=is_spec)
    kernels = convolutions(merged)
    pairs = {}
    whole = {}
    axes = {}
    for path, shape in paths(merged.shapes).items():
        names = axes_of[path] or (None,) * len(shape.shape)
        conv = kernels.get(path)
        is_new = path not in there or there[path].shape != shape.shape
        is_full = copied.fullmatch(path) is not None
        is_adapted = (
            adapted.fullmatch(path) is not None
            and is_matrix(names)
            and (conv is None or conv.groups == 1)
        )
        if is_new and path in there and not is_full:
            raise Refused(
                f"lora.full={full!r}: {path} is {list(shape.shape)} in the role and"
                f" {list(there[path].shape)} in lora.base={base!r}; expected equal shapes, or a"
                " pattern that matches it"
            )
        if is_full and is_adapted and not is_new:
            raise Refused(
                f"lora.full={full!r}: {path} has adapters too (lora.targets={targets!r});"
                " expected patterns without a common weight"
            )
        if is_new or is_full:
            whole[path] = jax.ShapeDtypeStruct(shape.shape, jnp.float32)
            axes[path] = axes_of[path]
        elif is_adapted:
            axis_count = conv.axes if conv is not None else 0
            pairs[path] = _pair_shapes(shape.shape, rank, axis_count)
            axes[path] = _pair_axes(names, axis_count)
    _check_matches(net.whole, base, rank, targets, full, copied, pairs, whole)
    from_base = [
        p for p in whole if p in there and there[p].shape == whole[p].shape
    ]
    return Adapter(
        merged.build,
        merged.graphdef,
        {**pairs, **whole},
        axes,
        merged.wrap,
        merged.config,
        base,
        merged.statistics.intersection(whole),
        scale=(alpha or rank) / rank if rank else 1.0,
        under=net,
        merged=merged,
        copied=frozenset(from_base),
    )


def _check_numbers(base: str, rank: int, alpha: float, full: str) -> None:
    """Raises Refused where a field of `adapt` is out of range."""
    least = 0 if full else 1
    check_range(
        "lora.rank",
        rank,
        "an integer of 0 or more" if full else "a positive integer",
        lambda v: v >= least,
        kind=numbers.Integral,
    )
    check_range(
        "lora.alpha",
        alpha,
        "0 (for the rank) or a number above it",
        lambda v: v >= 0,
    )
    if not isinstance(base, str) or not base:
        raise Refused(f"lora.base={base!r}: expected the role that has the weights")


def _check_matches(
    net: Net,
    base: str,
    rank: int,
    targets: str,
    full: str,
    copied: re.Pattern,
    pairs: Mapping[str, Any],
    whole: Mapping[str, Any],
) -> None:
    """Raises Refused where a pattern matches nothing, or nothing is trained."""
    of_base = f"lora.base={base!r}: {listed(paths(net.shapes))}"
    if rank and targets and not pairs:
        raise Refused(f"lora.targets={targets!r} matches no matrix of {of_base}")
    if full and not any(map(copied.fullmatch, whole)):
        raise Refused(f"lora.full={full!r} matches no weight of {of_base}")
    if not pairs and not whole:
        raise Refused(
            f"lora.targets={targets!r}: nothing is trained; expected a pattern there or in"
            f" lora.full; of {of_base}"
        )


def _pair_shapes(shape: Sequence[int], rank: int, axis_count: int) -> Params:
    """The shapes of a kernel's factors; its spatial axes are the last but two."""
    *lead, i, o = shape
    layers = lead[: len(lead) - axis_count]
    ones = [1] * axis_count
    like = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    return {"a": like(*lead, i, rank), "b": like(*layers, *ones, rank, o)}


def _pair_axes(names: Sequence[str | None], axis_count: int) -> Params:
    """The logical axis names of a kernel's factors."""
    *lead, i, o = names
    layers = lead[: len(lead) - axis_count]
    ones = [None] * axis_count
    return {"a": P(*lead, i, None), "b": P(*layers, *ones, None, o)}


class Part(NamedTuple):
    """One of several adapters on the same base."""

    adapter: Params
    scale: float  # alpha / rank
    weight: float = 1.0  # its share of the sum


def merge(
    base: Params, adapter: Params, scale: float, shapes: Params | None = None
) -> Params:
    """The weights of the base with an adapter added, as they are exported.

    Arguments as of `combined`.
    """
    return combined(base, [Part(adapter, scale)], shapes)


def combined(
    base: Params, parts: Sequence[Part], shapes: Params | None = None
) -> Params:
    """The weights of the base with a weighted sum of adapters.

    A matrix is W + sum_i w_i scale_i A_i B_i. A whole leaf is W + sum_i w_i (F_i - W); one adapter
    with the weight 1 gives F to the bit. Leaves without an adapter of a weight other than 0 are the
    base's own arrays.

    Args:
      base: all weights of the base.
      shapes: a tree like the result; None: like the base.

    Raises:
      Refused: a leaf that the base lacks is not in exactly one adapter, with the weight 1.
    """
    there = paths(base, is_leaf=is_quantized)

    def leaf(path: Any, _: Any) -> Any:
        name = path_name(path)
        changes = [part for part in parts if name in part.adapter]
        weighty = [part for part in changes if not _is_zero(_factor(part, name))]
        if name in there and not weighty:
            return there[name]
        if len(weighty) == 1 and _is_exact(weighty[0], name):
            return weighty[0].adapter[name]
        w = materialise(there[name]) if name in there else None
        for part in changes:
            _check_summed(name, part, w)
        return _summed(name, w, weighty)

    tree = base if shapes is None else shapes
    return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=is_quantized)


def _is_zero(value: Any) -> bool:
    """Whether a number is zero when the program is traced."""
    return isinstance(value, numbers.Number) and value == 0


def _factor(part: Part, name: str) -> Any:
    """The factor of an adapter's change of a leaf."""
    is_pair = isinstance(part.adapter[name], Mapping)
    return part.weight * part.scale if is_pair else part.weight


def _is_exact(part: Part, name: str) -> bool:
    """Whether a leaf is that of an adapter itself: a whole leaf with the weight 1."""
    is_pair = isinstance(part.adapter[name], Mapping)
    return (
        not is_pair and isinstance(part.weight, numbers.Number) and part.weight == 1
    )


def _check_summed(name: str, part: Part, w: Array | None) -> None:
    """Raises Refused where the base has no such leaf that an adapter's leaf could be mixed with."""
    change = part.adapter[name]
    if isinstance(change, Mapping):
        return
    if w is None or w.shape != change.shape:
        raise Refused(
            f"adapters: {name} is not in their base; expected it in one adapter, with the weight"
            " 1 and no other"
        )


def _summed(name: str, w: Array, parts: Sequence[Part]) -> Array:
    """W with the changes of several adapters."""
    total = w
    for part in parts:
        change = part.adapter[name]
        if isinstance(change, Mapping):
            term = _factor(part, name) * change["a"] @ change["b"]
        else:
            term = part.weight * (change - w)
        total = total + term.astype(w.dtype)
    return total
