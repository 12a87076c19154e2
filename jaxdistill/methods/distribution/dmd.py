"""DMD - One-step Diffusion with Distribution Matching Distillation (arXiv:2311.18828).

A one-step student's samples x0 are noised to x_t and moved along the difference of two denoisers,
the frozen teacher's D_phi and D_psi of a `fake` network trained online on the student's samples.
The difference is divided by the teacher's distance from the sample, so that all noise levels pull
alike:

    grad = (D_psi(x_t) - D_phi(x_t)) / mean |x0 - D_phi(x_t)|                          (eqs. 7, 8)

The gradient of this divergence alone drops modes; a regression on stored pairs of a noise z and the
sample that the teacher's ODE makes of it keeps all of them:

    L = L_match + regression_weight * distance(G(z), ODE(z))                               (eq. 9)

Departures: times are continuous; `DMD` regresses by squared error, `PerceptualDMD` by LPIPS as the
paper does. `Normalised`, without pairs, is the gradient that DMD2, Flash-DMD and f-distill take.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Batch, Collect, Ctx, Nets, Out, Stage
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Pred
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.objectives import score
from jaxdistill.objectives.numerics import mean_per_sample
from jaxdistill.objectives.pixels import Preprocess
from jaxdistill.samplers import ode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalised(DiffInstruct):
    """Diff-Instruct with DMD's gradient, which does not depend on the scale of a sample's error."""

    def direction(self, x0: Array, real: Pred, fake: Pred, t: Array) -> Array:
        return score.dmd_gradient(x0, real.x0, fake.x0)  # eqs. 7 and 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMD(Normalised):
    """Distribution matching, and regression on stored pairs by squared error."""

    # of the regression in the student's loss; the paper's is that of LPIPS. 0: no regression
    regression_weight: float = 0.25
    # batches of stored pairs, each of data.batch_size samples; the paper has 100,000 pairs
    # (CIFAR-10) and 25,000 (ImageNet-64)
    batches: int = 400
    # that makes the pairs: euler | heun | ddim | dpmpp_2m; the paper's is Heun's
    solver: str = "heun"
    # of the solver; the paper's 18 (CIFAR-10), 256 (ImageNet-64)
    solver_steps: int = 18

    needs = {"x": Shaped[Spec, "B ..."]}  # only its shape is read

    def stages(self, steps: int) -> tuple[Stage, ...]:
        return (Stage(self, steps, collect=Collect(self.pairs, self.batches)),)

    def pairs(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch with `pair_noise`, the teacher's sample `pair_x` of it, and their condition."""
        x = ctx.batch["x"]
        cond = ctx.batch.get("cond")
        null = ctx.batch.get("null_cond")
        noise = jax.random.normal(ctx.key("noise"), x.shape, x.dtype)
        denoise = lambda xt, t: guided(
            net.teacher, xt, t, cond, null, self.guidance
        )
        start = self.process.start(noise)
        sample = ode.solve(
            self.solver, self.process, denoise, start, self.solver_steps
        )
        pairs = {"pair_noise": noise, "pair_x": sample}
        if cond is not None:
            pairs["pair_cond"] = cond
        return {**ctx.batch, **pairs}

    def distance(self, net: Nets, made: Array, wanted: Array) -> Array:
        """Of samples [B ...] from their targets [B ...]: [B]."""
        return mean_per_sample((made - wanted) ** 2)

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        out = super().student_loss(net, ctx)
        if not self.regression_weight:
            return out
        wanted = ctx.batch["pair_x"]
        noise = self.initial(ctx.batch["pair_noise"])
        t = jnp.full(wanted.shape[:1], self.student_times[0])
        made = net.student(
            self.process.start(noise), t, ctx.batch.get("pair_cond")
        ).x0
        regression = jnp.mean(self.distance(net, made, wanted))  # eq. 9
        loss = out.loss + self.regression_weight * regression
        return Out(loss, {**out.metrics, "regression": regression})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualDMD(DMD):
    """The paper's regression, by LPIPS: the frozen role `perceptual` is a distance of pictures in
    -1..1, (a, b) -> [B].
    """

    # of both pictures before `perceptual`. Uncertain: the size is that of consistency models' code
    preprocess: Preprocess = Preprocess(size=224)

    frozen = ("teacher", "perceptual")

    def distance(self, net: Nets, made: Array, wanted: Array) -> Array:
        return net.perceptual(self.preprocess(made), self.preprocess(wanted))
