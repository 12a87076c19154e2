"""TwinFlow - Realizing One-step Generation on Large Models with Self-adversarial Flows
(arXiv:2512.05150).

Times are extended to [-1, 1]: the network's output at t < 0 is the velocity of a twin flow that
ends in the network's own one-step samples, so that one set of weights holds generator, real score
and fake score. One-step samples are pushed along the difference of the two velocities, which is the
gradient of distribution matching. RCGM (rcgm.py) trains the real branch.

A quarter of the samples trains the twin, and the samples of "e2e" carry the push. Departures:
RCGM's; the samples of an objective are not a block of the batch.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key

from jaxdistill.core.fields import Limit
from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.methods.trajectory.rcgm import RCGM
from jaxdistill.objectives.consistency import clip_tangent


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwinFlow(RCGM):
    """From scratch or from flow-matching weights (the student's `init`), with an averaged F^-,
    whose kappa is between 0 and 1. The fourth objective is adv: t and r both negative, towards an
    own sample.
    """

    # equal shares; the paper's lambda, near 1/3, is that of e2e and adv
    objectives: tuple[str, ...] = ("e2e", "mul", "any", "adv")
    # weight of the push; the paper's .5, and .75 for OpenUni
    rectify_weight: float = 0.5
    # upper limit of every component of the push
    rectify_clip: Limit = 1.0

    kinds = ("e2e", "mul", "any", "adv")

    def one_step(self, net: Nets, z: Array, cond) -> Array:
        """F(z, 1, 0); the one-step sample is z - F."""
        ones = jnp.ones(z.shape[:1])
        zeros = jnp.zeros(z.shape[:1])
        return net.student(z, ones, cond, r=zeros).v

    def own_samples(self, net: Nets, batch: Batch, key: Key[Array, ""]) -> Array:
        """x_f, one-step samples under the batch's conditions, without gradient."""
        z = jax.random.normal(key, batch["x"].shape, batch["x"].dtype)
        return jax.lax.stop_gradient(z - self.one_step(net, z, batch.get("cond")))

    def data(self, net: Nets, batch: Batch, ctx: Ctx) -> Batch:
        """The batch that RCGM's objectives are trained on."""
        return batch

    def twin(
        self, net: Nets, x_f: Array, cond, eps: Array, t: Array
    ) -> Float[Array, " B"]:
        """L_adv: the flow that ends in the own samples `x_f`, at negative times."""
        F = net.student(self.process.add_noise(x_f, eps, t), -t, cond, r=-t).v
        return self.distance(F, self.process.velocity(x_f, eps, t))

    def push(self, net: Nets, x_f: Array, cond, ctx: Ctx) -> Array:
        """dv, the real velocity minus the twin's at noised own samples, without gradient."""
        t = self.times.draw(self.process, ctx.key("push_t"), x_f.shape[0])
        eps = jax.random.normal(ctx.key("push_eps"), x_f.shape, x_f.dtype)
        xt = self.process.add_noise(jax.lax.stop_gradient(x_f), eps, t)
        real = net.student(xt, t, cond, r=t).v
        twin = net.student(xt, -t, cond, r=-t).v
        return jax.lax.stop_gradient(real - twin)

    def rectify(self, F: Array, dv: Array) -> Float[Array, " B"]:
        """L_rectify of F = F(z, 1, 0).

        The sample is z - F, so the direction of the score, -dv, is dv for F.
        """
        return self.distance(
            F, jax.lax.stop_gradient(F + clip_tangent(dv, self.rectify_clip))
        )

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x = ctx.batch["x"]
        kind = self.assignment(x.shape[0])
        t, r = self.interval(ctx, len(kind))
        eps = jax.random.normal(ctx.key("eps"), x.shape, x.dtype)
        real = np.flatnonzero(kind != "adv")
        adv = np.flatnonzero(kind == "adv")
        batch = self.data(net, chosen(ctx.batch, real), ctx)
        error, F, _ = self.base(net, batch, eps[real], t[real], r[real])
        loss = jnp.sum(error) / len(kind)
        metrics = {"base": jnp.mean(error)}
        if len(adv):
            batch = chosen(ctx.batch, adv)
            x_f = self.own_samples(net, batch, ctx.key("own"))
            error = self.twin(net, x_f, batch.get("cond"), eps[adv], t[adv])
            loss = loss + jnp.sum(error) / len(kind)
            metrics["twin"] = jnp.mean(error)
        if self.rectify_weight and "e2e" in self.objectives:
            e2e = np.flatnonzero(kind == "e2e")
            F = F[np.flatnonzero(kind[real] == "e2e")]
            x_f = eps[e2e] - F  # at t = 1 the state is its noise
            dv = self.push(net, x_f, chosen(ctx.batch, e2e).get("cond"), ctx)
            loss = loss + self.rectify_weight * jnp.mean(self.rectify(F, dv))
            metrics["push"] = jnp.mean(jnp.abs(dv))  # falls as the two flows meet
        return Out(loss, metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullTwinFlow(TwinFlow):
    """The authors' tutorial: every term on every sample.

    All terms are squared errors of weight 1, the push is not clipped, the twin has the base's noise
    and times, and the null condition is that of another sample. A gradient that is not finite stops
    the run; in the tutorial it counts as 0.
    """

    objectives: tuple[str, ...] = ("any",)
    barron_alpha: float = 2.0
    barron_c: float = 1.0
    rectify_weight: float = 1.0
    rectify_clip: Limit = math.inf

    def weight(self, t, r):
        return jnp.ones_like(t)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x = ctx.batch["x"]
        n = x.shape[0]
        cond = ctx.batch.get("cond")
        shuffle = lambda c: jax.random.permutation(ctx.key("null"), c)
        batch = {**ctx.batch, "null_cond": jax.tree.map(shuffle, cond)}
        t, r = self.interval(ctx, n)
        eps = jax.random.normal(ctx.key("eps"), x.shape, x.dtype)
        base, _, v = self.base(net, batch, eps, t, r)
        instantaneous = net.student(
            self.process.add_noise(x, eps, t), t, cond, r=t
        ).v
        flow = self.distance(instantaneous, jax.lax.stop_gradient(v))
        F = self.one_step(net, eps, cond)
        target = self.consistent(net, batch, F, eps, v, jnp.ones(n), jnp.zeros(n))
        end_to_end = self.distance(F, target)
        x_f = jax.lax.stop_gradient(eps - F)
        twin = self.twin(net, x_f, cond, eps, t)
        dv = self.push(net, x_f, cond, ctx)
        rectify = self.rectify_weight * self.rectify(F, dv)
        loss = jnp.mean(base + flow + end_to_end + twin + rectify)
        push = jnp.mean(jnp.abs(dv))
        return Out(
            loss, {"base": jnp.mean(base), "twin": jnp.mean(twin), "push": push}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedTwinFlow(TwinFlow):
    """The student starts from a frozen base; where memory is short, as adapters on it (Qwen-Image,
    with target_network="student").
    """

    inits = {"student": "teacher"}
    frozen = ("teacher",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwinFlowDistillation(TunedTwinFlow):
    """kappa = 1: the velocity of step 1 is the base's, guided; the recursion has no average."""

    target_network: str = "student"
    # guidance scale of the base; 0: the velocity is the data's
    guidance: float = 4.0
    # no field of this class
    training_guidance: float = dataclasses.field(default=0.0, init=False)

    renamed = {"enhance": "guidance"}

    def velocity(self, net, batch, xt, t, v):
        if not self.guidance:
            return v
        cond = batch.get("cond")
        null_cond = batch.get("null_cond")
        base = guided(net.teacher, xt, t, cond, null_cond, self.guidance).v
        return self.within_guidance_times(t, base, v)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFreeTwinFlow(TwinFlowDistillation):
    """No data but conditions: the student's own one-step samples take the place of the data."""

    def data(self, net, batch, ctx):
        return {**batch, "x": self.own_samples(net, batch, ctx.key("own_data"))}


def chosen(batch: Batch, indices: np.ndarray) -> Batch:
    """These samples of a batch."""
    return jax.tree.map(lambda v: v[indices], dict(batch))
