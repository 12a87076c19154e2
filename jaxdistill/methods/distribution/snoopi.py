"""SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance (arXiv:2412.02687).

SwiftBrush's one scale of guidance is unstable across backbones: PG-SB draws it anew at every
iteration, the same for teacher and fake score, which broadens both laws. Negative prompts, which
guidance cannot bring to a one-step student, act inside its cross-attention (NASA,
`models.attention.nasa`): at inference alone, on any student whose condition carries one
(`diffusion.guidance.negated`), or in training as well (NASA-T). A clamped CLIP loss of SwiftBrush
v2 may join the student's.

Departures: SwiftBrush's. The best strengths at inference: .1 SD 1.5, .2 SD 2.1, .5 PixArt-alpha
(NASA-T: 1).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Nets
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.guidance import Random, Scale, negated
from jaxdistill.diffusion.process import Pred
from jaxdistill.methods.distribution.swiftbrush import SwiftBrush
from jaxdistill.objectives.features import cosine_distance
from jaxdistill.objectives.pixels import CLIP, Preprocess, decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGSB(SwiftBrush):
    """SwiftBrush with a law of the scale k. Both laws see one draw: where they are equal, so are
    the scales.
    """

    guidance: Scale = Random(
        low=0.5, high=4.0
    )  # of the real score; the paper's for SD 1.5 and 2.1, (0.5, 3) for PixArt-alpha
    fake_guidance: Scale = Random(
        low=0.5, high=4.0
    )  # of the fake score. FID-2k: fixed 10.7, random 9.0; for the teacher alone 10.8

    def scaled(self, denoise, law: Scale, xt: Array, t: Array, ctx: Ctx) -> Pred:
        """eps(x, t, y, k) = (1 - k) eps(x, t, null) + k eps(x, t, y)."""
        k = law.draw(ctx.key("guidance"), xt.shape[0])
        return guided(denoise, xt, t, ctx.batch.get("cond"), ctx.batch.get("null_cond"), k)

    def real(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        return self.scaled(net.teacher, self.guidance, xt, t, ctx)

    def fake(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        return self.scaled(net.fake, self.fake_guidance, xt, t, ctx)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NasaT(PGSB):
    """Training with negative prompts, batch["negative_cond"] (as null_cond): in the teacher's
    guidance, and in the student's attention. The fake score never sees one.
    """

    nasa: Scale = Random(
        low=0.0, high=1.0
    )  # alpha in training. Uncertain: U(0, 1), one draw an iteration

    def simulate(self, net: Nets, ctx: Ctx) -> Batch:
        """The chain of the student with NASA at every step."""
        plain = ctx.batch["cond"]
        alpha = self.nasa.draw(ctx.key("nasa"), jax.tree.leaves(plain)[0].shape[0])
        active = negated(plain, ctx.batch["negative_cond"], alpha)
        out = super().simulate(net, dataclasses.replace(ctx, batch={**ctx.batch, "cond": active}))
        return {**out, "cond": plain, "active": active}

    def generate(self, net: Nets, ctx: Ctx) -> Array:
        """f(z, y, y-; alpha)."""
        return super().generate(
            net, dataclasses.replace(ctx, batch={**ctx.batch, "cond": ctx.batch["active"]})
        )

    def real(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        """(1 - k) eps(x, t, y-) + k eps(x, t, y)."""
        return super().real(
            net,
            xt,
            t,
            dataclasses.replace(ctx, batch={**ctx.batch, "null_cond": ctx.batch["negative_cond"]}),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipped:
    """The clamped CLIP loss of SwiftBrush v2 (arXiv:2408.14176), for the student of the method that
    it is mixed into. Batches hold the prompts' embeddings too, text_embed [B E]; those of the
    samples are made by the frozen role `judge`, an image tower with a projection, from what
    `decoder` makes of them.
    """

    clip_weight: float = 0.1
    # steps over which the weight falls to 0, on a line; the shape is uncertain. The length of the
    # run
    clip_steps: int = 60_000
    clip_tau: float = 0.37  # a cosine above it is enough
    preprocess: Preprocess = CLIP  # of images for `judge`

    frozen = ("teacher", "decoder", "judge")

    def student_terms(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, dict[str, Array]]:
        loss, parts = super().student_terms(net, ctx, x0)
        image = net.judge(net.judge(self.preprocess(decoded(net.decoder, x0))), method="pool")
        apart = cosine_distance(ctx.batch["text_embed"], image)
        clip = jnp.mean(jax.nn.relu(apart - (1 - self.clip_tau)))  # max(0, tau - cos)
        weight = self.clip_weight * jnp.maximum(1 - ctx.step / self.clip_steps, 0.0)
        return loss + weight * clip, {**parts, "clip": clip}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedPGSB(Clipped, PGSB):
    """Proper guidance with the CLIP loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedNasaT(Clipped, NasaT):
    """The paper's whole training."""
