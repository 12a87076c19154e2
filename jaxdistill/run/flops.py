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
from typing import Any

import jax


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
    _add_flops(total, jaxpr, 1.0, "", recomputed)
    return dict(total)


def _add_flops(
    total: dict[str, float], jaxpr, times: float, role: str, recomputed: bool
) -> None:
    """Adds `times` the operations of `jaxpr` to `total`; `role` is that of its caller."""
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        if "rematted_computation" in stack and not recomputed:
            continue
        kind = eqn.primitive.name
        found = re.findall(r"role=(\w+)", stack)
        owner = found[-1].removeprefix("ema_") if found else role
        if kind == "dot_general":
            total[owner] += times * _dot_flops(eqn)
        elif kind == "conv_general_dilated":
            total[owner] += times * _conv_flops(eqn)
        inner = [part for value in eqn.params.values() for part in _jaxprs(value)]
        if kind == "cond":
            for name, flops in _largest_branch(
                inner, times, owner, recomputed
            ).items():
                total[name] += flops
            continue
        repeats = eqn.params.get("length", 1) if kind == "scan" else 1
        for part in inner:
            _add_flops(total, part, times * repeats, owner, recomputed)


def _largest_branch(
    branches: list, times: float, role: str, recomputed: bool
) -> dict[str, float]:
    """The operations of the branch of a conditional that has most of them."""
    counts = []
    for branch in branches:
        total: dict[str, float] = collections.defaultdict(float)
        _add_flops(total, branch, times, role, recomputed)
        counts.append(total)
    return max(counts, key=lambda total: sum(total.values()))


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
