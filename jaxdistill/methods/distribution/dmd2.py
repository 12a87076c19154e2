"""DMD2 - Improved Distribution Matching Distillation (arXiv:2405.14867).

The student's samples are pushed along the difference of two scores: the frozen teacher's, and that
of a `fake` network trained online on the student's own samples. A head on the fake network's
features tells them from real data. Both critics move at every step, the student at every fifth; a
multi-step student trains on states of its own chain.
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
    # student_times: the paper's four are .999 .749 .499 .249 of 1000; fake_target: eps (Stable
    # Diffusion), edm (ImageNet)
    critic_steps: int = 5  # the paper's 10 for SD 1.5
    guidance: float = 1.0  # of the real score only; the paper's 1.75 (SD 1.5), 8 (SDXL)
    gan_weight: float = (
        3e-3  # in the student's loss; the paper's 1e-3 (SD 1.5), 3e-3 (ImageNet), 5e-3 (SDXL)
    )
    disc_weight: float = 1e-2  # in the critics' loss
    taps: tuple[int, ...] = (1,)  # layers of the fake network that the discriminator sees

    inits = {"student": "teacher", "fake": "teacher", "disc": None}

    @property
    def turns(self) -> tuple[Turn, ...]:
        critics, student = super().turns
        return (dataclasses.replace(critics, moves=("fake", "disc")), student)

    def logits(self, net: Nets, xt: Array, t: Array, cond) -> Array:
        return net.disc(net.fake(xt, t, cond, taps=self.taps).features, t, cond)

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        match, xt, t = self.match(net, ctx, self.generate(net, ctx))
        adversarial = jnp.mean(
            gan.non_saturating_generator(self.logits(net, xt, t, ctx.batch.get("cond")))
        )  # eq. 4
        return Out(match + self.gan_weight * adversarial, {"match": match, "gan": adversarial})

    def critic_loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = jax.lax.stop_gradient(self.generate(net, ctx))
        cond = ctx.batch.get("cond")
        denoise = self.denoise(net, ctx, x0)
        fake = self.logits(net, *self.diffuse(x0, self.match_times, ctx, "match")[:2], cond)
        real = self.logits(
            net, *self.diffuse(ctx.batch["x"], self.match_times, ctx, "real")[:2], cond
        )
        adversarial = jnp.mean(gan.non_saturating_discriminator(real, fake))
        return Out(
            denoise + self.disc_weight * adversarial, {"denoise": denoise, "gan": adversarial}
        )
