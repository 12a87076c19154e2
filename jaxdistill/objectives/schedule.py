"""Numbers of a loss that change during training: weights, temperatures, the beta of a divergence.

A field of type `float | Schedule` takes a schedule in place of a number; `settled` replaces the
schedules of an object by their numbers at a step.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from jaxdistill.core.types import Array, Ctx, Nets, Out, Refused

Fields = TypeVar("Fields")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of all schedules: `start` at step 0, `end` from step `steps` on.

    A subclass gives `progress`.
    """

    start: float
    end: float
    steps: int  # engine steps from start to end

    def __post_init__(self):
        if self.steps < 1:
            raise Refused(
                f"{type(self).__name__}: steps={self.steps}, expected a positive integer"
            )

    def __call__(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """The value at an engine step, float32 (float64 where that is enabled)."""
        share = jnp.clip(
            jnp.asarray(step, jnp.result_type(float)) / self.steps, 0.0, 1.0
        )
        return self.start + (self.end - self.start) * self.progress(share)

    def progress(self, share: Float[Array, ""]) -> Float[Array, ""]:
        """The share of the way from start to end after this share of the steps: 0 at 0, 1 at 1."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """From start to end at a constant rate."""

    def progress(self, share):
        return share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """(1 - cos(pi share)) / 2, which is slow at both ends.

    From 1 to 0, (1 + cos(pi / 4)) / 2 = 0.8535534 is left after a quarter of the steps.
    """

    def progress(self, share):
        return 0.5 * (1.0 - jnp.cos(jnp.pi * share))


def scheduled(value: Any) -> bool:
    """Whether a field's value is a schedule, or an object or a mapping with one inside."""
    if isinstance(value, Schedule):
        return True
    if isinstance(value, Mapping):
        return any(scheduled(entry) for entry in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(
            scheduled(getattr(value, f.name)) for f in dataclasses.fields(value)
        )
    return False


def settled(fields: Fields, step: int | Array) -> Fields:
    """A dataclass whose schedules are replaced by their numbers at `step`, also inside its fields.

    It is the same object where it has no schedule. Otherwise its fields are not checked again,
    since the numbers may be traced.
    """
    made = copy.copy(fields)
    changed = False
    for field in dataclasses.fields(fields):
        value = getattr(fields, field.name)
        if scheduled(value):
            object.__setattr__(made, field.name, _at(value, step))
            changed = True
    return made if changed else fields


def _at(value: Any, step: int | Array) -> Any:
    if isinstance(value, Schedule):
        return value(step)
    if isinstance(value, Mapping):
        return {key: _at(entry, step) for key, entry in value.items()}
    return settled(value, step) if scheduled(value) else value


def follows_schedules(
    loss: Callable[[Any, Nets, Ctx], Out],
) -> Callable[[Any, Nets, Ctx], Out]:
    """A method's loss in which the schedules of `self` are their numbers at the current step."""

    @functools.wraps(loss)
    def at_step(self: Any, net: Nets, ctx: Ctx) -> Out:
        return loss(settled(self, ctx.step), net, ctx)

    return at_step


def bounds(value: float | Schedule) -> tuple[float, float]:
    """(least, largest) number that a field will hold: a schedule stays between its ends."""
    ends = (
        (value.start, value.end) if isinstance(value, Schedule) else (value, value)
    )
    return min(ends), max(ends)


def weighted(
    weight: float | Array, term: Shaped[Array, "*B"]
) -> Shaped[Array, "*B"] | float:
    """weight * term; exactly 0 for a constant weight of 0, even where the term is not finite."""
    if isinstance(weight, Array):
        return weight * term
    return weight * term if weight else 0.0
