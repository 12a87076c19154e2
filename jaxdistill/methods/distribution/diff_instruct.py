"""Diff-Instruct - A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models
(arXiv:2305.18455).

A one-step student's samples are noised and pushed along the difference of two scores: the frozen
teacher's, and that of a `fake` network trained online on the student's own samples. In expectation
that is the gradient of the Kullback-Leibler divergence between the two noised laws, integrated over
noise levels. All distribution-matching methods build on it.

Uni-Instruct (arXiv:2505.20755, table 1) is a common form of the one-step methods; each differs from
this one in a single piece:

| method | gradient of the student | here |
|---|---|---|
| Diff-Instruct | w_t d . dx_t, d = s_fake - s_real | `DiffInstruct` |
| VSD (arXiv:2305.16213), SwiftBrush | the same, the fake score an adapter | roles.fake.lora |
| SDS, DDS, RED-diff | s_fake of the sample itself, or of a reference | sds.py |
| DMD | normalised, and a regression on pairs | dmd.py |
| DMD2 | normalised, and a GAN | dmd2.py |
| f-distill | that of DMD2 times h(r), r = p_real / p_fake | f_distill.py |
| SiD | score identity | sid.py |
| SiDA | score identity, and a GAN | sida.py |
| SIM | score identity of any distance | sim.py |
| DI++, DI* | that of Diff-Instruct or of SIM, and a reward | di_plus_plus.py, di_star.py |
| Uni-Instruct | Diff-Instruct's and SIM's, weighted by f and r, and a GAN | uni_instruct.py |
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Refused, Turn
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import EDM, Pred, Process
from jaxdistill.diffusion.regression import denoising_error, drop_condition
from jaxdistill.diffusion.times import LogNormalSNR, Uniform
from jaxdistill.methods._fewstep import FewStep
from jaxdistill.objectives import score
from jaxdistill.samplers.fewstep import falling, simulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffInstruct(FewStep):
    # student_times: one entry, one step; more, the chain of a few-step student
    match_times: Uniform = Uniform(low=0.02, high=0.98)  # of the distribution-matching gradient
    fake_times: Uniform = Uniform()  # of the fake score's own loss
    fake_target: str = (
        "v"  # v | flow | vp (Stable Diffusion 2.1) | eps (Stable Diffusion) | x0 | edm (ImageNet)
    )
    fake_dropout: float = 0.0  # share of samples on which the fake score learns the null condition
    critic_steps: int = 1  # critic updates per student update
    guidance: float = 1.0  # classifier-free, of the real score
    fake_guidance: float = 1.0  # of the fake score, where the student's gradient reads it

    inits = {"student": "teacher", "fake": "teacher"}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(("fake",), self.critic_loss, gather=self.simulate),
            Turn(
                ("student",),
                self.student_loss,
                when=lambda step: step % self.critic_steps == 0,
                gather=self.simulate,
            ),
        )

    def simulate(self, net: Nets, ctx: Ctx) -> Batch:
        """Backward simulation (DMD2, section 4.5): the student's own chain up to a step that the
        whole batch shares.
        """
        noise = self.initial(jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape))
        index = jax.random.randint(ctx.key("index"), (), 0, len(self.student_times))
        denoise = lambda x, t: net.student(x, t, ctx.batch.get("cond"))
        xt, t = simulate(
            self.process, denoise, noise, jnp.array(self.student_times), ctx.key("chain"), index
        )
        return {**ctx.batch, "xt": xt, "t": t}

    def generate(self, net: Nets, ctx: Ctx) -> Array:
        """The student's x0 from the gathered state; gradient flows through this call only."""
        return net.student(ctx.batch["xt"], ctx.batch["t"], ctx.batch.get("cond")).x0

    def diffuse(self, x0: Array, times: Uniform, ctx: Ctx, name: str) -> tuple[Array, Array, Array]:
        """(x_t, t, eps) for times drawn from a law."""
        t = times.draw(self.process, ctx.key(name + "_t"), x0.shape[0])
        eps = jax.random.normal(ctx.key(name + "_eps"), x0.shape)
        return self.process.add_noise(x0, eps, t), t, eps

    def real(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        """The score to move towards."""
        return guided(
            net.teacher, xt, t, ctx.batch.get("cond"), ctx.batch.get("null_cond"), self.guidance
        )

    def fake(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        """The score to move away from: that of the student's own samples."""
        return guided(
            net.fake, xt, t, ctx.batch.get("cond"), ctx.batch.get("null_cond"), self.fake_guidance
        )

    def direction(self, x0: Array, real: Pred, fake: Pred, t: Array) -> Array:
        """Gradient of the student's samples, to be descended; here w_t = (sigma / alpha)^2 (eq.
        3.6).
        """
        return score.diff_instruct_gradient(real.x0, fake.x0)

    def match(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, Array, Array]:
        """(loss whose gradient in x0 is `direction` / numel, x_t, t)."""
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        gradient = self.direction(x0, self.real(net, xt, t, ctx), self.fake(net, xt, t, ctx), t)
        return score.gradient_surrogate(x0, gradient), xt, t

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        loss, _, _ = self.match(net, ctx, self.generate(net, ctx))
        return Out(loss, {"match": loss})

    def fake_cond(self, ctx: Ctx):
        """The condition that the fake score learns under."""
        cond = ctx.batch.get("cond")
        if not self.fake_dropout:
            return cond
        keep = (
            jax.random.uniform(ctx.key("fake_drop"), ctx.batch["x"].shape[:1]) >= self.fake_dropout
        )
        return drop_condition(cond, ctx.batch.get("null_cond"), keep)

    def denoise(self, net: Nets, ctx: Ctx, x0: Array) -> Array:
        """The fake score's loss on the student's samples (eq. 3.7)."""
        xt, t, eps = self.diffuse(x0, self.fake_times, ctx, "fake")
        return jnp.mean(
            denoising_error(
                self.process, net.fake(xt, t, self.fake_cond(ctx)), x0, eps, t, self.fake_target
            )
        )

    def critic_loss(self, net: Nets, ctx: Ctx) -> Out:
        loss = self.denoise(net, ctx, jax.lax.stop_gradient(self.generate(net, ctx)))
        return Out(loss, {"denoise": loss})


class FromLevel:
    """Before a method of this family among a class's bases: a sample starts from noise of the level
    that the student is told.

    That is x0 = G(sigma z, sigma), sigma that of the first student time, where EDM's process would
    start from sigma_max z.
    """

    def initial(self, noise: Array) -> Array:
        level = self.process.alpha_sigma(jnp.asarray(self.student_times[0], noise.dtype))[1]
        return noise * level / self.process.start(jnp.ones((), noise.dtype))

    def check_times(self) -> None:
        """Any level will do, a process's last one or none of its own."""
        if not falling(self.student_times, math.inf):
            raise Refused(
                f"method.student_times={self.student_times}: expected falling times above 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMDiffInstruct(FromLevel, DiffInstruct):
    """As released, for EDM's networks: one law of noise levels for the gradient and the fake score,
    EDM's weights for the latter.

    Both losses are means over dimensions, the code's sums: Adam steps as the code's does where its
    eps (1e-8 there) is divided by the number of dimensions.
    """

    process: Process = EDM()
    student_times: tuple[float, ...] = (1.0,)  # the code's init_sigma
    match_times: Uniform = LogNormalSNR(mean=-1.2, std=1.2)
    fake_times: Uniform = LogNormalSNR(mean=-1.2, std=1.2)
    fake_target: str = "edm"
