"""Flow matching and diffusion training (arXiv:2210.02747; EDM, arXiv:2206.00364; VP,
arXiv:2006.11239): what teachers are trained by.

A network is regressed on the velocity of straight paths from data to noise. With another process,
another distribution of times and another target it is EDM or DDPM training. The label is dropped
for some samples, so that guidance has an unconditional branch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Ctx, Method, Nets, Out
from jaxdistill.diffusion.process import Flow, Process
from jaxdistill.diffusion.regression import denoising_error, drop_condition
from jaxdistill.diffusion.times import LogitNormal, Uniform
from jaxdistill.samplers import ode


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching(Method):
    """Training from data."""

    process: Process = Flow()
    # distribution of t: SD3's; Uniform() is the first paper's
    times: Uniform = LogitNormal()
    # what is regressed: v | flow | vp (networks of VP processes that predict "v") | eps | x0 | edm
    target: str = "v"
    # share of samples that are trained on the null condition
    label_dropout: float = 0.1
    # what `sample` integrates with: euler | heun | ddim | dpmpp_2m
    solver: str = "euler"

    needs = {"x": Float[Spec, "B *shape"]}
    inits = {"student": None}
    frozen = ()
    renoises = False

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        n = x0.shape[0]
        t = self.times.draw(self.process, ctx.key("t"), n)
        eps = jax.random.normal(ctx.key("eps"), x0.shape)
        keep = jax.random.uniform(ctx.key("drop"), (n,)) >= self.label_dropout
        cond = drop_condition(
            ctx.batch.get("cond"), ctx.batch.get("null_cond"), keep
        )
        pred = net.student(self.process.add_noise(x0, eps, t), t, cond)
        return Out(
            jnp.mean(denoising_error(self.process, pred, x0, eps, t, self.target))
        )

    def sampling_times(self, steps: int) -> Array:
        return ode.chain_times(self.solver, self.process, steps)

    def sample(self, net, noise, cond, key, steps):
        denoise = lambda x, t: net(x, t, cond)
        return ode.solve(
            self.solver,
            self.process,
            denoise,
            self.process.start(noise),
            steps,
            key,
        )
