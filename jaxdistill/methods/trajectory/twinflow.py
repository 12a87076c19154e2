"""TwinFlow - Realizing One-step Generation on Large Models with Self-adversarial Flows
(arXiv:2512.05150).

Times are extended to [-1, 1]: what the network says at t < 0 is the velocity of a twin flow that
ends in its own one-step samples, so that one set of weights holds generator, real score and fake
score. One-step samples are pushed along the difference of the two velocities, which is the gradient
of distribution matching. RCGM (rcgm.py) trains the real branch.

A quarter of the rows trains the twin, and the one-step rows carry the push. Departures: RCGM's;
rows dealt in turn, not in blocks.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.fields import Limit
from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.methods.trajectory.rcgm import RCGM
from jaxdistill.objectives.consistency import clip_tangent


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwinFlow(RCGM):
    """From scratch or from flow-matching weights (the student's `init`), with an averaged F^-:
    kappa between 0 and 1.
    """

    rows: tuple[str, ...] = (
        "e2e",
        "mul",
        "any",
        "adv",
    )  # equal shares; the paper's lambda, near 1/3, is that of e2e and adv
    rectify_weight: float = 0.5  # of the push; the paper's .5, .75 for OpenUni
    rectify_clip: Limit = 1.0  # of every component of the push

    kinds = ("e2e", "mul", "any", "adv")  # adv: t and r both -|t|, towards an own sample

    def one_step(self, net: Nets, z: Array, cond) -> Array:
        """F(z, 1, 0), whose sample is z - F."""
        return net.student(z, jnp.ones(z.shape[:1]), cond, r=jnp.zeros(z.shape[:1])).v

    def own(self, net: Nets, batch: Batch, key: Array) -> Array:
        """x_f, own samples under the batch's conditions, without gradient."""
        z = jax.random.normal(key, batch["x"].shape, batch["x"].dtype)
        return jax.lax.stop_gradient(z - self.one_step(net, z, batch.get("cond")))

    def data(self, net: Nets, batch: Batch, ctx: Ctx) -> Batch:
        """What RCGM's rows are trained on."""
        return batch

    def twin(self, net: Nets, x_f: Array, cond, eps: Array, t: Array) -> Array:
        """L_adv: the flow that ends in own samples `x_f`, at negative times; [B]."""
        F = net.student(self.process.add_noise(x_f, eps, t), -t, cond, r=-t).v
        return self.distance(F, self.process.velocity(x_f, eps, t))

    def push(self, net: Nets, x_f: Array, cond, ctx: Ctx) -> Array:
        """dv, the real velocity minus the twin's at noised own samples: live weights, without
        gradient.
        """
        t = self.times.draw(self.process, ctx.key("push_t"), x_f.shape[0])
        eps = jax.random.normal(ctx.key("push_eps"), x_f.shape, x_f.dtype)
        xt = self.process.add_noise(jax.lax.stop_gradient(x_f), eps, t)
        at = lambda t: net.student(xt, t, cond, r=t).v
        return jax.lax.stop_gradient(at(t) - at(-t))

    def rectify(self, F: Array, dv: Array) -> Array:
        """L_rectify of F = F(z, 1, 0), [B]. F enters the sample with the sign -1, hence the score's
        direction is -dv.
        """
        return self.distance(F, jax.lax.stop_gradient(F + clip_tangent(dv, self.rectify_clip)))

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x = ctx.batch["x"]
        kind = self.layout(ctx.batch["x"].shape[0])
        t, r = self.interval(ctx, len(kind))
        eps = jax.random.normal(ctx.key("eps"), x.shape, x.dtype)
        real = np.flatnonzero(kind != "adv")
        adv = np.flatnonzero(kind == "adv")
        take = lambda rows: jax.tree.map(lambda v: v[rows], dict(ctx.batch))
        error, F, _ = self.base(net, self.data(net, take(real), ctx), eps[real], t[real], r[real])
        loss = jnp.sum(error) / len(kind)
        metrics = {"base": jnp.mean(error)}
        if len(adv):
            batch = take(adv)
            error = self.twin(
                net, self.own(net, batch, ctx.key("own")), batch.get("cond"), eps[adv], t[adv]
            )
            loss = loss + jnp.sum(error) / len(kind)
            metrics["twin"] = jnp.mean(error)
        if self.rectify_weight and "e2e" in self.rows:
            rows = np.flatnonzero(kind == "e2e")
            F = F[np.flatnonzero(kind[real] == "e2e")]
            dv = self.push(
                net, eps[rows] - F, take(rows).get("cond"), ctx
            )  # at t = 1 the state is its noise
            loss = loss + self.rectify_weight * jnp.mean(self.rectify(F, dv))
            metrics["push"] = jnp.mean(jnp.abs(dv))  # falls as the two flows meet
        return Out(loss, metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullTwinFlow(TwinFlow):
    """The tutorial: every term on every row, of squared errors and weight 1, the push unclipped,
    the twin on the base's noise and times, another row's condition as the null. A gradient that is
    not finite stops the run, where the tutorial's is 0.
    """

    rows: tuple[str, ...] = ("any",)
    barron_alpha: float = 2.0
    barron_c: float = 1.0
    rectify_weight: float = 1.0
    rectify_clip: Limit = math.inf

    def weight(self, t, r):
        return jnp.ones_like(t)

    def loss(self, net, ctx):
        n = ctx.batch["x"].shape[0]
        cond = ctx.batch.get("cond")
        batch = {
            **ctx.batch,
            "null_cond": jax.tree.map(lambda c: jax.random.permutation(ctx.key("null"), c), cond),
        }
        t, r = self.interval(ctx, n)
        eps = jax.random.normal(ctx.key("eps"), batch["x"].shape, batch["x"].dtype)
        base, _, v = self.base(net, batch, eps, t, r)
        flow = self.distance(
            net.student(self.process.add_noise(batch["x"], eps, t), t, cond, r=t).v,
            jax.lax.stop_gradient(v),
        )
        F = self.one_step(net, eps, cond)
        whole = self.distance(F, self.consistent(net, batch, F, eps, v, jnp.ones(n), jnp.zeros(n)))
        x_f = jax.lax.stop_gradient(eps - F)
        twin = self.twin(net, x_f, cond, eps, t)
        dv = self.push(net, x_f, cond, ctx)
        loss = jnp.mean(base + flow + whole + twin + self.rectify_weight * self.rectify(F, dv))
        return Out(
            loss, {"base": jnp.mean(base), "twin": jnp.mean(twin), "push": jnp.mean(jnp.abs(dv))}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedTwinFlow(TwinFlow):
    """The student starts from a frozen base, as adapters on it where memory is short (Qwen-Image,
    with `target="student"`).
    """

    inits = {"student": "teacher"}
    frozen = ("teacher",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwinFlowDistillation(TunedTwinFlow):
    """kappa = 1: the base's own guided velocity is the target of step 1; the recursion stays live."""

    target: str = "student"
    enhance: float = 4.0  # guidance scale of the base

    def guided(self, net, batch, xt, t, v):
        return guided(net.teacher, xt, t, batch.get("cond"), batch.get("null_cond"), self.enhance).v


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFreeTwinFlow(TwinFlowDistillation):
    """No data but conditions: the student's own one-step samples stand in for it."""

    def data(self, net, batch, ctx):
        return {**batch, "x": self.own(net, batch, ctx.key("own_data"))}
