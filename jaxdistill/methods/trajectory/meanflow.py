"""MeanFlow (arXiv:2505.13447): a network u(x_t, r, t) of the average velocity from r to t, which
one step integrates.

(t - r) u = int_r^t v dtau, differentiated along the path, gives the identity u = v - (t - r) du/dt,
whose right side is the target: one JVP, no integral, no curriculum. With r = t it is flow matching,
which most of the batch trains. The velocity v is that of the data's own straight path, that with
guidance folded in, or a teacher's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Ctx, Method, Nets, Out, Refused, Turn, lookup
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Flow, Process, expand
from jaxdistill.diffusion.regression import drop_condition
from jaxdistill.diffusion.tangent import DERIVATIVES
from jaxdistill.diffusion.times import LogitNormal, Uniform
from jaxdistill.models.denoisers.dit import DiT, fold_gap
from jaxdistill.objectives import weighting
from jaxdistill.samplers.fewstep import jump


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageVelocity(Method):
    """What all average-velocity students share. The student's model needs second_time=True, and
    this process as its own.
    """

    process: Process = Flow()

    inits = {"student": None}
    frozen = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        raise NotImplementedError

    def sampling_times(self, steps: int) -> Array:
        """Of the exported student. Raises Refused for more than the one step that it is folded for."""
        if steps != 1:
            raise Refused(f"export: an average velocity is exported for one step, not for {steps}")
        return self.process.grid(1)[:1]

    def exported(self, net, params):
        """A DiT for one step from pure noise, its second time folded in; other networks as they
        are.
        """
        if not getattr(net.config, "second_time", False) or not isinstance(net.config, DiT):
            return net, params
        fed = {}  # the times as the module is fed them
        net.wrap(lambda x, t, cond, *, r: (fed.update(t=t[0], r=r[0]), x)[1])(
            jnp.zeros((1, 1)),
            jnp.full(1, self.process.t_max),
            None,
            r=jnp.full(1, self.process.t_min),
        )
        return fold_gap(net, params, **fed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlow(AverageVelocity):
    """Training from data, without guidance."""

    times: Uniform = LogitNormal(mean=-0.4, std=1.0)  # two draws; t is the larger, r the smaller
    flow_share: float = 0.75  # share of the batch with r = t
    weight_c: float = 1e-2  # of the weight 1 / (error + c)^p; the paper's 1e-3, its code's 1e-2
    weight_power: float = 1.0  # p; 0: plain squared error
    derivative: str = "jvp"  # jvp | central (networks whose kernels have no JVP)

    def interval(self, ctx: Ctx, n: int) -> tuple[Array, Array]:
        """(t, r) [n] with r <= t; r = t for a fixed part of the batch."""
        a, b = (self.times.draw(self.process, ctx.key(name), n) for name in ("t", "r"))
        t = jnp.maximum(a, b)
        r = jnp.minimum(a, b)
        return t, jnp.where(jnp.arange(n) < round(self.flow_share * n), t, r)

    def velocity(
        self, net: Nets, ctx: Ctx, xt: Array, t: Array, v: Array
    ) -> tuple[Array, Array | None]:
        """(velocity at x_t, the condition that it belongs to), from the velocity `v` of the
        sample's own path.
        """
        return v, ctx.batch.get("cond")

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        n = ctx.batch["x"].shape[0]
        t, r = self.interval(ctx, n)
        eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
        xt = self.process.add_noise(x0, eps, t)
        v, cond = self.velocity(net, ctx, xt, t, self.process.velocity(x0, eps, t))
        average = lambda x, t, r: net.student(x, t, cond, r=r).v
        derivative = lookup(DERIVATIVES, self.derivative, "derivative")
        u, du = derivative(average, (xt, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r)))  # eq. 8
        target = jax.lax.stop_gradient(v - expand(t - r, x0) * du)  # eq. 10
        error = jnp.sum((u - target) ** 2, axis=range(1, x0.ndim))
        weight = weighting.adaptive(error, self.weight_c, self.weight_power)  # section 4.3
        return Out(jnp.mean(weight * error), {"error": jnp.mean(error)})

    def sample(self, net, noise, cond, key, steps):
        average = lambda x, t, r: net(x, t, cond, r=r)
        return jump(average, self.process.start(noise), self.process.grid(steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedMeanFlow(MeanFlow):
    """Training from data with classifier-free guidance folded into the velocity (section 4.2): one
    evaluation a step.

    v becomes omega v + (1 - omega - kappa) u(x, t, t | null) + kappa u(x, t, t | cond): effective
    scale omega / (1 - kappa).
    """

    omega: float = 1.0  # the paper's 0.2 (XL/2), 1.0 (B/2)
    kappa: float = 0.5  # 0.92, 0.5
    guidance_times: tuple[float, float] = (
        0.0,
        1.0,
    )  # where it applies; the paper's (0, 0.75) for XL/2
    label_dropout: float = 0.1  # share of samples trained on the null condition, without guidance

    def velocity(self, net, ctx, xt, t, v):
        dropped = jnp.sum(jax.random.uniform(ctx.key("drop"), t.shape) < self.label_dropout)
        keep = jnp.arange(len(t)) >= dropped  # the first rows, where r = t, as in the code
        cond = ctx.batch.get("cond")
        null = ctx.batch.get("null_cond")
        at = lambda c: net.student(xt, t, c, r=t).v
        mixed = self.omega * v + (1 - self.omega - self.kappa) * at(null) + self.kappa * at(cond)
        low, high = self.guidance_times
        guide = keep & (t >= low) & (t <= high)
        return jax.lax.stop_gradient(jnp.where(expand(guide, v), mixed, v)), drop_condition(
            cond, null, keep
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlowDistillation(MeanFlow):
    """The velocity is a teacher's, free of the noise of single paths; its guidance is folded in."""

    guidance: float = 1.0  # of the teacher

    inits = {"student": "teacher"}
    frozen = ("teacher",)

    def velocity(self, net, ctx, xt, t, v):
        cond = ctx.batch.get("cond")
        null = ctx.batch.get("null_cond")
        return guided(net.teacher, xt, t, cond, null, self.guidance).v, cond
