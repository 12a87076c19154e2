"""Rectified flow (arXiv:2209.03003): a flow retrained on its own pairs of noise and sample, whose
paths get straighter.

The teacher's ODE carries noise to samples; these pairs are stored, and the student is regressed on
the straight lines between them. Each further round takes its pairs from the last student. The law
of the samples stays, and a straight flow needs one step. InstaFlow (arXiv:2309.06380) then distils:
the same pairs, at t = 1 alone.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Collect, Ctx, Method, Nets, Out, Stage, Turn
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Flow, Process
from jaxdistill.diffusion.regression import denoising_error
from jaxdistill.diffusion.times import Uniform
from jaxdistill.samplers import ode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reflow(Method):
    process: Process = Flow()
    times: Uniform = Uniform()
    rounds: int = 1  # the paper's 2-rectified flow is one round on a flow-matching teacher
    batches: int = 8000  # of pairs that a round stores, each of data.batch_size
    solver: str = "heun"  # euler | heun | ddim | dpmpp_2m: what makes the pairs
    solver_steps: int = 50
    guidance: float = 1.0  # of the teacher, in the first round's pairs

    renoises = False

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def stages(self, steps):
        """One for each round, equally long."""
        lengths = [(steps + i) // self.rounds for i in reversed(range(self.rounds))]
        make = lambda i: functools.partial(
            self.pairs, *(("student", 1.0) if i else ("teacher", self.guidance))
        )
        return tuple(
            Stage(self, length, collect=Collect(make(i), self.batches))
            for i, length in enumerate(lengths)
        )

    def pairs(self, role: str, guidance: float, net: Nets, ctx: Ctx) -> Batch:
        """The batch with its noise, and the sample that the network called `role` makes of it."""
        cond = ctx.batch.get("cond")
        null = ctx.batch.get("null_cond")
        noise = jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape, ctx.batch["x"].dtype)
        denoise = lambda x, t: guided(getattr(net, role), x, t, cond, null, guidance)
        x = ode.solve(
            self.solver, self.process, denoise, self.process.start(noise), self.solver_steps
        )
        return {**ctx.batch, "noise": noise, "x": x}

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        eps = ctx.batch["noise"]
        t = self.times.draw(self.process, ctx.key("t"), x0.shape[0])
        pred = net.student(self.process.add_noise(x0, eps, t), t, ctx.batch.get("cond"))
        return Out(jnp.mean(denoising_error(self.process, pred, x0, eps, t, "v")))  # eq. 1

    def sampling_times(self, steps: int) -> Array:
        return ode.chain_times("euler", self.process, steps)

    def sample(self, net, noise, cond, key, steps):
        return ode.solve(
            "euler",
            self.process,
            lambda x, t: net(x, t, cond),
            self.process.start(noise),
            steps,
            key,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distil(Reflow):
    """One-step distillation of a straightened flow (section 2.2): t is 1, where the velocity's
    error is the sample's.
    """

    times: Uniform = Uniform(low=1.0)
