"""Uni-Instruct - Unified One-Step Diffusion Model Distillation through f-Divergences
(arXiv:2505.20755).

An f-divergence at t = 0 is an integral over noise levels of E[h(r) |s_fake - s_real|^2], r = p_real
/ p_fake. Its gradient combines that of score identity methods (SIM), differentiated through both
denoisers, with that of Diff-Instruct (DI); f sets their weights, in which r is what a discriminator
on the fake network's features says. Critics alone move first, then reverse KL, then the chosen
divergence. Earlier methods are special cases (table in `diff_instruct.py`).

Departures: r is exp(logit), where the authors' code takes r from the generator's loss value; |d| in
the DI term is each sample's norm, the code's the batch's. The factor 2 of the exact SIM term, |d|^2
in place of |d|, the third term and the gradient through r are left out as in the code, and in
`ExactUniInstruct` put back. A head reads the features, as in DMD2; `SharedUniInstruct` has the
paper's own discriminator without weights.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxdistill.core.fields import Natural
from jaxdistill.core.types import Array, Ctx, Nets, Out, Turn
from jaxdistill.diffusion.process import EDM, Pred, Process, expand
from jaxdistill.diffusion.times import Karras, LogNormalSNR, Uniform
from jaxdistill.methods.distribution.diff_instruct import FromLevel
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.objectives import fdivergence, gan, score, weighting


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniInstruct(FromLevel, DMD2):
    process: Process = EDM()
    student_times: tuple[float, ...] = (2.5,)  # the paper's init_sigma: x = G(2.5 z, 2.5)
    match_times: Uniform = Karras(high=0.8)  # of the student's loss; sigma .002 to 24.4
    fake_times: Uniform = LogNormalSNR(mean=-1.2, std=1.2)  # of both critics
    fake_target: str = "edm"
    critic_steps: int = 1  # critic updates per student update
    divergence: str = (
        "jkl"  # a row of fdivergence.DIVERGENCES; the paper's best, .4 forward and .6 reverse KL
    )
    scale: float = 100.0  # of the expansion in the student's loss
    gan_weight: float = 0.01  # in the student's loss, times the number of dimensions
    disc_weight: float = 1.0  # in the critics' loss
    ratio_range: tuple[float, float] = (1e-3, 1e3)  # where r is clipped
    critic_only: Natural = (
        391  # steps before the student moves; the paper's 100k images of batch 256
    )
    # step up to which the student's loss is reverse KL's SIM term, without the GAN; the paper's
    # 200k images
    reverse_until: Natural = 782

    @property
    def turns(self) -> tuple[Turn, ...]:
        critics, student = super().turns
        when = lambda step: step >= self.critic_only and student.when(step)
        critics = dataclasses.replace(
            critics, moves=tuple(role for role in critics.moves if role in self.inits)
        )
        return critics, dataclasses.replace(student, when=when)

    def judge(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> tuple[Pred, Array]:
        """The fake score and the discriminator's logits [B ...], from one pass through the fake
        network.
        """
        pred = net.fake(xt, t, ctx.batch.get("cond"), taps=self.taps)
        return pred, self.logits_of(net, pred.features, t, ctx)

    def logits_of(self, net: Nets, features: tuple[Array, ...], t: Array, ctx: Ctx) -> Array:
        return net.disc(features, self.process.angle(t), ctx.batch.get("cond"))

    def ratio(self, logits: Array) -> Array:
        """r = p_real / p_fake at x_t, [B]."""
        logit = jnp.mean(logits, axis=range(1, logits.ndim))
        return jax.lax.stop_gradient(fdivergence.ratio(logit, *self.ratio_range))

    def weights(self, r: Array, step: Array) -> tuple[Array, Array, Array]:
        """Of the SIM, DI and FGM terms, [B] each; table of section 3."""
        early = fdivergence.divergence("reverse_kl")
        late = fdivergence.divergence(self.divergence)
        return tuple(
            jnp.where(step < self.reverse_until, getattr(early, k)(r), getattr(late, k)(r))
            for k in ("h", "di", "fgm")
        )

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
        """[B], summed over dimensions: lambda_SIM L_SIM + lambda_DI L_DI."""
        sim, di, _ = self.weights(self.ratio(logits), ctx.step)
        gap = fake.x0 - real.x0
        norm = jnp.sqrt(jnp.sum(gap**2, axis=range(1, gap.ndim), keepdims=True))
        pulled = score.summed_surrogate(x0, expand(di, gap) * norm * gap)
        return sim * score.sid_loss(x0, real.x0, fake.x0, alpha=1.0, scale=1.0) + pulled

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = self.generate(net, ctx)
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        real, (fake, logits) = self.real(net, xt, t, ctx), self.judge(net, xt, t, ctx)
        matched = jnp.mean(self.expansion(net, ctx, x0, xt, t, real, fake, logits))
        omega = score.inverse_distance(x0, real.x0).reshape(-1)
        adversarial = omega * gan.non_saturating_generator(jnp.clip(logits, -10.0, 10.0))
        gan_weight = jnp.where(
            ctx.step < self.reverse_until, 0.0, self.gan_weight * math.prod(x0.shape[1:])
        )
        loss = self.scale * matched + gan_weight * jnp.mean(adversarial)
        return Out(
            loss,
            {"match": matched, "gan": jnp.mean(adversarial), "ratio": jnp.mean(self.ratio(logits))},
        )

    def critic_loss(self, net: Nets, ctx: Ctx) -> Out:
        """Denoising, summed over dimensions, and the discriminator's loss at the same x_t, its
        noise shared by real and fake.
        """
        x0 = jax.lax.stop_gradient(self.generate(net, ctx))
        denoise = math.prod(x0.shape[1:]) * self.denoise(net, ctx, x0)
        noised = lambda x: self.diffuse(x, self.fake_times, ctx, "fake")[:2]
        t = noised(x0)[1]
        fake, real = (self.judge(net, *noised(x), ctx)[1] for x in (x0, ctx.batch["x"]))
        alpha, sigma = self.process.alpha_sigma(t)
        entropy = 0.5 * jnp.mean(
            gan.non_saturating_discriminator(real, fake)
        )  # of the batch, as the code's: it has no weights of its own
        adversarial = jnp.mean(weighting.edm(sigma / alpha)) * entropy
        return Out(
            denoise + self.disc_weight * adversarial, {"denoise": denoise, "gan": adversarial}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedUniInstruct(UniInstruct):
    """The paper's discriminator: the mean over channels of the fake network's taps is a map of
    logits; no weights of its own.
    """

    inits = {"student": "teacher", "fake": "teacher"}

    def logits_of(self, net, features, t, ctx):
        maps = [jnp.mean(f.astype(jnp.float32), -1) for f in features]
        return jnp.concatenate([m.reshape(m.shape[0], -1) for m in maps], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalisedUniInstruct(UniInstruct):
    """Ratios over their batch mean."""

    def ratio(self, logits: Array) -> Array:
        r = super().ratio(logits)
        return r / jnp.mean(r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactUniInstruct(UniInstruct):
    """The whole gradient of int g^2/2 E[h(r) |d|^2] dt: all three terms, differentiated through r.
    Costs a second derivative.
    """

    def ratio(self, logits):
        return fdivergence.ratio(jnp.mean(logits, axis=range(1, logits.ndim)), *self.ratio_range)

    def expansion(self, net, ctx, x0, xt, t, real, fake, logits):
        sim, di, fgm = self.weights(self.ratio(logits), ctx.step)
        alpha, sigma, d_alpha, d_sigma = self.process.coefs(expand(t, xt))
        # a score is unit * D less a term that the networks share
        unit = alpha / sigma**2
        dims = range(1, xt.ndim)
        squared = lambda x: jnp.sum(
            (unit * (self.fake(net, x, t, ctx).x0 - self.real(net, x, t, ctx).x0)) ** 2, axis=dims
        )
        d = unit * (fake.x0 - real.x0)
        identity = -2 * sim * jnp.sum(d * unit * (fake.x0 - x0), dims)  # T_SIM
        along = expand(di * jnp.sum(d**2, dims), d) * d + expand(fgm, d) * jax.grad(
            lambda x: jnp.sum(squared(x))
        )(xt)  # T_DI + T_FGM
        half_g2 = (sigma * d_sigma - d_alpha / alpha * sigma**2).reshape(-1)
        return half_g2 * (identity + score.summed_surrogate(xt, along))
