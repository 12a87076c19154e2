"""What a method or a network needs of a batch, as typed shapes, and the check of what there is.

A need is a jaxtyping annotation of `Spec`: `Int[Spec, "B T"]`. Axes of one name have one length
over all needs of a mapping; `*name` stands for any number of axes.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import jaxtyped

from jaxdistill.core.types import Refused

Spec = jax.ShapeDtypeStruct
# name -> a jaxtyping annotation of Spec, or a mapping of such
Needs = Mapping[str, Any]


def check_needs(
    given: Mapping[str, Any], needs: Needs, who: str, where: str
) -> None:
    """Raises Refused where `given` (name -> Spec or a mapping of these) lacks or misfits a need.

    `who` needs it ("DMD2"); `where` is what gives it, as messages name it ("config.data").
    """
    with jaxtyped("context"):
        _check(given, needs, who, where)


def _check(given: Mapping[str, Any], needs: Needs, who: str, where: str) -> None:
    for name, need in needs.items():
        if name not in given:
            instead = _instead(name, given, needs)
            raise Refused(
                f"{where}: {who} needs {name!r} {_shown(need)} in a batch{instead}"
            )
        if isinstance(need, Mapping):
            if not isinstance(given[name], Mapping):
                raise Refused(
                    f"{where}: {name!r} is one array, {who} needs {', '.join(need)}"
                )
            _check(given[name], need, who, f"{where}[{name!r}]")
            continue
        several = isinstance(given[name], tuple | list)
        for found in given[name] if several else (given[name],):
            if isinstance(found, need):
                continue
            had = _found(found)
            raise Refused(f"{where}: {name!r} is {had}, {who} needs {_shown(need)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """What a network reads of its condition `cond`, for its config's property `condition`.

    The condition is a mapping with the entries of `needs` and any of `optional`, or one array where
    `array` says so (labels).
    """

    needs: Needs = dataclasses.field(default_factory=dict)
    optional: Needs = dataclasses.field(default_factory=dict)
    # the need of a condition that is one array; None: it must be a mapping
    array: Any = None
    required: bool = True  # False: the network also runs without a condition
    # entries that other sizes of the family read: refused here
    unread: tuple[str, ...] = ()


def condition_of(config: Any) -> Condition | None:
    """What the network of a model's config reads of its condition; None where it reads none."""
    return getattr(config, "condition", None)


def check_condition(
    given: Any, condition: Condition | None, who: str, where: str = "cond"
) -> None:
    """Raises Refused where a condition is not what a network reads.

    Args:
        given: arrays or Specs: one, a mapping of these by name, or None. An entry may be a tuple.
        condition: what the network reads; None: nothing, and then everything is accepted.
        who: the network, as messages name it.
        where: what gives the condition, as messages name it.
    """
    if condition is None:
        return
    if given is None:
        if condition.required:
            wanted = _shown(condition.needs or condition.array)
            raise Refused(f"{where}: there is none, {who} needs {wanted}")
        return
    given = jax.tree.map(_spec, given)
    if isinstance(given, Spec):
        if condition.array is None:
            raise Refused(
                f"{where} is one array, {who} needs {_shown(condition.needs)}"
            )
        if not isinstance(given, condition.array):
            wanted = _shown(condition.array)
            raise Refused(f"{where} is {_found(given)}, {who} needs {wanted}")
        return
    for name in condition.unread:
        if name in given:
            has = ", ".join(sorted(given))
            raise Refused(f"{where}: {name!r} is not read by {who}; it has {has}")
    optional = {
        name: need for name, need in condition.optional.items() if name in given
    }
    check_needs(given, {**condition.needs, **optional}, who, where)


def _spec(x: Any) -> Spec:
    """Shape and dtype of an array, a Spec or a Python number."""
    return Spec(np.shape(x), x.dtype if hasattr(x, "dtype") else np.result_type(x))


def _instead(name: str, given: Mapping[str, Any], needs: Needs) -> str:
    """The end of a message on a name that is missing: what there is."""
    others = [key for key in given if key not in needs]
    close = difflib.get_close_matches(name, others, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(sorted(given)) or 'nothing'}"


def _found(x: Any) -> str:
    """What stands in place of a need, in words: "float32 [4, 77, 768]"."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Spec) else "a group"


def _shown(need: Any) -> str:
    """A need in words: "float [B 77 768]"."""
    if isinstance(need, Mapping):
        return f"({', '.join(need)})"
    kind = need.__name__.partition("[")[0].lower()
    kind = {"shaped": "array", "num": "number"}.get(kind, kind)
    return f"{kind} [{need.dim_str.strip()}]"
