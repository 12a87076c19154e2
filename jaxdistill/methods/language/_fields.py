"""Fields of language methods: which ones a class has no use for, in what range shares lie, what
schedules say at a step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from jaxdistill.core.types import Ctx, Nets, Out, Refused, lookup
from jaxdistill.objectives.divergence import SUPPORTS, TAILS
from jaxdistill.objectives.schedule import bounds, settled


def refuse_unused(method: Any) -> None:
    """Raises Refused where one of `method.unused`, inherited fields that this class does not read,
    is not as it was.
    """
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name in method.unused and value != field.default:
            given = f"method.{field.name}={value!r}"
            raise Refused(f"{given}: expected {field.default!r}, for {method.unused[field.name]}")


def check_shares(method: Any) -> None:
    """Raises Refused on a temperature, a share or a choice of tokens that no divergence on logits
    has."""
    least, most = bounds(method.temperature)
    if not 0 < least <= most < math.inf:
        raise Refused(f"method.temperature={method.temperature}: expected a number above 0")
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


def changing(loss: Callable[[Any, Nets, Ctx], Out]) -> Callable[[Any, Nets, Ctx], Out]:
    """A method's loss that sees, in place of schedules, their numbers at the step at hand."""

    @functools.wraps(loss)
    def at_step(self: Any, net: Nets, ctx: Ctx) -> Out:
        return loss(settled(self, ctx.step), net, ctx)

    return at_step
