"""DMD2 - Improved Distribution Matching Distillation (arXiv:2405.14867).

The student's samples are pushed along the difference of two scores: that of the frozen teacher, and
that of a fake score, a network trained online on the student's own samples. A discriminator on the
fake score's features tells the samples from real data. Both critics are updated at every step, the
student at every fifth. A student of several steps is trained on states of its own sampling chain.
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
    """Inherited fields: the paper's four student_times are .999, .749, .499 and .249, and its
    fake_target is eps (Stable Diffusion) or edm (ImageNet).
    """

    critic_steps: int = 5  # critic updates per student update; the paper's 10 for SD 1.5
    guidance: float = 1.0  # of the teacher's score; the paper's 1.75 (SD 1.5), 8 (SDXL)
    # Of the adversarial term in the student's loss; the paper's 1e-3 (SD 1.5), 3e-3 (ImageNet),
    # 5e-3 (SDXL).
    gan_weight: float = 3e-3
    disc_weight: float = 1e-2  # of the discriminator's term in the critics' loss
    taps: tuple[int, ...] = (1,)  # layers of the fake score whose features it sees

    inits = {"student": "teacher", "fake": "teacher", "disc": None}

    @property
    def turns(self) -> tuple[Turn, ...]:
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
        """Denoising of the student's samples, and the discriminator's loss on noised samples."""
        x0 = jax.lax.stop_gradient(self.generate(net, ctx))
        cond = ctx.batch.get("cond")
        denoise = self.denoise(net, ctx, x0)
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        fake = self.logits(net, xt, t, cond)
        xt, t, _ = self.diffuse(ctx.batch["x"], self.match_times, ctx, "real")
        real = self.logits(net, xt, t, cond)
        adversarial = jnp.mean(gan.non_saturating_discriminator(real, fake))
        loss = denoise + self.disc_weight * adversarial
        return Out(loss, {"denoise": denoise, "gan": adversarial})
