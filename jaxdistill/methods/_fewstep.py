"""Methods whose student samples by a chain: x0 at one of its times, re-noised to the next."""

from __future__ import annotations

import dataclasses

from jaxdistill.core.types import Array, Method, Refused
from jaxdistill.diffusion.process import Flow, Process
from jaxdistill.samplers.fewstep import falling, first_times, renoise


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewStep(Method):
    """The chain starts from the process's noisiest state, so the first of its times is one that
    such a state may have.

    Raises Refused where it is not, and where times do not fall within the process.
    """

    process: Process = Flow()
    student_times: tuple[
        float, ...
    ] = ()  # falling; as many as steps are asked for. (): the process's t_max alone

    def __post_init__(self):
        if not self.student_times:
            object.__setattr__(self, "student_times", (self.process.t_max,))
        self.check_times()

    def check_times(self) -> None:
        times = self.student_times
        process = self.process
        if not falling(times, process.t_max):
            raise Refused(
                f"method.student_times={times}: expected falling times, at most {process.t_max} and above 0"
            )
        if not process.starts(times[0]):
            raise Refused(
                f"method.student_times={times}: {process} starts at t={process.t_max}; expected a first time near it"
            )

    def sampling_times(self, steps: int) -> Array:
        return first_times(self.student_times, steps)

    def sample(self, net, noise, cond, key, steps):
        return renoise(
            self.process,
            lambda x, t: net(x, t, cond),
            self.initial(noise),
            self.sampling_times(steps),
            key,
        )
