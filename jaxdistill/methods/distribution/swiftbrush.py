"""SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation
(arXiv:2312.05239).

Variational score distillation of text-to-3D, with a one-step generator in the scene's place. The
frozen teacher gives the score to move towards, an adapter on it (`roles.fake.lora`), trained by
denoising on the student's samples, the one to move away from; student and adapter are updated at
once, from the same samples. Prompts are all the data there is: the student starts as the teacher,
predicts noise like it, and its x0 at the last time is the sample.

Departures: times are continuous, and alpha_T is the process's own (the released code writes 0.0047
for its square).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Refused, Turn
from jaxdistill.diffusion.process import Pred, expand
from jaxdistill.diffusion.regression import denoising_error, drop_condition
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.sds import ScoreDistillation


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiftBrush(DiffInstruct):
    """Batches hold `cond` and `null_cond`; where they hold samples x as well, only the shape is
    read.
    """

    shape: tuple[
        int, ...
    ] = ()  # of one sample, (64, 64, 4) for Stable Diffusion; (): that of batch["x"]
    match_times: Uniform = Uniform(
        low=0.02, high=0.981
    )  # the paper's [20, 981) of 1000; the fake score's are [0, 1000)
    fake_target: str = "eps"
    fake_dropout: float = (
        0.1  # probability that the whole batch of the fake score has the null condition
    )
    # updates of the fake score per student update, the first of them joint with it; the paper's 1
    critic_steps: int = 1
    guidance: float = 4.5  # of the real score; depends on the backbone (snoopi.py)
    # the released code's is the real score's; 1 is DMD's choice. Uncertain: the paper names the
    # teacher's only
    fake_guidance: float = 4.5

    @property
    def turns(self) -> tuple[Turn, ...]:
        joint = Turn(
            ("student", "fake"),
            self.loss,
            when=lambda step: step % self.critic_steps == 0,
            gather=self.simulate,
        )
        return (
            joint,
            Turn(
                ("fake",),
                self.critic_loss,
                when=lambda step: step % self.critic_steps != 0,
                gather=self.simulate,
            ),
        )

    def simulate(self, net: Nets, ctx: Ctx) -> Batch:
        """As the host's. Without samples the conditions say how many to make, and `shape` how large
        they are.
        """
        if "x" not in ctx.batch:
            if not self.shape:
                raise Refused(
                    "method.shape=(): the batch has no x, so the shape of a sample is needed, as (64, 64, 4)"
                )
            count = jax.tree.leaves(ctx.batch["cond"])[0].shape[0]
            ctx = dataclasses.replace(
                ctx, batch={**ctx.batch, "x": jnp.zeros((count, *self.shape))}
            )
        return super().simulate(net, ctx)

    def direction(self, x0: Array, real: Pred, fake: Pred, t: Array) -> Array:
        """g = sigma_t^2 (eps_phi^k - eps_psi^k) = sigma_t^3 (s_psi - s_phi), 0 where it overflowed."""
        sigma = self.process.alpha_sigma(expand(t, x0))[1]
        return jnp.nan_to_num(sigma**2 * (real.eps - fake.eps), nan=0.0, posinf=0.0, neginf=0.0)

    def fake_cond(self, ctx: Ctx):
        """One draw for the batch."""
        keep = jax.random.uniform(ctx.key("fake_drop")) >= self.fake_dropout
        return drop_condition(
            ctx.batch.get("cond"),
            ctx.batch.get("null_cond"),
            jnp.broadcast_to(keep, ctx.batch["t"].shape),
        )

    def denoise(self, net: Nets, ctx: Ctx, x0: Array) -> Array:
        """Mean of alpha_t^2 (eps_psi(x_t, t, y') - eps')^2, without guidance."""
        xt, t, eps = self.diffuse(x0, self.fake_times, ctx, "fake")
        error = denoising_error(
            self.process, net.fake(xt, t, self.fake_cond(ctx)), x0, eps, t, self.fake_target
        )
        return jnp.mean(self.process.alpha_sigma(t)[0] ** 2 * error)

    def student_terms(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, dict[str, Array]]:
        """(the student's loss, its parts)."""
        match, _, _ = self.match(net, ctx, x0)
        return match, {"match": match}

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """Both updates from one call of the generator: the adapter sees sg[x0], and g is a value."""
        x0 = self.generate(net, ctx)
        student, parts = self.student_terms(net, ctx, x0)
        denoise = self.denoise(net, ctx, jax.lax.stop_gradient(x0))
        return Out(student + denoise, {**parts, "denoise": denoise})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDS(ScoreDistillation, SwiftBrush):
    """Score distillation sampling, the ablation. It seeks modes."""
