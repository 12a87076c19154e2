"""DMD - One-step Diffusion with Distribution Matching Distillation (arXiv:2311.18828), and the
gradient that others take from it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Collect, Ctx, Nets, Out, Stage
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Pred
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.objectives import score
from jaxdistill.objectives.pixels import Preprocess
from jaxdistill.samplers import ode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalised(DiffInstruct):
    """Diff-Instruct with DMD's gradient, which does not depend on the scale of a sample's error
    (eq. 8).
    """

    def direction(self, x0: Array, real: Pred, fake: Pred, t: Array) -> Array:
        return score.dmd_gradient(x0, real.x0, fake.x0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMD(Normalised):
    """Distribution matching, and regression on stored pairs of noise and the teacher's sample, by
    squared error: see PerceptualDMD.
    """

    regression_weight: float = 0.25  # the paper's, of LPIPS; 0: none
    batches: int = (
        400  # of pairs, each of data.batch_size; the paper's 100k (CIFAR-10), 25k (ImageNet)
    )
    solver: str = "heun"  # euler | heun | ddim | dpmpp_2m: what makes the pairs
    solver_steps: int = 18

    def stages(self, steps):
        return (Stage(self, steps, collect=Collect(self.pairs, self.batches)),)

    def pairs(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch, and with it the teacher's sample of some noise under the same conditions."""
        cond = ctx.batch.get("cond")
        null = ctx.batch.get("null_cond")
        noise = jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape, ctx.batch["x"].dtype)
        denoise = lambda x, t: guided(net.teacher, x, t, cond, null, self.guidance)
        x = ode.solve(
            self.solver, self.process, denoise, self.process.start(noise), self.solver_steps
        )
        return {
            **ctx.batch,
            "pair_noise": noise,
            "pair_x": x,
            **({} if cond is None else {"pair_cond": cond}),
        }

    def distance(self, net: Nets, made: Array, wanted: Array) -> Array:
        """Of samples [B ...] -> [B]."""
        return jnp.mean((made - wanted) ** 2, axis=range(1, made.ndim))

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        out = super().student_loss(net, ctx)
        if not self.regression_weight:
            return out
        noise = self.initial(ctx.batch["pair_noise"])
        t = jnp.full(ctx.batch["pair_x"].shape[:1], self.student_times[0])
        made = net.student(self.process.start(noise), t, ctx.batch.get("pair_cond")).x0
        regression = jnp.mean(self.distance(net, made, ctx.batch["pair_x"]))  # eq. 9
        return Out(
            out.loss + self.regression_weight * regression,
            {**out.metrics, "regression": regression},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualDMD(DMD):
    """The paper's regression, by LPIPS: the frozen role `perceptual` is a distance of pictures in
    -1..1, (a, b) -> [B].
    """

    preprocess: Preprocess = Preprocess(
        size=224
    )  # of both. Uncertain: the size is that of consistency models' code

    frozen = ("teacher", "perceptual")

    def distance(self, net: Nets, made: Array, wanted: Array) -> Array:
        return net.perceptual(self.preprocess(made), self.preprocess(wanted))
