"""DMD2 - Improved Distribution Matching Distillation (arXiv:2405.14867).

The student's samples are pushed along the difference of two scores: that of the frozen teacher, and
that of a fake score, a network trained online on the student's own samples. A discriminator on the
fake score's features tells the samples from real data. The fake score and the discriminator, the
critics, are updated at every step, the student at every fifth. A multi-step student is trained on
noisy states of its own sampler (backward simulation), not on noised data.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Ctx, Nets, Out, Turn
from jaxdistill.methods.distribution.dmd import Normalised
from jaxdistill.objectives import gan


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMD2(Normalised):
    """Distribution matching with DMD's normalised gradient, plus a GAN loss on noised samples.

    Values of the paper for inherited fields: student_times=(.999, .749, .499, .249) for four steps;
    fake_target, the quantity in which the fake score's error is measured, is "eps" (noise
    prediction) for Stable Diffusion and "edm" (EDM's weighting) for ImageNet.
    """

    # critic updates per student update; the paper uses 10 for SD 1.5
    critic_steps: int = 5
    # Guidance scale of the teacher's score; the paper uses 1.75 (SD 1.5) and 8 (SDXL).
    guidance: float = 1.0
    # Weight of the adversarial term in the student's loss; the paper uses 1e-3 (SD 1.5),
    # 3e-3 (ImageNet) and 5e-3 (SDXL).
    gan_weight: float = 3e-3
    # weight of the discriminator's loss in the critics' loss
    disc_weight: float = 1e-2
    # Layers of the fake score's network, numbered from 0, whose features the discriminator reads.
    taps: tuple[int, ...] = (1,)

    inits = {"student": "teacher", "fake": "teacher", "disc": None}

    @property
    def turns(self) -> tuple[Turn, ...]:
        # The base class has two turns: the critic's at every step, and the student's at every
        # critic_steps-th step. Here the first also updates the discriminator.
        critics, student = super().turns
        return (dataclasses.replace(critics, moves=("fake", "disc")), student)

    def logits(self, net: Nets, xt: Array, t: Array, cond) -> Array:
        """The discriminator's logits of noised samples; positive for real ones."""
        features = net.fake(xt, t, cond, taps=self.taps).features
        return net.disc(features, t, cond)

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        """Distribution matching, and the non-saturating GAN loss at the same x_t."""
        x0 = self.generate(net, ctx)
        match, xt, t = self.match(net, ctx, x0)
        logits = self.logits(net, xt, t, ctx.batch.get("cond"))
        adversarial = jnp.mean(gan.non_saturating_generator(logits))  # eq. 4
        loss = match + self.gan_weight * adversarial
        return Out(loss, {"match": match, "gan": adversarial})

    def critic_loss(self, net: Nets, ctx: Ctx) -> Out:
        """Denoising of the student's samples, and the discriminator's loss on noised samples.

        "match" and "real" name the random keys that times and noise are drawn from: generated and
        real samples have independent draws. Keys also differ between turns, so "match" here is
        not the draw of the student's loss, only one from the same distribution.
        """
        x0 = jax.lax.stop_gradient(self.generate(net, ctx))
        cond = ctx.batch.get("cond")
        denoise = self.denoise(net, ctx, x0)
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        fake_logits = self.logits(net, xt, t, cond)
        xt, t, _ = self.diffuse(ctx.batch["x"], self.match_times, ctx, "real")
        real_logits = self.logits(net, xt, t, cond)
        adversarial = jnp.mean(
            gan.non_saturating_discriminator(real_logits, fake_logits)
        )
        loss = denoise + self.disc_weight * adversarial
        return Out(loss, {"denoise": denoise, "gan": adversarial})
