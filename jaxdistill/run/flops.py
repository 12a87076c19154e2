"""Arithmetic of a program, counted on its jaxpr with scan lengths multiplied in, by role.

XLA's own cost analysis counts the body of a scan once. Operations carry the role that they belong
to in their name stack (`Net.bind`), backward passes included, so that the count splits into
student, teacher, fake, ...
"""

from __future__ import annotations

import collections
import math
import re

import jax


def count(jaxpr: jax.core.Jaxpr, *, recomputed: bool = False) -> dict[str, float]:
    """Floating-point operations of matrix products and convolutions in a traced program, by role
    ("" for the rest).

    What rematerialisation computes again is left out, so that these are model flops, unless
    `recomputed`.
    """
    total: dict[str, float] = collections.defaultdict(float)
    _walk(jaxpr, 1.0, "", total, recomputed)
    return dict(total)


def _walk(jaxpr, times: float, role: str, total, recomputed: bool) -> None:
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        if "rematted_computation" in stack and not recomputed:
            continue
        found = re.findall(r"role=(\w+)", stack)
        mine = found[-1].removeprefix("ema_") if found else role
        if eqn.primitive.name == "dot_general":
            total[mine] += times * _dot(eqn)
        elif eqn.primitive.name == "conv_general_dilated":
            total[mine] += times * _conv(eqn)
        inner = [p for value in eqn.params.values() for p in _jaxprs(value)]
        if eqn.primitive.name == "cond":
            branches = []
            for branch in inner:
                branches.append(collections.defaultdict(float))
                _walk(branch, times, mine, branches[-1], recomputed)
            for name, flops in max(branches, key=lambda b: sum(b.values())).items():
                total[name] += flops
            continue
        repeat = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for part in inner:
            _walk(part, times * repeat, mine, total, recomputed)


def _jaxprs(value):
    for item in value if isinstance(value, (tuple, list)) else (value,):
        item = getattr(item, "jaxpr", item)
        if hasattr(item, "eqns"):
            yield item


def _dot(eqn) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    return (
        2.0
        * math.prod(eqn.outvars[0].aval.shape)
        * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
    )


def _conv(eqn) -> float:
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return (
        2.0
        * math.prod(eqn.outvars[0].aval.shape)
        * math.prod(kernel)
        / out_features
        / eqn.params["batch_group_count"]
    )
