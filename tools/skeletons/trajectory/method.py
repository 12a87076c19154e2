"""My method (arXiv:2601.00000).

The idea in three sentences. As it stands, the student learns to jump to where the teacher's solver
ends, from noise in one step. Departures from the paper are stated here.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Ctx, Method, Nets, Out, Turn
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Flow, Process
from jaxdistill.samplers import ode
from jaxdistill.samplers.fewstep import first_times, renoise


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyMethod(Method):
    process: Process = Flow()
    student_times: tuple[float, ...] = (
        1.0,
    )  # that samples are made at, as many as steps are asked for
    solver: str = "heun"  # euler | heun | ddim | dpmpp_2m
    solver_steps: int = (
        8  # of the teacher's trajectory; each field with its role, its unit and the paper's value
    )
    guidance: float = 1.0  # of the teacher

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        cond = ctx.batch.get("cond")
        null = ctx.batch.get("null_cond")
        start = self.process.start(jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape))
        denoise = lambda x, t: guided(net.teacher, x, t, cond, null, self.guidance)
        end = ode.solve(self.solver, self.process, denoise, start, self.solver_steps)
        t = jnp.full(start.shape[:1], self.process.t_max)
        distance = (net.student(start, t, cond).x0 - jax.lax.stop_gradient(end)) ** 2  # eq. 1
        return Out(jnp.mean(distance))

    def sampling_times(self, steps: int) -> Array:
        return first_times(self.student_times, steps)

    def sample(self, net, noise, cond, key, steps):
        return renoise(
            self.process, lambda x, t: net(x, t, cond), noise, self.sampling_times(steps), key
        )
