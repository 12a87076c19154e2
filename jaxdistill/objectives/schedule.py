"""Numbers of a loss that change while it trains: weights, temperatures, the beta of a divergence.

A field that says "or a schedule" takes any of these in place of a number; `settled` puts in what
they say at a step.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

from jaxdistill.core.types import Array, Ctx, Nets, Out, Refused

Fields = TypeVar("Fields")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of all: `start` at step 0, `end` from step `steps` on. A subclass gives `progress`."""

    start: float
    end: float
    steps: int  # engine steps of the way

    def __post_init__(self):
        if self.steps < 1:
            raise Refused(f"{type(self).__name__}: steps={self.steps}, expected a positive integer")

    def __call__(self, step: int | Array) -> Array:
        """The value at an engine step, float32 (float64 where enabled) []."""
        share = jnp.clip(jnp.asarray(step, jnp.result_type(float)) / self.steps, 0.0, 1.0)
        return self.start + (self.end - self.start) * self.progress(share)

    def progress(self, share: Array) -> Array:
        """How much of the way from start to end is gone after this share of the steps: [] -> [], 0
        at 0 and 1 at 1.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """Evenly."""

    def progress(self, share):
        return share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """(1 - cos(pi share)) / 2: slow at both ends. From 1 to 0, a quarter of the steps leaves
    (1 + cos(pi / 4)) / 2 = 0.8535534."""

    def progress(self, share):
        return 0.5 * (1.0 - jnp.cos(jnp.pi * share))


def scheduled(value: Any) -> bool:
    """Whether a field's value, or an entry of it, is a schedule."""
    entries = value.values() if isinstance(value, Mapping) else (value,)
    return any(isinstance(entry, Schedule) for entry in entries)


def settled(fields: Fields, step: int | Array) -> Fields:
    """A dataclass with the numbers of its schedules at `step` in their places, also inside a field
    that is a mapping.

    The same object where it has none; else it is not checked again, for its numbers may belong to a
    running program.
    """
    at = lambda value: value(step) if isinstance(value, Schedule) else value
    every = lambda mapping: {k: at(v) for k, v in mapping.items()}
    inside = lambda value: every(value) if isinstance(value, Mapping) else at(value)
    values = {field.name: getattr(fields, field.name) for field in dataclasses.fields(fields)}
    changing = {name: inside(value) for name, value in values.items() if scheduled(value)}
    if not changing:
        return fields
    made = copy.copy(fields)
    for name, value in changing.items():
        object.__setattr__(made, name, value)
    return made


def follows_schedules(
    loss: Callable[[Any, Nets, Ctx], Out],
) -> Callable[[Any, Nets, Ctx], Out]:
    """A method's loss that sees the numbers of its schedules at the current step."""

    @functools.wraps(loss)
    def at_step(self: Any, net: Nets, ctx: Ctx) -> Out:
        return loss(settled(self, ctx.step), net, ctx)

    return at_step


def bounds(value: float | Schedule) -> tuple[float, float]:
    """(least, largest) number that a field will hold: a schedule's lie between its ends."""
    ends = (value.start, value.end) if isinstance(value, Schedule) else (value, value)
    return min(ends), max(ends)


def weighted(weight: float | Array, term: Array) -> float | Array:
    """weight * term; exactly 0 for a constant weight of 0, whatever the term is."""
    if isinstance(weight, Array):
        return weight * term
    return weight * term if weight else 0.0
