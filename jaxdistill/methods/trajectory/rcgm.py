"""RCGM - Any-step Generation via N-th Order Recursive Consistent Velocity Field Estimation, as in
TwinFlow (arXiv:2512.05150).

A network F(x_t, t, r) of the average velocity from t to r is trained to agree with its own way
there: a step of Delta along the data's velocity, then N average velocities of its averaged copy
over equal pieces of the rest. N = 1 is consistency and MeanFlow with a finite difference in place
of the derivative, N = 2 holds with slower averages. One network then samples in one, few or many
steps. The paper is on openreview (GnawtLKGkP); constants and code are TwinFlow's.

Departures: the network's second embedder is fed t - r, not r. The average is updated after each
step, which gives the targets of the next step the same weights as the paper's update before them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.fields import Natural
from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Refused, nearest
from jaxdistill.diffusion.process import Flow, expand
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.trajectory.meanflow import AverageVelocity
from jaxdistill.objectives import weighting
from jaxdistill.objectives.consistency import clip_tangent
from jaxdistill.samplers.fewstep import jump, warped_times


@dataclasses.dataclass(frozen=True, kw_only=True)
class RCGM(AverageVelocity):
    process: Flow = Flow()  # the straight path, without shift
    times: Uniform = Uniform()  # law of t; the paper's Beta(1, 1)
    rows: tuple[str, ...] = (
        "e2e",
        "mul",
        "any",
    )  # what the batch's rows do, in turn; name a kind twice for a double share
    # N, average velocities in the target; the paper's 2, best near 4; 0: flow matching, on rows
    # "mul"
    order: Natural = 2
    delta: float = 0.01  # Delta, the step along the velocity
    ratio: float = 1.0  # of consistency: r is uniform from (1 - ratio) t to t
    near: float = 0.05  # the same on rows "mul", where ratio is not less
    enhance: float = (
        0.5  # training-time guidance, v + enhance (v_cond - v_null); the paper's .5 and .8; 0: none
    )
    enhance_times: tuple[float, float] = (
        0.0,
        1.0,
    )  # where it applies, ends excluded: not on rows "e2e"
    target: str = (
        "ema_student"  # the role that is F^-; "student", the live network, is the paper's kappa = 0
    )
    clip: float = 1.0  # of every component of the residual xi
    barron_alpha: float = 1.0  # of the robust metric; 2: squared error over barron_c
    barron_c: float = 1e-3  # its scale, a root mean square error

    # of sampling: few (r = 0) | any (r = the next time; 4 to 8 steps) | mul (r = t; 30 steps)
    style: str = "few"
    fresh: float = 1.0  # rho, share of fresh noise between steps; 0 for "any" and "mul"
    gaps: tuple[float, float] = (
        0.001,
        0.6,
    )  # of the sampler's grid, beyond one step; the paper's (.001, .6) at 2, (.001, .5) at 4
    warp: tuple[float, float, float] = (
        1.0,
        1.0,
        1.0,
    )  # of the grid, Kumaraswamy's a, b, c; (1.17, .8, 1.1) for "mul"
    extrapolate: float = 0.0  # of the sampler's predictions

    kinds = ("e2e", "mul", "any")  # (t, r) = (1, 0) | r near t | r anywhere below t

    def __post_init__(self):
        if self.process != Flow():
            raise Refused(f"method.process={self.process}: expected Flow() without shift")
        for kind in self.rows:
            if kind not in self.kinds:
                raise Refused(f"method.rows: {kind!r}{nearest(kind, self.kinds)}")
        if not self.order and {"e2e", "any"} & set(self.rows):
            raise Refused(
                f"method.order=0 is flow matching: expected only rows 'mul', not {self.rows}"
            )

    def layout(self, n: int) -> np.ndarray:
        """The kind of each of `n` rows; in turn, so that every part of a sharded batch has all of
        them.
        """
        if n < len(self.rows):
            raise Refused(
                f"data.batch_size: {n} rows, expected at least {len(self.rows)} for method.rows={self.rows}"
            )
        return np.resize(self.rows, n)

    def interval(self, ctx: Ctx, n: int) -> tuple[Array, Array]:
        """(t, r) [n] with r <= t, by the kind of each row."""
        kind = self.layout(n)
        t = self.times.draw(self.process, ctx.key("t"), n)
        share = jnp.where(kind == "mul", min(self.near, self.ratio), self.ratio)
        r = t - t * share * jax.random.uniform(ctx.key("r"), (n,))
        return jnp.where(kind == "e2e", 1.0, t), jnp.where(kind == "e2e", 0.0, r)

    def velocity(self, net: Nets, batch: Batch, xt: Array, t: Array, v: Array) -> Array:
        """Step 1: the target velocity at x_t, from `v` of the sample's own path."""
        if not self.enhance:
            return v
        where = (t > self.enhance_times[0]) & (t < self.enhance_times[1])
        return jax.lax.stop_gradient(
            jnp.where(expand(where, v), self.guided(net, batch, xt, t, v), v)
        )

    def guided(self, net: Nets, batch: Batch, xt: Array, t: Array, v: Array) -> Array:
        """The velocity with guidance folded in."""
        at = lambda cond: getattr(net, self.target)(xt, t, cond, r=t).v
        return v + self.enhance * (at(batch.get("cond")) - at(batch.get("null_cond")))

    def consistent(
        self, net: Nets, batch: Batch, F: Array, xt: Array, v: Array, t: Array, r: Array
    ) -> Array:
        """Steps 2 to 5: the target of F = F(x_t, t, r), without gradient."""
        if not self.order:
            return v
        # step 2
        middle = jnp.maximum(t - self.delta, r)
        xm = xt - self.delta * v
        share = jnp.arange(self.order + 1)[:, None] / self.order
        average = lambda x, t, r: getattr(net, self.target)(x, t, batch.get("cond"), r=r)
        D = xm - jump(average, xm, middle * (1 - share) + r * share)  # step 3
        way = expand(t - r, xt)
        xi = jnp.where(way < self.delta, F, (F * way - D) / self.delta) - v  # step 4
        return jax.lax.stop_gradient(F - clip_tangent(xi, self.clip))  # step 5

    def distance(self, a: Array, b: Array) -> Array:
        """d(a, b), [B ...] -> [B]."""
        error = jnp.mean((a - b) ** 2, axis=range(1, a.ndim))
        return error * weighting.barron(error, self.barron_alpha, self.barron_c)

    def weight(self, t: Array, r: Array) -> Array:
        return weighting.gap(t, r)

    def base(
        self, net: Nets, batch: Batch, eps: Array, t: Array, r: Array
    ) -> tuple[Array, Array, Array]:
        """(weighted error of each row [B], F, v)."""
        xt = self.process.add_noise(batch["x"], eps, t)
        v = self.velocity(net, batch, xt, t, self.process.velocity(batch["x"], eps, t))
        F = net.student(xt, t, batch.get("cond"), r=r).v
        return (
            self.weight(t, r) * self.distance(F, self.consistent(net, batch, F, xt, v, t, r)),
            F,
            v,
        )

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        t, r = self.interval(ctx, x0.shape[0])
        eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
        return Out(jnp.mean(self.base(net, ctx.batch, eps, t, r)[0]))

    def sample(self, net, noise, cond, key, steps):
        average = lambda x, t, r: net(x, t, cond, r=r)
        times = warped_times(steps, self.gaps if steps > 1 else (0.0, 0.0), self.warp)
        how = dict(style=self.style, fresh=self.fresh, extrapolate=self.extrapolate)
        return jump(average, self.process.start(noise), times, key, **how)
