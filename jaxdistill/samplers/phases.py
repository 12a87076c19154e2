"""A few-step generator of several experts: its sampling steps cut into phases, one expert each, and
the intervals that a phase's distribution is matched on (Phased DMD, arXiv:2510.27684).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxdistill.core.types import Nets, Params, Refused
from jaxdistill.diffusion.denoiser import by_time
from jaxdistill.samplers.fewstep import falling


class Interval(NamedTuple):
    """Times that samples are renoised to, and the two scores that are compared there."""

    teacher: str  # role of the real score: the teacher's expert for these times
    fake: str  # role of the fake score, which a phase has of its own
    low: float
    high: float

    def scores(self, net: Nets) -> Nets:
        """The networks of both scores, as `teacher` and `fake`."""
        return Nets(
            teacher=getattr(net, self.teacher), fake=getattr(net, self.fake)
        )


class Phase(NamedTuple):
    """Consecutive sampling steps of one expert, after which its samples are at time `end`."""

    expert: str  # role of the expert
    first: int  # index of its first sampling step
    last: int  # index of its last sampling step, plus 1
    # of all sampling steps up to its last one, and then `end`
    times: tuple[float, ...]
    boundary: float  # half-way between the time of its last sampling step and `end`
    intervals: tuple[Interval, ...]  # above `end`, noisiest first

    @property
    def end(self) -> float:
        """s, the time at which its distribution is matched."""
        return self.times[-1]

    @property
    def fakes(self) -> tuple[str, ...]:
        """Roles of its fake scores."""
        return tuple(interval.fake for interval in self.intervals)

    @property
    def teacher(self) -> str:
        """The role that the expert starts from: the teacher at the noise of its last step."""
        return self.intervals[-1].teacher


def teacher_roles(bounds: Sequence[float]) -> tuple[str, ...]:
    """Roles of the teacher's experts, noisiest first: "teacher0", "teacher1", ..., "teacher"."""
    return (*(f"teacher{j}" for j in range(len(bounds))), "teacher")


def cut(
    times: Sequence[float],
    sizes: Sequence[int],
    bounds: Sequence[float],
    top: float,
    nested: bool,
) -> tuple[Phase, ...]:
    """Cuts the times of all sampling steps into phases.

    Args:
        times: Where the generator's network is evaluated, falling.
        sizes: Number of sampling steps of each phase.
        bounds: Falling times between the experts of the teacher; none for a single network.
        top: The noisiest time of the process.
        nested: Whether the intervals of every phase reach up to `top`; otherwise they reach up
            to the phase's first step.

    Raises:
        Refused: The sizes do not fit the times, or the bounds do not fall within the process.
    """
    if not sizes or min(sizes) < 1 or sum(sizes) != len(times):
        count = f"{len(times)}, the number of steps"
        raise Refused(
            f"method.phase_steps={sizes}: expected positive numbers whose sum is {count}"
        )
    if not falling(bounds, top):
        raise Refused(
            f"method.teacher_bounds={bounds}: expected falling times, at most {top} and above 0"
        )
    experts = [*(f"expert{k}" for k in range(len(sizes) - 1)), "student"]
    grid = (*times, 0.0)
    phases = []
    first = 0
    for k, expert in enumerate(experts):
        last = first + sizes[k]
        boundary = (grid[last - 1] + grid[last]) / 2
        start = top if nested else grid[first]
        intervals = _intervals(k, grid[last], start, boundary, bounds, top)
        phases.append(
            Phase(expert, first, last, grid[: last + 1], boundary, intervals)
        )
        first = last
    return tuple(phases)


def _intervals(
    k: int,
    end: float,
    start: float,
    boundary: float,
    bounds: Sequence[float],
    top: float,
) -> tuple[Interval, ...]:
    """The times between `end` and `start`, split between the teacher's experts.

    Experts for less noise than the one that serves `boundary`, the noise of the phase's last step,
    are left out.
    """
    edges = (top, *bounds, end)
    cleanest = sum(bound >= boundary for bound in bounds)
    intervals = []
    for j, teacher in enumerate(teacher_roles(bounds)[: cleanest + 1]):
        fake = f"fake{k}_{j}" if cleanest else f"fake{k}"
        low = max(edges[j + 1], end)
        high = min(edges[j], start)
        if low < high:
            intervals.append(Interval(teacher, fake, low, high))
    return tuple(intervals)


def sources(phases: Iterable[Phase]) -> dict[str, str]:
    """Role of each expert and fake score -> role of the teacher that it starts from."""
    teachers = {}
    for phase in phases:
        teachers[phase.expert] = phase.teacher
        for interval in phase.intervals:
            teachers[interval.fake] = interval.teacher
    return teachers


def without_fakes(
    params: Mapping[str, Params], phases: Iterable[Phase]
) -> dict[str, Params]:
    """Role -> weights, without the fake scores of these phases."""
    fakes = {role for phase in phases for role in phase.fakes}
    return {role: weights for role, weights in params.items() if role not in fakes}


def routed(net: Nets, phases: Sequence[Phase]) -> Callable:
    """The experts of consecutive phases as one denoiser, for batches that share a time.

    An expert that `net` lacks, since it has not been trained yet, is its teacher. The bounds lie
    between sampling steps, so that rounding cannot send a step to another expert.
    """
    experts = []
    for phase in phases:
        role = phase.expert if hasattr(net, phase.expert) else phase.teacher
        experts.append(getattr(net, role))
    return by_time(experts, [phase.boundary for phase in phases[:-1]], shared=True)
