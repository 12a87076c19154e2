"""The one-step methods that Uni-Instruct (arXiv:2505.20755, table 1) is a common form of, each by
the piece that makes it.

| method | gradient of the student | here |
|---|---|---|
| Diff-Instruct arXiv:2305.18455 | w_t d . dx_t, d = s_fake - s_real | diff_instruct.DiffInstruct |
| VSD arXiv:2305.16213, SwiftBrush | the same, the fake score an adapter | DiffInstruct with roles.fake.lora |
| DMD arXiv:2311.18828 | normalised, and a regression on pairs | _dmd.DMD |
| DMD2 arXiv:2405.14867 | normalised, and a GAN | dmd2.DMD2 |
| f-distill arXiv:2502.15681 | DMD2's times h(r) | FDistill, BinnedFDistill |
| SDS arXiv:2209.14988, DDS arXiv:2304.07090 | s_fake that of the sample itself, or of a reference | SDS (_sds.py), DDS |
| RED-diff arXiv:2305.04391 | SDS and fidelity to a measurement | RedDiff |
| SiD arXiv:2404.04057 | score identity | SiD |
| SiDA arXiv:2410.14919 | score identity and a GAN | SiDA |
| SIM arXiv:2410.16794 | score identity of any distance | SIM |
| DI++ arXiv:2410.18881, DI* arXiv:2410.20898 | Diff-Instruct's or SIM's, and a reward | DIPlusPlus, DIStar |
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from jaxdistill.core.fields import Limit
from jaxdistill.core.types import Array, Ctx, Nets
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import expand
from jaxdistill.diffusion.times import Karras, Uniform
from jaxdistill.methods.distribution._sds import ScoreDistillation
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct, EDMDiffInstruct
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.uni_instruct import UniInstruct
from jaxdistill.objectives import fdivergence, score


@dataclasses.dataclass(frozen=True, kw_only=True)
class FDistill(DMD2):
    """DMD2's gradient times h(r) over its batch mean, r from the discriminator."""

    divergence: str = "js"  # a row of fdivergence.DIVERGENCES
    ratio_range: tuple[float, Limit] = (0.0, math.inf)  # where r is clipped; the code's (.1, 20)

    def weigh(self, net: Nets, ctx: Ctx, xt: Array, t: Array) -> Array:
        """h(r) over its batch mean, [B]."""
        return fdivergence.f_weight(
            self.divergence, self.logits(net, xt, t, ctx.batch.get("cond")), *self.ratio_range
        )

    def match(self, net, ctx, x0):
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        h = self.weigh(net, ctx, xt, t)
        gradient = self.direction(x0, self.real(net, xt, t, ctx), self.fake(net, xt, t, ctx), t)
        return score.gradient_surrogate(x0, expand(h, x0) * gradient), xt, t


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinnedFDistill(FDistill):
    """As released: ratios over their running mean in the bin of their time, so that no noise level
    outweighs the others.
    """

    ratio_range: tuple[float, float] = (0.1, 20.0)
    bins: int = 10  # equal parts of the process
    bin_rate: float = 0.0  # share of its old mean that a bin keeps; the code's .5 on ImageNet-64

    def memory(self):
        return {"ratio_means": jnp.ones(self.bins)}

    def means(self, logits: Array, t: Array, ctx: Ctx) -> tuple[Array, Array]:
        """(mean ratios by bin [bins], those of the samples' bins [B])."""
        r = fdivergence.f_ratio(logits, *self.ratio_range)
        ends = (self.process.t_min, self.process.t_max)
        return fdivergence.binned_means(ctx.memory["ratio_means"], r, t, *ends, self.bin_rate)

    def weigh(self, net, ctx, xt, t):
        logits = self.logits(net, xt, t, ctx.batch.get("cond"))
        return fdivergence.f_weight(
            self.divergence, logits, *self.ratio_range, scale=self.means(logits, t, ctx)[1] + 1e-6
        )

    def student_loss(self, net, ctx):
        out = super().student_loss(net, ctx)
        xt, t, _ = self.diffuse(
            self.generate(net, ctx), self.match_times, ctx, "match"
        )  # the same draws, found equal by XLA
        means, _ = self.means(self.logits(net, xt, t, ctx.batch.get("cond")), t, ctx)
        return out._replace(memory={**out.memory, "ratio_means": means})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDS(ScoreDistillation, DiffInstruct):
    """Score distillation sampling: D_psi = x0. The student is any generator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDS(SDS):
    """Delta denoising: less the gradient of a reference, batch["ref"] [B ...] under its own
    condition batch["ref_cond"].
    """

    def match(self, net, ctx, x0):
        xt, t, eps = self.diffuse(x0, self.match_times, ctx, "match")
        ref = ctx.batch["ref"]
        null = ctx.batch.get("null_cond")
        held = guided(
            net.teacher,
            self.process.add_noise(ref, eps, t),
            t,
            ctx.batch.get("ref_cond"),
            null,
            self.guidance,
        )
        own = self.direction(x0, self.real(net, xt, t, ctx), self.added(x0, eps, t), t)
        return (
            score.gradient_surrogate(
                x0, own - self.direction(ref, held, self.added(ref, eps, t), t)
            ),
            xt,
            t,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RedDiff(SDS):
    """An inverse problem: SDS as the prior, and |A(x0) - y|^2 with y = batch["measured"]; override
    `measure`, which is A.
    """

    fidelity_weight: float = 1.0

    def measure(self, x0: Array) -> Array:
        return x0

    def match(self, net, ctx, x0):
        prior, xt, t = super().match(net, ctx, x0)
        return (
            prior
            + self.fidelity_weight * jnp.mean((self.measure(x0) - ctx.batch["measured"]) ** 2),
            xt,
            t,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiD(EDMDiffInstruct):
    """Score identity distillation. alpha = 1/2 is the exact gradient of the Fisher divergence,
    halved; the paper's is 1.2.

    The student's loss is a sum over dimensions, as in the code, the fake score's a mean where that
    has a sum: its Adam's eps (1e-8 there) is to be divided by their number.
    """

    student_times: tuple[float, ...] = (2.5,)
    match_times: Uniform = Karras(high=0.8)
    alpha: float = 1.2
    scale: float = 100.0

    def identity(self, x0: Array, real: Array, fake: Array) -> Array:
        """[B] from the sample and the two denoised ones."""
        return score.sid_loss(x0, real, fake, self.alpha, self.scale)

    def match(self, net, ctx, x0):
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        return (
            jnp.mean(
                self.identity(x0, self.real(net, xt, t, ctx).x0, self.fake(net, xt, t, ctx).x0)
            ),
            xt,
            t,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SIM(SiD):
    """Score implicit matching under the pseudo-Huber distance; the sampling law is held, hence no
    further term.
    """

    alpha: float = dataclasses.field(default=1.0, init=False)  # not a field of this one
    # c of sqrt(|.|^2 + c^2) - c, in units of the data, times the root of the number of dimensions
    huber: float = 1e-2

    def identity(self, x0, real, fake):
        return self.scale * score.sim_loss(x0, real, fake, self.huber * (x0[0].size ** 0.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiDA(UniInstruct):
    """Score identity with alpha, and Uni-Instruct's GAN; no ratio enters. alpha = 1 is
    Uni-Instruct's reverse KL.
    """

    divergence: str = dataclasses.field(default="reverse_kl", init=False)  # not a field of this one
    alpha: float = 1.2  # as SiD's; Uni-Instruct's code has 1
    critic_only: int = 0

    def expansion(self, net, ctx, x0, xt, t, real, fake, logits):
        return score.sid_loss(x0, real.x0, fake.x0, self.alpha, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalisedUniInstruct(UniInstruct):
    """Ratios over their batch mean."""

    def ratio(self, logits):
        r = super().ratio(logits)
        return r / jnp.mean(r)


class _Rewarded:
    """A frozen role `reward`, (x0, cond) -> [B], that the student climbs besides matching."""

    frozen = ("teacher", "reward")

    def match(self, net, ctx, x0):
        loss, xt, t = super().match(net, ctx, x0)
        return loss - self.reward_weight * jnp.mean(net.reward(x0, ctx.batch.get("cond"))), xt, t


@dataclasses.dataclass(frozen=True, kw_only=True)
class DIPlusPlus(_Rewarded, DiffInstruct):
    reward_weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DIStar(_Rewarded, SIM):
    reward_weight: float = 1.0
