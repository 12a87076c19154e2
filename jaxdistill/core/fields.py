"""What the fields of a config's dataclasses may hold: Python's types, and ranges where a type is
too wide.

`problem` holds a value against the annotation of its field. A class says more than its types in
`__post_init__`, which raises `Refused`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

LARGEST = 2**31 - 1  # of an int that names no range: what indexes an axis


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `low` itself is not where `above` is set."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    infinite: bool = False  # whether an infinity counts as a number

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range; NaN lies in none."""
        if math.isinf(value) and not self.infinite:
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        show = lambda number: f"{number:,}" if isinstance(number, int) else f"{number:g}"
        low = f"above {show(self.low)}" if self.above else f"of at least {show(self.low)}"
        low = "" if math.isinf(self.low) else f" {low}"
        high = (
            ""
            if math.isinf(self.high) or self.high == LARGEST
            else f" and at most {show(self.high)}"
        )
        return low + high


Count = Annotated[int, Range(1, LARGEST)]
Natural = Annotated[int, Range(0, LARGEST)]  # 0 switches something off, or is a first index
Depth = Annotated[int, Range(1, 1000)]  # layers that are built one by one
Steps = Annotated[int, Range(1, 10**7)]  # of the engine: each is asked which turns are active
Real = Annotated[float, Range()]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Limit = Annotated[float, Range(0, infinite=True)]  # inf: none
Share = Annotated[float, Range(0, 1)]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Remat = Literal["none", "full", "dots", "dots_no_batch"]  # what a forward pass keeps: models.layers


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Field -> its annotation, with what `Annotated` adds to it."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {f.name: _with_sign(found[f.name], f.default) for f in dataclasses.fields(cls)}


def _with_sign(hint: Any, default: Any) -> Any:
    """An int that names no range is a count where its default is one: it keeps the default's sign.

    Default 1 or more: at least 1. Default 0: at least 0. Default -1: at least -1, which stands for
    "none".
    """
    if hint is not int or not isinstance(default, int) or isinstance(default, bool):
        return hint
    return Annotated[int, Range(max(-1, min(default, 1)), LARGEST)]


def problem(cls: type, field: str, value: Any) -> str:
    """ "expected ..." where `value` does not fit the field's annotation; "" where it does."""
    given = cls.__dataclass_fields__[field]
    if value is given.default or (
        isinstance(value, (float, tuple)) and repr(value) == repr(given.default)
    ):
        return ""  # what the class itself says, such as inf for "no limit"
    return _problem(hints(cls)[field], value)


def coerced(cls: type, field: str, value: Any) -> Any:
    """A whole number for a field of floats as a float; every other value as it is."""
    hint = hints(cls)[field]
    base = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return float(value) if base is float and type(value) is int else value


def shown(value: Any) -> str:
    """A value as a message quotes it, of bounded length and on one line."""
    plain = value.to_dict() if hasattr(value, "to_dict") else value
    return " ".join(reprlib.repr(plain).split())


def _problem(hint: Any, value: Any, bounded: bool = False) -> str:
    """`bounded`: a range says the rest, whether an infinity is a number among it."""
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin is Annotated:
        return _problem(inner[0], value, bounded=True) or _outside(inner, value)
    if origin in (typing.Union, types.UnionType):
        found = [_problem(one, value) for one in inner]
        return (
            ""
            if "" in found
            else " or ".join([found[0], *(f.removeprefix("expected ") for f in found[1:])])
        )
    if origin is Literal:
        return "" if value in inner and type(value) in map(type, inner) else _one_of(inner, value)
    if origin is tuple:
        return _problem_of_tuple(inner, value)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return _problem_of_mapping(inner, value)
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        return "" if callable(value) else "expected a function"
    if hint is None or hint is type(None):
        return "" if value is None else "expected nothing"
    if not isinstance(hint, type):
        return ""
    return _problem_of_class(hint, value, bounded)


def _outside(inner: tuple, value: Any) -> str:
    for bound in inner[1:]:
        if isinstance(bound, Range) and not bound.holds(value):
            return f"expected {_noun(inner[0])}{bound}"
    return ""


def _noun(hint: Any) -> str:
    names = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _one_of(choices: tuple, value: Any) -> str:
    *others, last = map(repr, choices)
    close = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
    near = f"; did you mean {close[0]!r}?" if close else ""
    return f"expected {', '.join(others)}{' or ' if others else ''}{last}{near}"


def _problem_of_tuple(inner: tuple, value: Any) -> str:
    if not isinstance(value, (tuple, list)):
        return "expected a list"
    if inner[-1:] == (Ellipsis,):
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        return f"expected a list of {len(inner)}"
    found = (_problem(one, v) for one, v in zip(inner, value))
    return next((f.replace("expected ", "expected a list, each ", 1) for f in found if f), "")


def _problem_of_mapping(inner: tuple, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return "expected a group of names and values"
    found = ((key, _problem(inner[1], part)) for key, part in value.items()) if inner else ()
    return next((f"{key}: {text}" for key, text in found if text), "")


def _problem_of_class(hint: type, value: Any, bounded: bool) -> str:
    if hint is bool:
        return "" if isinstance(value, bool) else "expected true or false"
    if hint is int:
        return (
            ""
            if isinstance(value, numbers.Integral) and not isinstance(value, bool)
            else "expected an integer"
        )
    if hint is float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return "expected a number"
        return "" if math.isfinite(value) or bounded else "expected a finite number"
    if hint in (object, Any) or isinstance(value, hint):
        return ""
    return f"expected {_noun(hint) if hint is str else 'a ' + hint.__name__}"
