"""RCGM - Any-step Generation via N-th Order Recursive Consistent Velocity Field Estimation, as in
TwinFlow (arXiv:2512.05150).

A network F(x_t, t, r) of the average velocity from t to r is trained to agree with its own path
from t to r: a step of Delta along the data's velocity, then N average velocities of its averaged
copy F^- over equal pieces of the rest. N = 1 is consistency and MeanFlow with a finite difference
in place of the derivative; N = 2 also works with slower averages. One network then samples in one,
few or many steps. The paper is on openreview (GnawtLKGkP); constants and code are TwinFlow's.

Departures: the network's second embedder is fed t - r, not r. The average is updated after each
step, which gives the targets of the next step the same weights as the paper's update before them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdistill.core.fields import Natural
from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Refused, nearest
from jaxdistill.diffusion.process import Flow, expand
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.trajectory.meanflow import AverageVelocity
from jaxdistill.objectives import weighting
from jaxdistill.objectives.consistency import clip_tangent
from jaxdistill.objectives.numerics import mean_per_sample
from jaxdistill.samplers.fewstep import jump, warped_times


@dataclasses.dataclass(frozen=True, kw_only=True)
class RCGM(AverageVelocity):
    """From data. The samples of a batch are split over objectives, which differ in (t, r):
    e2e (1, 0) | mul: r near t | any: r anywhere below t.
    """

    # the straight path, without shift
    process: Flow = Flow()
    # distribution of t; the paper's Beta(1, 1)
    times: Uniform = Uniform()
    # objectives that the samples of a batch are split over, in turn; one named twice counts double
    objectives: tuple[str, ...] = ("e2e", "mul", "any")
    # N, average velocities in the target; the paper's 2, best near 4; 0: flow matching, by "mul"
    order: Natural = 2
    # Delta, length of the step along the velocity
    delta: float = 0.01
    # consistency ratio: r is uniform from (1 - ratio) t to t
    ratio: float = 1.0
    # upper limit of that ratio for "mul"
    near: float = 0.05
    # guidance folded into the target, v + training_guidance (v_cond - v_null); the paper's .5 and
    # .8; 0: none
    training_guidance: float = 0.5
    # where guidance applies: times between these two, so not at t = 1, hence not for "e2e"
    guidance_times: tuple[float, float] = (0.0, 1.0)
    # F^-: ema_student | student, the network as it is, which is the paper's kappa = 0
    target_network: str = "ema_student"
    # upper limit of every component of the residual xi
    clip: float = 1.0
    # shape of the robust metric; 2: squared error over barron_c
    barron_alpha: float = 1.0
    # scale of the robust metric, a root mean square error
    barron_c: float = 1e-3

    # r of sampling: few (0) | any (the next time; 4 to 8 steps) | mul (t; 30 steps)
    style: str = "few"
    # rho of sampling, share of fresh noise between steps; 0 for "any" and "mul"
    fresh: float = 1.0
    # gaps of the sampling grid at both ends, beyond one step; the paper's (.001, .6) at 2 steps,
    # (.001, .5) at 4
    gaps: tuple[float, float] = (0.001, 0.6)
    # Kumaraswamy's a, b, c of the sampling grid; (1.17, .8, 1.1) for "mul"
    warp: tuple[float, float, float] = (1.0, 1.0, 1.0)
    # extrapolation of the sampler's predictions
    extrapolate: float = 0.0

    kinds = ("e2e", "mul", "any")  # of objectives
    renamed = {
        "rows": "objectives",
        "enhance": "training_guidance",
        "enhance_times": "guidance_times",
        "target": "target_network",
    }

    def __post_init__(self):
        if self.process != Flow():
            raise Refused(
                f"method.process={self.process}: expected Flow() without shift"
            )
        for kind in self.objectives:
            if kind not in self.kinds:
                raise Refused(
                    f"method.objectives: {kind!r}{nearest(kind, self.kinds)}"
                )
        if not self.order and {"e2e", "any"} & set(self.objectives):
            expected = f"expected only objectives 'mul', not {self.objectives}"
            raise Refused(f"method.order=0 is flow matching: {expected}")

    def assignment(self, n: int) -> np.ndarray:
        """The objective of each of `n` samples, in turn, so that every shard has all of them."""
        if n < len(self.objectives):
            expected = f"at least {len(self.objectives)} for method.objectives={self.objectives}"
            raise Refused(f"data.batch_size: {n} samples, expected {expected}")
        return np.resize(self.objectives, n)

    def interval(
        self, ctx: Ctx, n: int
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """(t, r) of `n` samples, by their objectives; r <= t."""
        kind = self.assignment(n)
        t = self.times.draw(self.process, ctx.key("t"), n)
        share = jnp.where(kind == "mul", min(self.near, self.ratio), self.ratio)
        r = t - t * share * jax.random.uniform(ctx.key("r"), (n,))
        return jnp.where(kind == "e2e", 1.0, t), jnp.where(kind == "e2e", 0.0, r)

    def velocity(
        self, net: Nets, batch: Batch, xt: Array, t: Array, v: Array
    ) -> Array:
        """Step 1: the target velocity at x_t, from `v` of the sample's own path."""
        if not self.training_guidance:
            return v
        network = getattr(net, self.target_network)
        conditional = network(xt, t, batch.get("cond"), r=t).v
        unconditional = network(xt, t, batch.get("null_cond"), r=t).v
        guided = v + self.training_guidance * (conditional - unconditional)
        return self.within_guidance_times(t, guided, v)

    def within_guidance_times(self, t: Array, guided: Array, v: Array) -> Array:
        """`guided` inside `guidance_times`, elsewhere `v`; without gradient."""
        first, last = self.guidance_times
        inside = (t > first) & (t < last)
        return jax.lax.stop_gradient(jnp.where(expand(inside, v), guided, v))

    def consistent(
        self,
        net: Nets,
        batch: Batch,
        F: Array,
        xt: Array,
        v: Array,
        t: Array,
        r: Array,
    ) -> Array:
        """Steps 2 to 5: the target of F = F(x_t, t, r), without gradient."""
        if not self.order:
            return v
        network = getattr(net, self.target_network)
        average = lambda x, t, r: network(x, t, batch.get("cond"), r=r)
        middle = jnp.maximum(t - self.delta, r)
        xm = xt - self.delta * v  # step 2
        share = jnp.arange(self.order + 1)[:, None] / self.order
        D = xm - jump(average, xm, middle * (1 - share) + r * share)  # step 3
        length = expand(t - r, xt)
        residual = jnp.where(length < self.delta, F, (F * length - D) / self.delta)
        xi = residual - v  # step 4
        return jax.lax.stop_gradient(F - clip_tangent(xi, self.clip))  # step 5

    def distance(
        self, a: Float[Array, "B ..."], b: Float[Array, "B ..."]
    ) -> Float[Array, " B"]:
        """d(a, b), Barron's robust metric of the mean squared error."""
        error = mean_per_sample((a - b) ** 2)
        return error * weighting.barron(error, self.barron_alpha, self.barron_c)

    def weight(
        self, t: Float[Array, " B"], r: Float[Array, " B"]
    ) -> Float[Array, " B"]:
        return weighting.gap(t, r)

    def base(
        self, net: Nets, batch: Batch, eps: Array, t: Array, r: Array
    ) -> tuple[Float[Array, " B"], Array, Array]:
        """(weighted error of each sample, F, v)."""
        xt = self.process.add_noise(batch["x"], eps, t)
        v = self.velocity(
            net, batch, xt, t, self.process.velocity(batch["x"], eps, t)
        )
        F = net.student(xt, t, batch.get("cond"), r=r).v
        error = self.distance(F, self.consistent(net, batch, F, xt, v, t, r))
        return self.weight(t, r) * error, F, v

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        t, r = self.interval(ctx, x0.shape[0])
        eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
        error, _, _ = self.base(net, ctx.batch, eps, t, r)
        return Out(jnp.mean(error))

    def sample(self, net, noise, cond, key, steps):
        average = lambda x, t, r: net(x, t, cond, r=r)
        gaps = self.gaps if steps > 1 else (0.0, 0.0)
        times = warped_times(steps, gaps, self.warp)
        return jump(
            average,
            self.process.start(noise),
            times,
            key,
            style=self.style,
            fresh=self.fresh,
            extrapolate=self.extrapolate,
        )
