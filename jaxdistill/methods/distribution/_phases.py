"""A few-step generator cut into phases: which expert takes which steps, and which teacher judges it
at which noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from jaxdistill.core.types import Nets, Params, Refused
from jaxdistill.diffusion.denoiser import by_time
from jaxdistill.samplers.fewstep import falling


class Part(NamedTuple):
    """A range low..high of noise levels, the teacher that serves it, and the fake score that a
    phase keeps for it.
    """

    fake: str
    teacher: str
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Phases:
    """K phases, counted from 0. Raises Refused where steps, times and bounds do not fit together."""

    times: tuple[float, ...]  # of all steps, falling
    sizes: tuple[int, ...]  # how many of them each phase owns
    bounds: tuple[float, ...]  # falling times between the experts of the teacher
    top: float  # the process's noisiest time
    nested: bool = True  # a phase's noise levels reach up to `top`; False: to its first step

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1 or sum(self.sizes) != len(self.times):
            raise Refused(
                f"method.phase_steps={self.sizes}: expected positive numbers whose sum is {len(self.times)}, the number of steps"
            )
        for name, times in (("student_times", self.times), ("teacher_bounds", self.bounds)):
            if not falling(times, self.top):
                raise Refused(
                    f"method.{name}={times}: expected falling times, at most {self.top} and above 0"
                )

    @property
    def experts(self) -> tuple[str, ...]:
        """The generator's roles: "expert0", ..., and "student" for the last phase."""
        return (*(f"expert{k}" for k in range(len(self.sizes) - 1)), "student")

    @property
    def teachers(self) -> tuple[str, ...]:
        """ "teacher0" at the noisiest range, ..., and "teacher" at the cleanest."""
        return (*(f"teacher{j}" for j in range(len(self.bounds))), "teacher")

    def span(self, k: int) -> tuple[int, int, float]:
        """(first, last, s): phase k owns the steps first..last - 1 and ends at time s."""
        last = sum(self.sizes[: k + 1])
        return last - self.sizes[k], last, (*self.times, 0.0)[last]

    def parts(self, k: int) -> tuple[Part, ...]:
        """What lies above the end of phase k, noisiest first, down to the teacher that serves the
        phase's own last step.
        """
        first, last, s = self.span(k)
        start = self.top if self.nested else self.times[first]
        own = sum(b >= (self.times[last - 1] + s) / 2 for b in self.bounds)
        edges = (self.top, *self.bounds, s)
        names = [f"fake{k}_{j}" for j in range(own + 1)] if own else [f"fake{k}"]
        every = [
            Part(name, self.teachers[j], max(edges[j + 1], s), min(edges[j], start))
            for j, name in enumerate(names)
        ]
        return tuple(part for part in every if part.low < part.high)

    def trained(self, phase: int) -> tuple[int, ...]:
        """The phases in training: one, or all for -1."""
        return tuple(range(len(self.sizes))) if phase < 0 else (phase,)

    def roles(self, phase: int) -> dict[str, str]:
        """Role that is in training -> teacher that it starts from."""
        made = {}
        for k in self.trained(phase):
            made |= {
                self.experts[k]: self.parts(k)[-1].teacher,
                **{part.fake: part.teacher for part in self.parts(k)},
            }
        return made

    def lengths(self, steps: int, shares: tuple[float, ...]) -> list[int]:
        """`steps` by phase, in these shares; equal ones where there are none. Raises Refused where
        their number is another.
        """
        shares = shares or (1.0,) * len(self.sizes)
        if len(shares) != len(self.sizes) or min(shares) <= 0:
            raise Refused(
                f"method.shares={shares}: expected {len(self.sizes)} positive numbers, one for each phase"
            )
        ends = [round(steps * sum(shares[:k]) / sum(shares)) for k in range(len(shares) + 1)]
        return [b - a for a, b in zip(ends, ends[1:])]

    def retire(self, k: int, nets, params, batch):
        """Surgery before phase k: without the fake scores of the phases before it."""
        gone = {part.fake for i in range(k) for part in self.parts(i)}
        return nets, {role: p for role, p in params.items() if role not in gone}

    def generator(self, net: Nets, phases: int | None = None) -> Callable:
        """The experts of all phases, or the first ones, as one denoiser for batches of one time.

        An expert that is not there yet is still its teacher. The bounds lie between steps, where
        rounding cannot reach them.
        """
        named = enumerate(self.experts[:phases])
        found = [
            getattr(net, name, None) or getattr(net, self.parts(k)[-1].teacher) for k, name in named
        ]
        bounds = [
            (self.times[self.span(k)[1] - 1] + self.times[self.span(k)[1]]) / 2
            for k in range(len(found) - 1)
        ]
        return by_time(found, bounds, shared=True)


def couple(
    decay: float, expert: str, fake: str, weights: Mapping[str, Params], step
) -> dict[str, Params]:
    """What may follow an expert's update: fake <- decay fake + (1 - decay) expert. Raises Refused
    where only one has adapters.
    """
    if jax.tree.structure(weights[expert]) != jax.tree.structure(weights[fake]):
        raise Refused(
            f"method.coupling={decay}: expected {expert} and {fake} to have the same weights; one of them is an adapter"
        )
    return {
        fake: jax.tree.map(lambda f, g: decay * f + (1 - decay) * g, weights[fake], weights[expert])
    }
