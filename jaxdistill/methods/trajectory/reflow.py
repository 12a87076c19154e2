"""Rectified flow (arXiv:2209.03003): a flow is trained again on its own pairs of noise and sample,
and its paths get straighter.

The teacher's ODE carries noise to samples; these pairs are stored, and the student is regressed on
the straight lines between them. Each further round takes its pairs from the last student. The
distribution of the samples stays the same, and a straight flow needs one step. InstaFlow
(arXiv:2309.06380) then distils: the same pairs, at t = 1 alone.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import (
    Array,
    Batch,
    Collect,
    Ctx,
    Method,
    Nets,
    Out,
    Stage,
    stage_lengths,
)
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Flow, Process
from jaxdistill.diffusion.regression import denoising_error
from jaxdistill.diffusion.times import Uniform
from jaxdistill.samplers import ode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reflow(Method):
    """One stage for each round: pairs are stored, then the student is trained on them."""

    process: Process = Flow()
    # distribution of t
    times: Uniform = Uniform()
    # the paper's 2-rectified flow is one round on a flow-matching teacher
    rounds: int = 1
    # pairs that a round stores, in batches of data.batch_size
    batches: int = 8000
    # solver that makes the pairs: euler | heun | ddim | dpmpp_2m
    solver: str = "heun"
    # its number of steps
    solver_steps: int = 50
    # guidance scale of the teacher, in the first round's pairs
    guidance: float = 1.0

    needs = {"x": Float[Spec, "B *shape"]}
    renoises = False

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """One for each round, equally long."""
        stages = []
        for i, length in enumerate(stage_lengths(steps, self.rounds)):
            role = "student" if i else "teacher"
            guidance = 1.0 if i else self.guidance
            make = functools.partial(self.pairs, role, guidance)
            stages.append(Stage(self, length, collect=Collect(make, self.batches)))
        return tuple(stages)

    def pairs(self, role: str, guidance: float, net: Nets, ctx: Ctx) -> Batch:
        """The batch with noise, and the sample that the network called `role` makes of it."""
        x = ctx.batch["x"]
        cond = ctx.batch.get("cond")
        null_cond = ctx.batch.get("null_cond")
        noise = jax.random.normal(ctx.key("noise"), x.shape, x.dtype)
        start = self.process.start(noise)
        network = getattr(net, role)
        denoise = lambda x, t: guided(network, x, t, cond, null_cond, guidance)
        sample = ode.solve(
            self.solver, self.process, denoise, start, self.solver_steps
        )
        return {**ctx.batch, "noise": noise, "x": sample}

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        eps = ctx.batch["noise"]
        t = self.times.draw(self.process, ctx.key("t"), x0.shape[0])
        pred = net.student(
            self.process.add_noise(x0, eps, t), t, ctx.batch.get("cond")
        )
        # eq. 1
        return Out(jnp.mean(denoising_error(self.process, pred, x0, eps, t, "v")))

    def sampling_times(self, steps: int) -> Array:
        return ode.chain_times("euler", self.process, steps)

    def sample(self, net, noise, cond, key, steps):
        denoise = lambda x, t: net(x, t, cond)
        return ode.solve(
            "euler", self.process, denoise, self.process.start(noise), steps, key
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distil(Reflow):
    """One-step distillation of a straightened flow (section 2.2).

    All times are 1, where the error of the velocity is the error of the one-step sample.
    """

    times: Uniform = Uniform(low=1.0)
