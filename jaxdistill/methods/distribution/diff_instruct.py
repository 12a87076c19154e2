"""Diff-Instruct - A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models
(arXiv:2305.18455).

A one-step student's samples are noised and pushed along the difference of two scores: that of the
frozen teacher, and that of a fake score, a network trained online on the student's own samples. In
expectation this is the gradient of the Kullback-Leibler divergence between the distributions of
noised samples and of noised data, integrated over noise levels. All distribution-matching methods
build on it.

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
    """With more than one of `student_times` the student samples in several steps, as in DMD2."""

    # at which the two scores are compared
    match_times: Uniform = Uniform(low=0.02, high=0.98)
    fake_times: Uniform = Uniform()  # of the fake score's own loss
    # What the fake score's error is measured in: v | flow | vp (Stable Diffusion 2.1) | eps (Stable
    # Diffusion) | x0 | edm (ImageNet).
    fake_target: str = "v"
    # share of samples on which the fake score learns the null condition
    fake_dropout: float = 0.0
    critic_steps: int = 1  # critic updates per student update
    guidance: float = 1.0  # classifier-free guidance of the teacher's score
    fake_guidance: float = 1.0  # that of the fake score in the student's gradient

    inits = {"student": "teacher", "fake": "teacher"}

    @property
    def turns(self) -> tuple[Turn, ...]:
        is_students = lambda step: step % self.critic_steps == 0
        return (
            Turn(("fake",), self.critic_loss, gather=self.simulate),
            Turn(
                ("student",),
                self.student_loss,
                when=is_students,
                gather=self.simulate,
            ),
        )

    @property
    def cycle(self) -> int:
        return self.critic_steps

    def simulate(self, net: Nets, ctx: Ctx) -> Batch:
        """Backward simulation (DMD2, section 4.5): adds x_t and t, a state of the student's own
        sampling chain at a random step, the same for all samples.
        """
        cond = ctx.batch.get("cond")
        noise = self.initial(
            jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape)
        )
        index = jax.random.randint(ctx.key("index"), (), 0, len(self.student_times))
        denoise = lambda x, t: net.student(x, t, cond)
        times = jnp.array(self.student_times)
        xt, t = simulate(
            self.process, denoise, noise, times, ctx.key("chain"), index
        )
        return {**ctx.batch, "xt": xt, "t": t}

    def generate(self, net: Nets, ctx: Ctx) -> Array:
        """The student's sample x0 from the simulated state: its only call with a gradient."""
        return net.student(
            ctx.batch["xt"], ctx.batch["t"], ctx.batch.get("cond")
        ).x0

    def draw_noise(
        self, x: Array, times: Uniform, ctx: Ctx, name: str
    ) -> tuple[Array, Array]:
        """(t, eps) for each sample, from the keys of `name`."""
        t = times.draw(self.process, ctx.key(name + "_t"), x.shape[0])
        eps = jax.random.normal(ctx.key(name + "_eps"), x.shape)
        return t, eps

    def diffuse(
        self, x0: Array, times: Uniform, ctx: Ctx, name: str
    ) -> tuple[Array, Array, Array]:
        """(x_t, t, eps): samples noised to random times."""
        t, eps = self.draw_noise(x0, times, ctx, name)
        return self.process.add_noise(x0, eps, t), t, eps

    def real(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        """The teacher's prediction, whose score the samples move towards."""
        cond = ctx.batch.get("cond")
        return guided(
            net.teacher, xt, t, cond, ctx.batch.get("null_cond"), self.guidance
        )

    def fake(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        """The fake score's prediction: that of the student's own samples."""
        cond = ctx.batch.get("cond")
        return guided(
            net.fake, xt, t, cond, ctx.batch.get("null_cond"), self.fake_guidance
        )

    def direction(self, x0: Array, real: Pred, fake: Pred, t: Array) -> Array:
        """The gradient of the samples, to be descended; w_t = (sigma / alpha)^2 in eq. 3.6."""
        return score.diff_instruct_gradient(real.x0, fake.x0)

    def match(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, Array, Array]:
        """(loss, x_t, t): distribution matching, a loss whose gradient in x0 is `direction` over
        the number of its entries.
        """
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        real = self.real(net, xt, t, ctx)
        fake = self.fake(net, xt, t, ctx)
        gradient = self.direction(x0, real, fake, t)
        return score.gradient_surrogate(x0, gradient), xt, t

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        loss, _, _ = self.match(net, ctx, self.generate(net, ctx))
        return Out(loss, {"match": loss})

    def fake_cond(self, ctx: Ctx):
        """The conditions that the fake score learns under."""
        cond = ctx.batch.get("cond")
        if not self.fake_dropout:
            return cond
        uniform = jax.random.uniform(ctx.key("fake_drop"), ctx.batch["x"].shape[:1])
        keep = uniform >= self.fake_dropout
        return drop_condition(cond, ctx.batch.get("null_cond"), keep)

    def denoise(self, net: Nets, ctx: Ctx, x0: Array) -> Array:
        """The fake score's loss on the student's samples (eq. 3.7)."""
        xt, t, eps = self.diffuse(x0, self.fake_times, ctx, "fake")
        pred = net.fake(xt, t, self.fake_cond(ctx))
        return jnp.mean(
            denoising_error(self.process, pred, x0, eps, t, self.fake_target)
        )

    def critic_loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = jax.lax.stop_gradient(self.generate(net, ctx))
        loss = self.denoise(net, ctx, x0)
        return Out(loss, {"denoise": loss})


class FromLevel:
    """Mixed into a method of this family, in front of it: sampling starts at a noise level of its
    own.

    The sample is G(sigma z, sigma), with the sigma of the first student time and unit noise z.
    EDM's process itself would start from sigma_max z.
    """

    def initial(self, noise: Array) -> Array:
        first = jnp.asarray(self.student_times[0], noise.dtype)
        _, sigma = self.process.alpha_sigma(first)
        return noise * sigma / self.process.start(jnp.ones((), noise.dtype))

    def check_times(self) -> None:
        """The first time may have any noise level."""
        times = self.student_times
        if not falling(times, math.inf):
            raise Refused(
                f"method.student_times={times}: expected falling times above 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMDiffInstruct(FromLevel, DiffInstruct):
    """The released code, for EDM's networks: one distribution of noise levels in both losses, and
    EDM's weights in the fake score's.

    Both losses are means over dimensions where the code has sums. Adam's steps are the code's if
    its eps (1e-8 there) is divided by the number of dimensions.
    """

    process: Process = EDM()
    student_times: tuple[float, ...] = (1.0,)  # the code's init_sigma
    match_times: Uniform = LogNormalSNR(mean=-1.2, std=1.2)
    fake_times: Uniform = LogNormalSNR(mean=-1.2, std=1.2)
    fake_target: str = "edm"
