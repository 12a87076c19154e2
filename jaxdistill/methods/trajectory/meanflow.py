"""MeanFlow (arXiv:2505.13447): a network u(x_t, r, t) of the average velocity from r to t, which
one step integrates.

(t - r) u = int_r^t v dtau, differentiated along the path, gives the identity u = v - (t - r) du/dt.
Its right side is the target: one JVP, no integral, no curriculum. With r = t it is flow matching,
on which most of the batch is trained. The velocity v is that of the data's own straight path, the
same with guidance folded in, or a teacher's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.needs import Spec
from jaxdistill.core.net import Net
from jaxdistill.core.types import Array, Ctx, Method, Nets, Out, Refused, lookup
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Flow, Process, expand
from jaxdistill.diffusion.regression import drop_condition
from jaxdistill.diffusion.tangent import DERIVATIVES
from jaxdistill.diffusion.times import LogitNormal, Uniform
from jaxdistill.models.denoisers.dit import DiT, fold_gap
from jaxdistill.objectives import weighting
from jaxdistill.objectives.numerics import sum_per_sample
from jaxdistill.samplers.fewstep import jump


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageVelocity(Method):
    """Base of average-velocity methods.

    The student's model needs second_time=True, and its denoiser this process as its own.
    """

    process: Process = Flow()

    needs = {"x": Float[Spec, "B *shape"]}
    inits = {"student": None}
    frozen = ()

    def sampling_times(self, steps: int) -> Array:
        """Times of the exported student, which is for one step. Raises Refused for more."""
        if steps != 1:
            raise Refused(
                f"export: an average velocity is exported for one step, not for {steps}"
            )
        return self.process.grid(1)[:1]

    def exported(self, net, params):
        """A DiT for one step from pure noise, with its second time folded in; other networks as
        they are.
        """
        if not isinstance(net.config, DiT) or not net.config.second_time:
            return net, params
        t, r = module_times(net, self.process.t_max, self.process.t_min)
        return fold_gap(net, params, t=t, r=r)


def module_times(net: Net, t: float, r: float) -> tuple[Array, Array]:
    """The times t and r as the module inside `net` is given them: its denoiser may change them."""
    given = []

    def module(x, t, cond, *, r):
        given.append((t[0], r[0]))
        return x

    denoise = net.wrap(module)
    denoise(jnp.zeros((1, 1)), jnp.full(1, t), None, r=jnp.full(1, r))
    return given[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlow(AverageVelocity):
    """Training from data, without guidance."""

    # distribution of two draws; t is the larger, r the smaller
    times: Uniform = LogitNormal(mean=-0.4, std=1.0)
    # share of the batch with r = t
    flow_share: float = 0.75
    # c of the weight 1 / (error + c)^p; the paper's 1e-3, its code's 1e-2
    weight_c: float = 1e-2
    # p; 0: plain squared error
    weight_power: float = 1.0
    # jvp | central, for networks whose kernels have no JVP
    derivative: str = "jvp"

    def interval(
        self, ctx: Ctx, n: int
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """(t, r) of `n` samples, r <= t; r = t for the first ones."""
        a = self.times.draw(self.process, ctx.key("t"), n)
        b = self.times.draw(self.process, ctx.key("r"), n)
        t = jnp.maximum(a, b)
        r = jnp.minimum(a, b)
        flow = jnp.arange(n) < round(self.flow_share * n)
        return t, jnp.where(flow, t, r)

    def velocity(
        self, net: Nets, ctx: Ctx, xt: Array, t: Array, v: Array
    ) -> tuple[Array, Array | None]:
        """(velocity at x_t, its condition), from the velocity `v` of the sample's own path."""
        return v, ctx.batch.get("cond")

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        t, r = self.interval(ctx, x0.shape[0])
        eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
        xt = self.process.add_noise(x0, eps, t)
        v, cond = self.velocity(net, ctx, xt, t, self.process.velocity(x0, eps, t))
        average = lambda x, t, r: net.student(x, t, cond, r=r).v
        derivative = lookup(DERIVATIVES, self.derivative, "derivative")
        # eq. 8
        u, du = derivative(
            average, (xt, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r))
        )
        target = jax.lax.stop_gradient(v - expand(t - r, x0) * du)  # eq. 10
        error = sum_per_sample((u - target) ** 2)
        # section 4.3
        weight = weighting.adaptive(error, self.weight_c, self.weight_power)
        return Out(jnp.mean(weight * error), {"error": jnp.mean(error)})

    def sample(self, net, noise, cond, key, steps):
        average = lambda x, t, r: net(x, t, cond, r=r)
        return jump(average, self.process.start(noise), self.process.grid(steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedMeanFlow(MeanFlow):
    """Training from data with classifier-free guidance folded into the velocity (section 4.2), so
    that a sampling step is one evaluation.

    v becomes omega v + (1 - omega - kappa) u(x, t, t | null) + kappa u(x, t, t | cond): an
    effective scale of omega / (1 - kappa).
    """

    # weight of the sample's own velocity; the paper's 0.2 (XL/2), 1.0 (B/2)
    omega: float = 1.0
    # weight of the conditional prediction; the paper's 0.92 (XL/2), 0.5 (B/2)
    kappa: float = 0.5
    # times with guidance, both ends included; the paper's (0, 0.75) for XL/2
    guidance_times: tuple[float, float] = (0.0, 1.0)
    # share of samples that are trained on the null condition, without guidance
    label_dropout: float = 0.1

    def velocity(self, net, ctx, xt, t, v):
        dropped = jnp.sum(
            jax.random.uniform(ctx.key("drop"), t.shape) < self.label_dropout
        )
        # the first samples, where r = t, as in the code
        keep = jnp.arange(len(t)) >= dropped
        cond = ctx.batch.get("cond")
        null_cond = ctx.batch.get("null_cond")
        unconditional = net.student(xt, t, null_cond, r=t).v
        conditional = net.student(xt, t, cond, r=t).v
        mixed = self.omega * v + (1 - self.omega - self.kappa) * unconditional
        mixed = mixed + self.kappa * conditional
        first, last = self.guidance_times
        guide = keep & (t >= first) & (t <= last)
        v = jnp.where(expand(guide, v), mixed, v)
        return jax.lax.stop_gradient(v), drop_condition(cond, null_cond, keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlowDistillation(MeanFlow):
    """The velocity is a teacher's, without the noise of single paths; its guidance is folded in."""

    # guidance scale of the teacher
    guidance: float = 1.0

    inits = {"student": "teacher"}
    frozen = ("teacher",)

    def velocity(self, net, ctx, xt, t, v):
        cond = ctx.batch.get("cond")
        null_cond = ctx.batch.get("null_cond")
        return guided(net.teacher, xt, t, cond, null_cond, self.guidance).v, cond
