"""Fields of language methods: their ranges, and inherited ones that a class does not use."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxtyping import Int, Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Refused, lookup
from jaxdistill.objectives.divergence import SUPPORTS, TAILS
from jaxdistill.objectives.schedule import bounds

# What methods on text need of a batch; `mask` is above 0 at tokens that are targets.
TEXT = {"tokens": Int[Spec, "B T"], "mask": Shaped[Spec, "B T"]}


def refuse_unused(method: Any) -> None:
    """Raises Refused where a field in `method.unused` does not have its default value.

    `unused` names inherited fields that the class does not read, with the reason.
    """
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name in method.unused and value != field.default:
            given = f"method.{field.name}={value!r}"
            raise Refused(
                f"{given}: expected {field.default!r}, for {method.unused[field.name]}"
            )


def check_divergence_fields(method: Any) -> None:
    """Raises Refused where fields of a divergence on logits are out of range.

    These are temperature, hard_weight, support, tail, top_k and chunk of a `KD`.
    """
    least, most = bounds(method.temperature)
    if not 0 < least <= most < math.inf:
        raise Refused(
            f"method.temperature={method.temperature}: expected a number above 0"
        )
    least, most = bounds(method.hard_weight)
    if not 0 <= least <= most <= 1:
        raise Refused(f"method.hard_weight={method.hard_weight}: expected 0 to 1")
    lookup(dict.fromkeys(SUPPORTS), method.support, "method.support")
    lookup(dict.fromkeys(TAILS), method.tail, "method.tail")
    chosen = (method.support, method.tail) != (SUPPORTS[0], TAILS[0])
    if chosen and not method.top_k and "top_k" not in method.unused:
        given = f"method.support={method.support!r}, method.tail={method.tail!r}"
        raise Refused(f"{given}: need method.top_k above 0")
    if method.top_k < 0 or method.chunk < 0:
        given = f"method.top_k={method.top_k}, method.chunk={method.chunk}"
        raise Refused(f"{given}: expected 0 or more")


def teacher_roles(count: int) -> tuple[str, ...]:
    """teacher, teacher1, teacher2, ...: the names of `count` teachers."""
    return ("teacher", *(f"teacher{i}" for i in range(1, count)))
