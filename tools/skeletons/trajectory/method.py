"""My method (arXiv:2601.00000).

The idea in three sentences. As it stands, the student learns to jump to where the teacher's solver
ends, from noise in one step. Departures from the paper are stated here.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Ctx, Method, Nets, Out
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Flow, Process
from jaxdistill.samplers import ode
from jaxdistill.samplers.fewstep import first_times, renoise


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyMethod(Method):
    """Each field has its role, its unit and the paper's value."""

    process: Process = Flow()
    # times of sampling, falling; N steps use the first N
    student_times: tuple[float, ...] = (1.0,)
    # solver of the teacher's trajectory: euler | heun | ddim | dpmpp_2m
    solver: str = "heun"
    # its number of steps
    solver_steps: int = 8
    # guidance scale of the teacher
    guidance: float = 1.0

    needs = {"x": Float[Spec, "B *shape"]}

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        cond = ctx.batch.get("cond")
        null_cond = ctx.batch.get("null_cond")
        noise = jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape)
        start = self.process.start(noise)
        teacher = lambda x, t: guided(
            net.teacher, x, t, cond, null_cond, self.guidance
        )
        end = ode.solve(
            self.solver, self.process, teacher, start, self.solver_steps
        )
        t = jnp.full(start.shape[:1], self.process.t_max)
        # eq. 1
        distance = (
            net.student(start, t, cond).x0 - jax.lax.stop_gradient(end)
        ) ** 2
        return Out(jnp.mean(distance))

    def sampling_times(self, steps: int) -> Array:
        return first_times(self.student_times, steps)

    def sample(self, net, noise, cond, key, steps):
        denoise = lambda x, t: net(x, t, cond)
        return renoise(
            self.process, denoise, noise, self.sampling_times(steps), key
        )
