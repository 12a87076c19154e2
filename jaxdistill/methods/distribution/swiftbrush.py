"""SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation
(arXiv:2312.05239).

The variational score distillation of text-to-3D, with a one-step generator in place of the scene.
Samples move towards the frozen teacher's score and away from that of an adapter on it
(`roles.fake.lora`), which is trained by denoising on the student's samples. Student and adapter are
updated together, from the same samples. Prompts are the only data: the student starts as the
teacher, predicts noise like it, and its x0 at the last time is the sample.

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
from jaxdistill.methods._fewstep import FewStep
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.sds import ScoreDistillation


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiftBrush(DiffInstruct):
    """Batches hold `cond` and `null_cond`. Of samples x, where they hold them too, only the shape
    is read.
    """

    # Shape of one sample, (64, 64, 4) for Stable Diffusion; empty: that of batch["x"].
    shape: tuple[int, ...] = ()
    # The paper's [20, 981) of 1000 time steps; those of the fake score's loss are [0, 1000).
    match_times: Uniform = Uniform(low=0.02, high=0.981)
    fake_target: str = "eps"
    # Probability with which the fake score learns the null condition on the complete batch.
    fake_dropout: float = 0.1
    # Updates of the fake score per student update, the first of them joint with it; the paper's 1.
    critic_steps: int = 1
    # of the teacher's score; depends on the backbone (snoopi.py)
    guidance: float = 4.5
    # The released code's, equal to the teacher's; 1 is DMD's choice. Uncertain: the paper states
    # the teacher's only.
    fake_guidance: float = 4.5

    @property
    def needs(self):
        return {} if self.shape else FewStep.needs

    @property
    def turns(self) -> tuple[Turn, ...]:
        is_joint = lambda step: step % self.critic_steps == 0
        is_critics = lambda step: step % self.critic_steps != 0
        return (
            Turn(
                ("student", "fake"), self.loss, when=is_joint, gather=self.simulate
            ),
            Turn(
                ("fake",), self.critic_loss, when=is_critics, gather=self.simulate
            ),
        )

    def simulate(self, net: Nets, ctx: Ctx) -> Batch:
        """As in the base class. In a batch without samples, their number is that of the
        conditions, and `shape` is theirs.
        """
        if "x" not in ctx.batch:
            if not self.shape:
                expected = "the batch has no x; expected the shape of a sample, such as (64, 64, 4)"
                raise Refused(f"method.shape=(): {expected}")
            count = jax.tree.leaves(ctx.batch["cond"])[0].shape[0]
            x = jnp.zeros((count, *self.shape))
            ctx = dataclasses.replace(ctx, batch={**ctx.batch, "x": x})
        return super().simulate(net, ctx)

    def direction(self, x0: Array, real: Pred, fake: Pred, t: Array) -> Array:
        """g = sigma_t^2 (eps_phi^k - eps_psi^k) = sigma_t^3 (s_psi - s_phi), with 0 in place of
        entries that are not finite.
        """
        _, sigma = self.process.alpha_sigma(expand(t, x0))
        return jnp.nan_to_num(
            sigma**2 * (real.eps - fake.eps), nan=0.0, posinf=0.0, neginf=0.0
        )

    def fake_cond(self, ctx: Ctx):
        """One draw of the null condition for the complete batch."""
        cond = ctx.batch.get("cond")
        keep = jax.random.uniform(ctx.key("fake_drop")) >= self.fake_dropout
        keep = jnp.broadcast_to(keep, ctx.batch["t"].shape)
        return drop_condition(cond, ctx.batch.get("null_cond"), keep)

    def denoise(self, net: Nets, ctx: Ctx, x0: Array) -> Array:
        """The mean of alpha_t^2 (eps_psi(x_t, t, y') - eps')^2, without guidance."""
        xt, t, eps = self.diffuse(x0, self.fake_times, ctx, "fake")
        pred = net.fake(xt, t, self.fake_cond(ctx))
        error = denoising_error(self.process, pred, x0, eps, t, self.fake_target)
        alpha, _ = self.process.alpha_sigma(t)
        return jnp.mean(alpha**2 * error)

    def student_terms(
        self, net: Nets, ctx: Ctx, x0: Array
    ) -> tuple[Array, dict[str, Array]]:
        """(the student's loss, its terms by name)."""
        match, _, _ = self.match(net, ctx, x0)
        return match, {"match": match}

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """Both losses from one call of the generator.

        The adapter gets no gradient from the student's loss, where g is a constant, and the student
        none from the adapter's, which sees sg[x0].
        """
        x0 = self.generate(net, ctx)
        student, terms = self.student_terms(net, ctx, x0)
        denoise = self.denoise(net, ctx, jax.lax.stop_gradient(x0))
        return Out(student + denoise, {**terms, "denoise": denoise})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDS(ScoreDistillation, SwiftBrush):
    """Score distillation sampling, the paper's ablation. It collapses to modes."""
