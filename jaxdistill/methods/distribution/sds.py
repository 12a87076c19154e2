"""SDS - Score distillation sampling, from DreamFusion: Text-to-3D using 2D Diffusion
(arXiv:2209.14988).

Whatever makes samples x0, a network or the parameters of one scene, is moved along the teacher's
error in predicting the noise that was added: Diff-Instruct with the score of the sample itself in
place of a fake score, hence without a second network. The gradient is that of a KL divergence from
a point, so samples climb to the teacher's modes and do not spread:

    grad = w_t (D_psi(x_t) - D_phi(x_t)),  D_psi(x_t) = x0                                 (1)

`DDS` (delta denoising score, arXiv:2304.07090) subtracts the same gradient of a reference under its
own condition, which cancels the error that both share. `RedDiff` (RED-diff, arXiv:2305.04391)
solves inverse problems: SDS is the prior, beside the fidelity to a measurement.

`ScoreDistillation` makes this of any host of the Diff-Instruct family (SwiftBrush's ablation).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Ctx, Nets, Turn
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Pred
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.objectives import score


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreDistillation:
    """The noise that was added stands for the fake score. It comes before the host among a class's
    bases.
    """

    # The host's fields of the fake score are no fields here, but for its guidance, which is
    # accepted and not read.
    critic_steps: int = dataclasses.field(default=1, init=False)
    fake_times: Uniform = dataclasses.field(default=Uniform(), init=False)
    fake_target: str = dataclasses.field(default="v", init=False)
    fake_dropout: float = dataclasses.field(default=0.0, init=False)

    inits = {"student": "teacher"}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.student_loss, gather=self.simulate),)

    def added(self, x0: Array, eps: Array, t: Array) -> Pred:
        """What a fake score that knew the sample would predict."""
        v = self.process.velocity(x0, eps, t)
        return Pred(x0, eps, v, v)

    def match(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, Array, Array]:
        """(loss whose gradient in x0 is that of (1) over numel, x_t, t)."""
        xt, t, eps = self.diffuse(x0, self.match_times, ctx, "match")
        gradient = self.direction(
            x0, self.real(net, xt, t, ctx), self.added(x0, eps, t), t
        )
        return score.gradient_surrogate(x0, gradient), xt, t


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDS(ScoreDistillation, DiffInstruct):
    """Score distillation sampling. The student is any generator."""

    needs = {"x": Shaped[Spec, "B ..."]}  # only its shape is read


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDS(SDS):
    """Delta denoising: less the gradient of a reference, batch["ref"] [B ...] under its own
    condition batch["ref_cond"].
    """

    needs = {"x": Shaped[Spec, "B *shape"], "ref": Shaped[Spec, "B *shape"]}

    def match(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, Array, Array]:
        xt, t, eps = self.diffuse(x0, self.match_times, ctx, "match")
        own = self.direction(
            x0, self.real(net, xt, t, ctx), self.added(x0, eps, t), t
        )
        ref = ctx.batch["ref"]
        ref_t = self.process.add_noise(ref, eps, t)
        cond = ctx.batch.get("ref_cond")
        null = ctx.batch.get("null_cond")
        real = guided(net.teacher, ref_t, t, cond, null, self.guidance)
        shared = self.direction(ref, real, self.added(ref, eps, t), t)
        return score.gradient_surrogate(x0, own - shared), xt, t


@dataclasses.dataclass(frozen=True, kw_only=True)
class RedDiff(SDS):
    """An inverse problem: SDS as the prior, and |A(x0) - y|^2 with y = batch["measured"]; override
    `measure`, which is A.
    """

    fidelity_weight: float = 1.0  # of the squared error, its mean over all entries

    needs = {"x": Shaped[Spec, "B ..."], "measured": Shaped[Spec, "B ..."]}

    def measure(self, x0: Array) -> Array:
        """A(x0); here the sample itself."""
        return x0

    def match(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, Array, Array]:
        prior, xt, t = super().match(net, ctx, x0)
        fidelity = jnp.mean((self.measure(x0) - ctx.batch["measured"]) ** 2)
        return prior + self.fidelity_weight * fidelity, xt, t
