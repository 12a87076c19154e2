"""Uni-Instruct - Unified One-Step Diffusion Model Distillation through f-Divergences
(arXiv:2505.20755).

An f-divergence at t = 0 is an integral over noise levels of E[h(r) |s_fake - s_real|^2], with r =
p_real / p_fake. Its gradient combines that of score identity methods (SIM), differentiated through
both denoisers, with that of Diff-Instruct (DI). The divergence f sets the weights of the two from
r, which a discriminator on the fake network's features estimates. Training has three phases: the
critics alone, then reverse KL, then the chosen divergence. Earlier methods are special cases (table
in `diff_instruct.py`).

Departures: r is exp(logit), where the authors' code takes r from the value of the generator's loss;
|d| in the DI term is the norm of each sample, in the code that of the batch. As in the code, the
factor 2 of the exact SIM term, |d|^2 in place of |d|, the third term (FGM) and the gradient through
r are left out; `ExactUniInstruct` has them. The discriminator is a head on the features, as in
DMD2; `SharedUniInstruct` has the paper's own, which has no weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.core.fields import Natural
from jaxdistill.core.types import Array, Ctx, Method, Nets, Out, Turn
from jaxdistill.diffusion.process import EDM, Pred, Process, expand
from jaxdistill.diffusion.times import Karras, LogNormalSNR, Uniform
from jaxdistill.methods.distribution.diff_instruct import FromLevel
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.objectives import fdivergence, gan, score, weighting
from jaxdistill.objectives.fdivergence import FDivergence, Jeffreys, ReverseKL
from jaxdistill.objectives.numerics import mean_per_sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniInstruct(FromLevel, DMD2):
    process: Process = EDM()
    # the paper's init_sigma: x0 = G(2.5 z, 2.5)
    student_times: tuple[float, ...] = (2.5,)
    # of the student's loss: sigma from .002 to 24.4
    match_times: Uniform = Karras(high=0.8)
    # of both critics' losses
    fake_times: Uniform = LogNormalSNR(mean=-1.2, std=1.2)
    fake_target: str = "edm"
    critic_steps: int = 1  # critic updates per student update
    divergence: FDivergence = Jeffreys(forward=0.4, reverse=0.6)  # the paper's best
    scale: float = 100.0  # of the expansion in the student's loss
    # of the GAN in the student's loss, times the number of dimensions
    gan_weight: float = 0.01
    disc_weight: float = 1.0  # of the discriminator's term in the critics' loss
    ratio_range: tuple[float, float] = (1e-3, 1e3)  # that r is clipped to
    # Steps before the student's first update; the paper's 100k images in batches of 256.
    critic_only: Natural = 391
    # Step up to which the student's loss is the SIM term of reverse KL, without the GAN; the
    # paper's 200k images.
    reverse_until: Natural = 782

    @classmethod
    def upgraded(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Config fields in which the name of a divergence is that divergence."""
        return fdivergence.from_name(given)

    @property
    def turns(self) -> tuple[Turn, ...]:
        critics, student = super().turns
        moves = tuple(role for role in critics.moves if role in self.inits)
        when = lambda step: step >= self.critic_only and student.when(step)
        return (
            dataclasses.replace(critics, moves=moves),
            dataclasses.replace(student, when=when),
        )

    def settled(self) -> Method:
        return dataclasses.replace(self, critic_only=0)

    def judge(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> tuple[Pred, Array]:
        """The fake network's prediction and the discriminator's logits [B ...], in one call."""
        pred = net.fake(xt, t, ctx.batch.get("cond"), taps=self.taps)
        return pred, self.logits_of(net, pred.features, t, ctx)

    def logits_of(
        self, net: Nets, features: tuple[Array, ...], t: Array, ctx: Ctx
    ) -> Array:
        return net.disc(features, self.process.angle(t), ctx.batch.get("cond"))

    def ratio(self, logits: Array) -> Array:
        """r = p_real / p_fake at x_t, [B], a constant."""
        return jax.lax.stop_gradient(self.clipped_ratio(logits))

    def clipped_ratio(self, logits: Array) -> Array:
        logit = mean_per_sample(logits)
        return fdivergence.ratio(logit, *self.ratio_range)

    def weights(self, r: Array, step: Array) -> tuple[Array, Array, Array]:
        """Weights of the SIM, DI and FGM terms, [B] each (table of section 3)."""
        early = ReverseKL()
        late = self.divergence
        is_early = step < self.reverse_until
        sim = jnp.where(is_early, early.h(r), late.h(r))
        di = jnp.where(is_early, early.di(r), late.di(r))
        fgm = jnp.where(is_early, early.fgm(r), late.fgm(r))
        return sim, di, fgm

    def expansion(
        self,
        net: Nets,
        ctx: Ctx,
        x0: Array,
        xt: Array,
        t: Array,
        real: Pred,
        fake: Pred,
        logits: Array,
    ) -> Array:
        """lambda_SIM L_SIM + lambda_DI L_DI of each sample, summed over dimensions: [B]."""
        sim, di, _ = self.weights(self.ratio(logits), ctx.step)
        gap = fake.x0 - real.x0
        norm = jnp.sqrt(jnp.sum(gap**2, axis=range(1, gap.ndim), keepdims=True))
        diff_instruct = score.summed_surrogate(x0, expand(di, gap) * norm * gap)
        identity = score.sid_loss(x0, real.x0, fake.x0, alpha=1.0, scale=1.0)
        return sim * identity + diff_instruct

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        """The expansion of the divergence, and after its first phase the GAN."""
        x0 = self.generate(net, ctx)
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        real = self.real(net, xt, t, ctx)
        fake, logits = self.judge(net, xt, t, ctx)
        match = jnp.mean(self.expansion(net, ctx, x0, xt, t, real, fake, logits))
        omega = score.inverse_distance(x0, real.x0).reshape(-1)
        logits_in_range = jnp.clip(logits, -10.0, 10.0)
        adversarial = jnp.mean(
            omega * gan.non_saturating_generator(logits_in_range)
        )
        dimensions = math.prod(x0.shape[1:])
        is_early = ctx.step < self.reverse_until
        gan_weight = jnp.where(is_early, 0.0, self.gan_weight * dimensions)
        loss = self.scale * match + gan_weight * adversarial
        ratio = jnp.mean(self.ratio(logits))
        return Out(loss, {"match": match, "gan": adversarial, "ratio": ratio})

    def critic_loss(self, net: Nets, ctx: Ctx) -> Out:
        """Denoising, summed over dimensions, and the discriminator's loss at the same times and
        noise, which generated and real samples share.
        """
        x0 = jax.lax.stop_gradient(self.generate(net, ctx))
        denoise = math.prod(x0.shape[1:]) * self.denoise(net, ctx, x0)

        def noised(x: Array) -> tuple[Array, Array]:
            xt, t, _ = self.diffuse(x, self.fake_times, ctx, "fake")
            return xt, t

        _, t = noised(x0)
        _, fake = self.judge(net, *noised(x0), ctx)
        _, real = self.judge(net, *noised(ctx.batch["x"]), ctx)
        alpha, sigma = self.process.alpha_sigma(t)
        # The mean over the batch before the weights, as in the code, whose entropy has none.
        entropy = 0.5 * jnp.mean(gan.non_saturating_discriminator(real, fake))
        adversarial = jnp.mean(weighting.edm(sigma / alpha)) * entropy
        loss = denoise + self.disc_weight * adversarial
        return Out(loss, {"denoise": denoise, "gan": adversarial})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedUniInstruct(UniInstruct):
    """The paper's discriminator, without weights of its own: the means over channels of the fake
    network's features are maps of logits.
    """

    inits = {"student": "teacher", "fake": "teacher"}

    def logits_of(self, net, features, t, ctx):
        logits = []
        for feature in features:
            channel_mean = jnp.mean(feature.astype(jnp.float32), -1)
            logits.append(channel_mean.reshape(channel_mean.shape[0], -1))
        return jnp.concatenate(logits, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalisedUniInstruct(UniInstruct):
    """Ratios over their batch mean."""

    def ratio(self, logits: Array) -> Array:
        r = super().ratio(logits)
        return r / jnp.mean(r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactUniInstruct(UniInstruct):
    """The complete gradient of int g^2/2 E[h(r) |d|^2] dt: all three terms, and the gradient
    through r. It takes a second derivative.
    """

    def ratio(self, logits):
        return self.clipped_ratio(logits)

    def expansion(self, net, ctx, x0, xt, t, real, fake, logits):
        sim, di, fgm = self.weights(self.ratio(logits), ctx.step)
        alpha, sigma, d_alpha, d_sigma = self.process.coefs(expand(t, xt))
        dims = range(1, xt.ndim)
        # A score is unit * x0 minus a term that the two networks share.
        unit = alpha / sigma**2

        def squared_gap(x: Array) -> Array:
            """The sum over the batch of |d|^2 at x_t = x."""
            gap = unit * (
                self.fake(net, x, t, ctx).x0 - self.real(net, x, t, ctx).x0
            )
            return jnp.sum(jnp.sum(gap**2, axis=dims))

        d = unit * (fake.x0 - real.x0)
        t_sim = -2 * sim * jnp.sum(d * unit * (fake.x0 - x0), dims)
        t_di = expand(di * jnp.sum(d**2, dims), d) * d
        t_fgm = expand(fgm, d) * jax.grad(squared_gap)(xt)
        half_g2 = (sigma * d_sigma - d_alpha / alpha * sigma**2).reshape(-1)
        return half_g2 * (t_sim + score.summed_surrogate(xt, t_di + t_fgm))
