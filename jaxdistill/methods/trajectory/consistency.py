"""Consistency models (arXiv:2303.01469) and their latent form (LCM, arXiv:2310.04378).

f(x, t), the x0 of the network's prediction, is trained to agree at two neighbouring points of one
ODE trajectory: in distillation the teacher's solver makes the earlier point, in training the same
noise does. The boundary condition f(x, t_min) = x fixes the solution: it is built into velocity
networks on rectified and trigonometric flow and into `ConsistencyPrecond` on EDM; here the targets
at t_min are x itself, so that any other network learns it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Ctx, Nets, Out, Turn
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import expand
from jaxdistill.methods._fewstep import FewStep
from jaxdistill.objectives import consistency
from jaxdistill.samplers import ode


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteConsistency(FewStep):
    """Base of these methods: a subclass says how times are paired, and makes the earlier point."""

    # the distance is sqrt(||.||^2 + c^2) - c with c = huber sqrt(dimension); 0: the norm
    huber: float = 0.00054

    # its f(x_r, r) is the target: ema_student | student
    target_network = "ema_student"
    needs = {"x": Float[Spec, "B *shape"]}
    inits = {"student": None}
    frozen = ()

    def pair(
        self, ctx: Ctx, n: int
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """The times (t, r) of `n` samples, r < t."""
        raise NotImplementedError

    def is_boundary(self, r: Float[Array, " B"]) -> Bool[Array, " B"]:
        """Where x_r itself is the target: here at t_min."""
        return r <= self.process.t_min

    def earlier(
        self,
        net: Nets,
        ctx: Ctx,
        xt: Array,
        t: Array,
        r: Array,
        x0: Array,
        eps: Array,
    ) -> Array:
        """x_r on the trajectory of x_t."""
        return self.process.add_noise(x0, eps, r)

    def weight(
        self, t: Float[Array, " B"], r: Float[Array, " B"]
    ) -> Float[Array, " B"]:
        return jnp.ones_like(t)

    def distance(
        self,
        net: Nets,
        predicted: Float[Array, "B ..."],
        target: Float[Array, "B ..."],
    ) -> Float[Array, " B"]:
        """Other distances are in _metrics.py."""
        dimension = math.prod(predicted.shape[1:])
        return consistency.pseudo_huber(
            predicted, target, self.huber * math.sqrt(dimension)
        )

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        cond = ctx.batch.get("cond")
        t, r = self.pair(ctx, x0.shape[0])
        eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
        xt = self.process.add_noise(x0, eps, t)
        xr = self.earlier(net, ctx, xt, t, r, x0, eps)
        boundary = self.is_boundary(r)
        network = getattr(net, self.target_network)
        target = network(xr, jnp.where(boundary, self.process.t_min, r), cond).x0
        target = jnp.where(expand(boundary, xr), xr, target)  # f(x, t_min) = x
        target = jax.lax.stop_gradient(target)
        distance = self.distance(net, net.student(xt, t, cond).x0, target)
        return Out(
            jnp.mean(self.weight(t, r) * distance), {"distance": jnp.mean(distance)}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency(DiscreteConsistency):
    """Consistency distillation: the pair are neighbours of a fixed grid, and one step of the
    teacher's solver goes from the later to the earlier one.

    LCM is `solver="ddim"`, a guided teacher, and 51 levels: the 50 steps of 20 that its skipping
    makes of 1000.
    """

    # levels of the grid from t_min to t_max; CM's 18
    levels: int = 18
    # levels are even in t^(1/rho); CM's 7, on EDM
    rho: float = 1.0
    # euler | heun | ddim; CM's heun
    solver: str = "heun"
    # guidance scale of the teacher
    guidance: float = 1.0

    inits = {"student": "teacher"}
    frozen = ("teacher",)

    def pair(self, ctx, n):
        levels = consistency.noise_levels(
            self.levels,
            self.levels,
            self.process.t_min,
            self.process.t_max,
            self.rho,
        )
        return consistency.neighbours(
            ctx.key("level"), levels, jnp.zeros(self.levels - 1), n
        )

    def earlier(self, net, ctx, xt, t, r, x0, eps):
        cond = ctx.batch.get("cond")
        null_cond = ctx.batch.get("null_cond")
        teacher = lambda x, t: guided(
            net.teacher, x, t, cond, null_cond, self.guidance
        )
        return ode.advance(self.solver, self.process, teacher, xt, t, r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowingGrid(DiscreteConsistency):
    """Training without a teacher, on a grid whose number of levels grows as `count` says."""

    # steps over which the grid grows
    total: int = 400_000
    # intervals at the start
    s0: int = 2
    # intervals at the end
    s1: int = 150
    # levels are even in t^(1/rho); 7 on EDM
    rho: float = 1.0

    count = staticmethod(consistency.ct_levels)

    def pair(self, ctx, n):
        count = self.count(ctx.step, self.total, self.s0, self.s1)
        levels = consistency.noise_levels(
            count, self.s1 + 1, self.process.t_min, self.process.t_max, self.rho
        )
        return consistency.neighbours(
            ctx.key("level"), levels, self.logits(levels), n
        )

    def logits(self, levels: Float[Array, " N"]) -> Float[Array, " N-1"]:
        """Log-probabilities of the intervals, up to a constant; those after the last level are
        empty.
        """
        return jnp.where(jnp.diff(levels) > 0, 0.0, -jnp.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CT(GrowingGrid):
    """Consistency training: from s0 to s1 + 1 levels, their intervals equally likely.

    The decay of the target's average grows along, in place of the config's. Samples are made by
    this average too, where the paper keeps a second one of rate .9999.
    """

    # intervals at the end; the paper's 150 (CIFAR-10, LSUN), 200 (ImageNet-64)
    s1: int = 150
    # decay of the average over s0 intervals; the paper's .9 (CIFAR-10), .95 (the others); 0: that
    # of roles.student.ema
    mu0: float = 0.9

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(("student",), self.loss, decay=self.decay if self.mu0 else None),
        )

    def decay(self, k: Array) -> Array:
        """mu at the student's update k, from 1: that of the grid which the update was made on."""
        count = self.count(k - 1, self.total, self.s0, self.s1)
        return consistency.ct_decay(count, self.s0, self.mu0)
