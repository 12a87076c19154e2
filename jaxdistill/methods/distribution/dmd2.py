"""DMD2 - Improved Distribution Matching Distillation (arXiv:2405.14867).

The student's samples are pushed along the difference of two scores: the frozen teacher's, and that of a `fake` network
trained online on the student's own samples. A head on the fake network's features tells them from real data. Both
critics move at every step, the student at every fifth; a multi-step student trains on states of its own chain.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Method, Nets, Out, Turn
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Flow, Process
from jaxdistill.diffusion.regression import denoising_error
from jaxdistill.diffusion.times import Uniform
from jaxdistill.objectives import gan, score
from jaxdistill.samplers.fewstep import renoise, simulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMD2(Method):
    process: Process = Flow()
    student_times: tuple[float, ...] = (1.0,)  # one entry: one step; the paper's four: .999 .749 .499 .249 of 1000
    match_times: Uniform = Uniform(low=0.02, high=0.98)  # of the distribution-matching gradient and the GAN
    fake_times: Uniform = Uniform()  # of the fake score's own loss
    fake_target: str = "v"  # v | eps (Stable Diffusion) | edm (ImageNet)
    critic_steps: int = 5  # critic updates per student update; the paper's 10 for SD 1.5
    guidance: float = 1.0  # of the real score only; the paper's 1.75 (SD 1.5), 8 (SDXL)
    gan_weight: float = 3e-3  # in the student's loss; the paper's 1e-3 (SD 1.5), 3e-3 (ImageNet), 5e-3 (SDXL)
    disc_weight: float = 1e-2  # in the critics' loss
    taps: tuple[int, ...] = (1,)  # layers of the fake network that the discriminator sees

    inits = {"student": "teacher", "fake": "teacher", "disc": None}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(("fake", "disc"), self.critic_loss, gather=self.simulate),
            Turn(("student",), self.student_loss, when=lambda step: step % self.critic_steps == 0, gather=self.simulate),
        )

    def simulate(self, net: Nets, ctx: Ctx) -> Batch:
        """Backward simulation (section 4.5): the student's own chain up to a step that the whole batch shares."""
        noise = jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape)
        index = jax.random.randint(ctx.key("index"), (), 0, len(self.student_times))
        denoise = lambda x, t: net.student(x, t, ctx.batch.get("cond"))
        xt, t = simulate(self.process, denoise, noise, jnp.array(self.student_times), ctx.key("chain"), index)
        return {**ctx.batch, "xt": xt, "t": t}

    def diffuse(self, x0: Array, times: Uniform, ctx: Ctx, name: str) -> tuple[Array, Array, Array]:
        """(x_t, t, eps) for times drawn from a law."""
        t = times.draw(self.process, ctx.key(name + "_t"), x0.shape[0])
        eps = jax.random.normal(ctx.key(name + "_eps"), x0.shape)
        return self.process.add_noise(x0, eps, t), t, eps

    def logits(self, net: Nets, xt: Array, t: Array, cond) -> Array:
        return net.disc(net.fake(xt, t, cond, features=self.taps).feats, t, cond)

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        cond, null = ctx.batch.get("cond"), ctx.batch.get("null_cond")
        x0 = net.student(ctx.batch["xt"], ctx.batch["t"], cond).x0
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        real = guided(net.teacher, xt, t, cond, null, self.guidance)
        gradient = score.dmd_gradient(x0, real.x0, net.fake(xt, t, cond).x0)  # eq. 3, normalised as in DMD's eq. 8
        match = score.gradient_surrogate(x0, gradient)
        adversarial = jnp.mean(gan.non_saturating_generator(self.logits(net, xt, t, cond)))  # eq. 4
        return Out(match + self.gan_weight * adversarial, {"match": match, "gan": adversarial})

    def critic_loss(self, net: Nets, ctx: Ctx) -> Out:
        cond = ctx.batch.get("cond")
        x0 = jax.lax.stop_gradient(net.student(ctx.batch["xt"], ctx.batch["t"], cond).x0)
        xt, t, eps = self.diffuse(x0, self.fake_times, ctx, "fake")
        denoise = jnp.mean(denoising_error(self.process, net.fake(xt, t, cond), x0, eps, t, self.fake_target))
        fake = self.logits(net, *self.diffuse(x0, self.match_times, ctx, "match")[:2], cond)
        real = self.logits(net, *self.diffuse(ctx.batch["x"], self.match_times, ctx, "real")[:2], cond)
        adversarial = jnp.mean(gan.non_saturating_discriminator(real, fake))
        return Out(denoise + self.disc_weight * adversarial, {"denoise": denoise, "gan": adversarial})

    def sampling_times(self, steps: int) -> Array:
        return jnp.array(self.student_times[:steps])

    def sample(self, net, noise, cond, key, steps):
        return renoise(self.process, lambda x, t: net(x, t, cond), noise, self.sampling_times(steps), key)
