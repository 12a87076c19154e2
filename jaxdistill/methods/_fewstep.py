"""Few-step students: they predict x0 at one of their times and are renoised to the next."""

from __future__ import annotations

import dataclasses

from jaxtyping import Float

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Method, Refused
from jaxdistill.diffusion.process import Flow, Process
from jaxdistill.samplers.fewstep import falling, first_times, renoise


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewStep(Method):
    """A method whose student samples at `student_times`, from the noisiest state of the process.

    Raises Refused where the times do not fall within the process, or where the first of them is
    not one that its noisiest state may have.
    """

    process: Process = Flow()
    # Falling times at which the student is evaluated; the first n of them for n sampling steps.
    # Empty: t_max of the process, for one step.
    student_times: tuple[float, ...] = ()

    needs = {"x": Float[Spec, "B *shape"]}

    def __post_init__(self):
        if not self.student_times:
            object.__setattr__(self, "student_times", (self.process.t_max,))
        self.check_times()

    def check_times(self) -> None:
        times = self.student_times
        top = self.process.t_max
        if not falling(times, top):
            expected = f"expected falling times, at most {top} and above 0"
            raise Refused(f"method.student_times={times}: {expected}")
        if not self.process.may_start_at(times[0]):
            expected = (
                f"{self.process} starts at t={top}; expected a first time near it"
            )
            raise Refused(f"method.student_times={times}: {expected}")

    def sampling_times(self, steps: int) -> Array:
        return first_times(self.student_times, steps)

    def sample(self, net, noise, cond, key, steps):
        denoise = lambda x, t: net(x, t, cond)
        start = self.initial(noise)
        times = self.sampling_times(steps)
        solver = "" if self.renoises else "ddim"
        return renoise(self.process, denoise, start, times, key, solver)
