"""Consistency models (arXiv:2303.01469) and their latent form (LCM, arXiv:2310.04378).

f(x, t), the x0 of the network's prediction, is trained to agree at two neighbouring points of one
ODE trajectory: in distillation the teacher's solver makes the earlier point, in training the same
noise does. What anchors it is f(x, t_min) = x: built into velocity networks on rectified and
trigonometric flow and into `ConsistencyPrecond` on EDM; here the targets at t_min are x itself, so
that any other network learns it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Ctx, Nets, Out, Turn
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import expand
from jaxdistill.methods._fewstep import FewStep
from jaxdistill.objectives import consistency
from jaxdistill.samplers import ode


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteConsistency(FewStep):
    """What all share: a subclass says how times are paired, and where the earlier point comes from."""

    # the distance is sqrt(||.||^2 + c^2) - c with c = huber sqrt(dimension); 0: the norm
    huber: float = 0.00054

    target = "ema_student"  # the network whose f(x_r, r) is the target
    inits = {"student": None}
    frozen = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def pair(self, ctx: Ctx, n: int) -> tuple[Array, Array]:
        """The times (t, r) [n] of each sample, r < t."""
        raise NotImplementedError

    def clean(self, r: Array) -> Array:
        """Where x_r itself is the target: bool [n]. Here at the boundary t_min."""
        return r <= self.process.t_min

    def earlier(
        self, net: Nets, ctx: Ctx, xt: Array, t: Array, r: Array, x0: Array, eps: Array
    ) -> Array:
        """x_r on the trajectory of x_t."""
        return self.process.add_noise(x0, eps, r)

    def weight(self, t: Array, r: Array) -> Array:
        return jnp.ones_like(t)

    def distance(self, net: Nets, made: Array, held: Array) -> Array:
        """Of samples, [B ...] -> [B]; other ones are in _metrics.py."""
        return consistency.pseudo_huber(
            made, held, self.huber * math.sqrt(math.prod(made.shape[1:]))
        )

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        cond = ctx.batch.get("cond")
        t, r = self.pair(ctx, x0.shape[0])
        eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
        xt = self.process.add_noise(x0, eps, t)
        xr = self.earlier(net, ctx, xt, t, r, x0, eps)
        clean = self.clean(r)
        held = getattr(net, self.target)(xr, jnp.where(clean, self.process.t_min, r), cond).x0
        held = jax.lax.stop_gradient(jnp.where(expand(clean, xr), xr, held))  # f(x, t_min) = x
        distance = self.distance(net, net.student(xt, t, cond).x0, held)
        return Out(jnp.mean(self.weight(t, r) * distance), {"distance": jnp.mean(distance)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency(DiscreteConsistency):
    """Consistency distillation: one step of the teacher's solver between neighbours of a fixed
    grid.

    LCM is `solver="ddim"`, a guided teacher, and 51 levels: the 50 steps of 20 that its skipping
    makes of 1000.
    """

    levels: int = 18  # of the grid from t_min to t_max
    rho: float = 1.0  # levels are even in t^(1/rho); CM's 7 on EDM
    solver: str = "heun"  # euler | heun | ddim
    guidance: float = 1.0  # of the teacher

    inits = {"student": "teacher"}
    frozen = ("teacher",)

    def pair(self, ctx, n):
        levels = consistency.noise_levels(
            self.levels, self.levels, self.process.t_min, self.process.t_max, self.rho
        )
        return consistency.neighbours(ctx.key("level"), levels, jnp.zeros(self.levels - 1), n)

    def earlier(self, net, ctx, xt, t, r, x0, eps):
        cond = ctx.batch.get("cond")
        null = ctx.batch.get("null_cond")
        denoise = lambda x, t: guided(net.teacher, x, t, cond, null, self.guidance)
        return ode.advance(self.solver, self.process, denoise, xt, t, r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowingGrid(DiscreteConsistency):
    """Training without a teacher, on a grid of s0 levels or so that grows by `count`."""

    total: int = 400_000  # steps over which the grid grows
    s0: int = 2
    s1: int = 150
    rho: float = 1.0  # levels are even in t^(1/rho); 7 on EDM

    count = staticmethod(consistency.ct_levels)

    def pair(self, ctx, n):
        count = self.count(ctx.step, self.total, self.s0, self.s1)
        levels = consistency.noise_levels(
            count, self.s1 + 1, self.process.t_min, self.process.t_max, self.rho
        )
        return consistency.neighbours(ctx.key("level"), levels, self.logits(levels), n)

    def logits(self, levels: Array) -> Array:
        """Of each interval; those after the last level are empty."""
        return jnp.where(jnp.diff(levels) > 0, 0.0, -jnp.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CT(GrowingGrid):
    """Consistency training: from s0 to s1 + 1 levels, their intervals equally likely.

    The decay of the target's average grows along, in place of the config's. Samples are made by
    this average too, where the paper keeps a second one of rate .9999.
    """

    s1: int = 150  # CIFAR-10's; 200 (ImageNet-64), 150 (LSUN)
    # decay of the average over s0 intervals, CIFAR-10's; .95 (the others). 0: roles.student.ema's
    mu0: float = 0.9

    @property
    def turns(self):
        return (Turn(("student",), self.loss, decay=self.decay if self.mu0 else None),)

    def decay(self, k: Array) -> Array:
        """mu at the student's update k, from 1: that of the grid which the update was made on."""
        return consistency.ct_decay(
            self.count(k - 1, self.total, self.s0, self.s1), self.s0, self.mu0
        )
