"""What the fields of a config's dataclasses may hold: types, and ranges of numbers.

`problem` compares a value with the annotation of its field. What involves several fields is checked
by the class itself, in `__post_init__`, which raises `Refused`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np

from jaxdistill.core.types import Refused, quoted

# of an int that names no range: what indexes an axis, counts updates
LARGEST = 2**31 - 1
LARGEST_FLOAT = float(np.finfo(np.float32).max)
# smaller numbers become 0 on most chips
SMALLEST = float(np.finfo(np.float32).tiny)


def expression(
    text: Any, where: str, problem: str = " is no regular expression"
) -> re.Pattern:
    """The regular expression `text`.

    Raises Refused where it is none; the message begins with `where`, the text and `problem`.
    """
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise Refused(f"{where}{text!r}{problem}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; with `above`, `low` is excluded."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    infinite: bool = False  # whether an infinity counts as a number

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range; NaN lies in none."""
        if math.isinf(value) and not self.infinite:
            return False
        return (
            self.low < value if self.above else self.low <= value
        ) and value <= self.high

    def __str__(self) -> str:
        text = ""
        if not math.isinf(self.low):
            relation = "above" if self.above else "of at least"
            text += f" {relation} {_number(self.low)}"
        if not math.isinf(self.high) and self.high != LARGEST:
            text += f" and at most {_number(self.high)}"
        return text


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


Count = Annotated[int, Range(1, LARGEST)]
# 0 switches something off, or is a first index
Natural = Annotated[int, Range(0, LARGEST)]
Depth = Annotated[int, Range(1, 1000)]  # layers that are built one by one
# of the engine: each is asked which turns are active
Steps = Annotated[int, Range(1, 10**7)]
Real = Annotated[float, Range()]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Limit = Annotated[float, Range(0, infinite=True)]  # inf: none
Share = Annotated[float, Range(0, 1)]
Dropout = Annotated[float, Range(0, 0.99)]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
# what a forward pass keeps: models.layers
Remat = Literal["none", "full", "dots", "dots_no_batch"]


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Field -> its annotation, with the ranges that `Annotated` adds."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {
        f.name: _with_sign(found[f.name], f.default)
        for f in dataclasses.fields(cls)
    }


def _with_sign(hint: Any, default: Any) -> Any:
    """The annotation of an int without a range, with the range that its default implies.

    A default of 1 or more means at least 1, a default of 0 at least 0, and a default of -1 at least
    -1, which stands for "none".
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
    """An integer in a field of floats as a float; every other value unchanged."""
    hint = hints(cls)[field]
    base = (
        typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    )
    return float(value) if base is float and type(value) is int else value


def shown(value: Any) -> str:
    """A value of a config as a message quotes it."""
    return quoted(value.to_dict() if hasattr(value, "to_dict") else value)


def _problem(hint: Any, value: Any, bounded: bool = False) -> str:
    """What is wrong with a value of this annotation; "" where nothing is.

    `bounded`: a range is checked as well, and says whether an infinity is allowed.
    """
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin is Annotated:
        return _problem(inner[0], value, bounded=True) or _outside(inner, value)
    if origin in (typing.Union, types.UnionType):
        found = [_problem(one, value) for one in inner]
        if "" in found:
            return ""
        return " or ".join(
            [found[0], *(f.removeprefix("expected ") for f in found[1:])]
        )
    if origin is Literal:
        return (
            ""
            if value in inner and type(value) in map(type, inner)
            else _one_of(inner, value)
        )
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
    names = {
        int: "an integer",
        float: "a finite number",
        str: "text",
        bool: "true or false",
    }
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _one_of(choices: tuple, value: Any) -> str:
    *others, last = map(repr, choices)
    close = (
        difflib.get_close_matches(value, choices, 1)
        if isinstance(value, str)
        else []
    )
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
    return next(
        (f.replace("expected ", "expected a list, each ", 1) for f in found if f),
        "",
    )


def _problem_of_mapping(inner: tuple, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return "expected a group of names and values"
    found = (
        ((key, _problem(inner[1], part)) for key, part in value.items())
        if inner
        else ()
    )
    return next((f"{key}: {text}" for key, text in found if text), "")


def _problem_of_class(hint: type, value: Any, bounded: bool) -> str:
    if hint is bool:
        return "" if isinstance(value, bool) else "expected true or false"
    if hint is int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return "" if whole else "expected an integer"
    if hint is float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return "expected a number"
        return "" if math.isfinite(value) or bounded else "expected a finite number"
    if hint in (object, Any) or isinstance(value, hint):
        return ""
    return f"expected {_noun(hint) if hint is str else 'a ' + hint.__name__}"


def check_range(
    name: str,
    value: Any,
    expected: str,
    holds: Callable[[Any], bool],
    kind: type = numbers.Real,
) -> None:
    """Raises Refused unless `value` is a `kind` (numbers.Real | numbers.Integral) that float32
    holds, and `holds` says so.
    """
    most = LARGEST if kind is numbers.Integral else LARGEST_FLOAT
    sound = (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and -most <= value <= most
    )
    if not sound or not holds(value):
        raise Refused(f"{name}={value!r}: expected {expected}")
    if not holds(in_float32(value)):
        raise Refused(
            f"{name}={value!r}: is {in_float32(value):g} in float32, expected {expected}"
        )


def in_float32(value: float) -> float:
    """`value` rounded to float32, with 0 in place of subnormal numbers."""
    rounded = float(np.float32(value))
    return rounded if abs(rounded) >= SMALLEST else 0.0
