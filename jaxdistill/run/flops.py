"""Floating-point operations of a program by role, counted on its jaxpr.

The body of a scan counts as often as it runs; XLA's own cost analysis counts it once. Operations,
those of backward passes included, have the role that they belong to in their name stack
(`Net.bind`), so that the count splits into student, teacher, fake, ...
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Product(NamedTuple):
    """A matrix product or a convolution of a traced program."""

    eqn: Any  # its equation
    role: str  # that it belongs to; "" for none
    times: int  # how often the program runs it


def count(jaxpr: jax.core.Jaxpr, *, recomputed: bool = False) -> dict[str, float]:
    """Operations of the matrix products and convolutions of a traced program.

    Args:
        jaxpr: The traced program.
        recomputed: Whether to count what rematerialisation computes again. Without it these are
            model flops.

    Returns:
        Role -> operations; "" for those of no role.
    """
    total: dict[str, float] = collections.defaultdict(float)
    for product in products(jaxpr, recomputed=recomputed):
        total[product.role] += product.times * operations(product.eqn)
    return dict(total)


def products(jaxpr: jax.core.Jaxpr, *, recomputed: bool = False) -> list[Product]:
    """The matrix products and convolutions of a traced program, in its order.

    Of a conditional, they are those of the branch with most operations.

    Args:
        jaxpr: The traced program.
        recomputed: Whether to list what rematerialisation computes again.
    """
    found: list[Product] = []
    _add_products(found, jaxpr, 1, "", recomputed)
    return found


def operations(eqn: Any) -> float:
    """Floating-point operations of one matrix product or convolution."""
    return _OPERATIONS[eqn.primitive.name](eqn)


def _add_products(
    found: list[Product], jaxpr, times: int, role: str, recomputed: bool
) -> None:
    """Appends the products of `jaxpr`, which runs `times` times; `role` is that of its caller."""
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        if "rematted_computation" in stack and not recomputed:
            continue
        kind = eqn.primitive.name
        names = re.findall(r"role=(\w+)", stack)
        owner = names[-1].removeprefix("ema_") if names else role
        if kind in _OPERATIONS:
            found.append(Product(eqn, owner, times))
        inner = [part for value in eqn.params.values() for part in _jaxprs(value)]
        if kind == "cond":
            found += _largest_branch(inner, times, owner, recomputed)
            continue
        repeats = eqn.params.get("length", 1) if kind == "scan" else 1
        for part in inner:
            _add_products(found, part, times * repeats, owner, recomputed)


def _largest_branch(
    branches: list, times: int, role: str, recomputed: bool
) -> list[Product]:
    """The products of the branch of a conditional that has most operations."""

    def total(branch: list[Product]) -> float:
        return sum(product.times * operations(product.eqn) for product in branch)

    lists = []
    for branch in branches:
        found: list[Product] = []
        _add_products(found, branch, times, role, recomputed)
        lists.append(found)
    return max(lists, key=total)


def _jaxprs(value: Any) -> Iterator[jax.core.Jaxpr]:
    """The jaxprs in a parameter of an equation: the value itself, or members of a sequence."""
    items = value if isinstance(value, (tuple, list)) else (value,)
    for item in items:
        jaxpr = getattr(item, "jaxpr", item)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr


def _dot_flops(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    outputs = math.prod(eqn.outvars[0].aval.shape)
    return 2.0 * outputs * math.prod(left[axis] for axis in contracted)


def _conv_flops(eqn) -> float:
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    products = 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel)
    return products / out_features / eqn.params["batch_group_count"]


_OPERATIONS = {"dot_general": _dot_flops, "conv_general_dilated": _conv_flops}
