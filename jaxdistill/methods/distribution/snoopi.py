"""SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance (arXiv:2412.02687).

SwiftBrush's fixed scale of guidance is unstable across backbones. PG-SB draws the scale at every
iteration, the same for teacher and fake score, which broadens both distributions. Negative prompts,
which classifier-free guidance cannot bring to a one-step student, act inside its cross-attention
(NASA, `models.attention.nasa`): at inference only, on any student whose condition carries one
(`diffusion.guidance.negated`), or in training as well (NASA-T). A clamped CLIP loss, that of
SwiftBrush v2, may join the student's loss.

Departures: those of SwiftBrush. The best NASA strengths at inference are .1 (SD 1.5), .2 (SD 2.1)
and .5 (PixArt-alpha), with NASA-T 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Batch, Ctx, Nets
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.guidance import Random, Scale, negated
from jaxdistill.diffusion.process import Pred
from jaxdistill.methods.distribution.swiftbrush import SwiftBrush
from jaxdistill.objectives.features import cosine_distance
from jaxdistill.objectives.pixels import CLIP, Preprocess, decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGSB(SwiftBrush):
    """SwiftBrush with a random scale k of guidance.

    Teacher and fake score use the same draw: where their two distributions of k are equal, so are
    their scales.
    """

    # Of the teacher's score; the paper's for SD 1.5 and 2.1, (0.5, 3) for PixArt-alpha.
    guidance: Scale = Random(low=0.5, high=4.0)
    # Of the fake score. The paper's FID-2k: 10.7 with fixed scales, 9.0 with random ones, 10.8 with
    # random ones of the teacher only.
    fake_guidance: Scale = Random(low=0.5, high=4.0)

    def scaled(
        self, denoise: Callable, scale: Scale, xt: Array, t: Array, ctx: Ctx
    ) -> Pred:
        """eps(x, t, y, k) = (1 - k) eps(x, t, null) + k eps(x, t, y)."""
        k = scale.draw(ctx.key("guidance"), xt.shape[0])
        return guided(
            denoise, xt, t, ctx.batch.get("cond"), ctx.batch.get("null_cond"), k
        )

    def real(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        return self.scaled(net.teacher, self.guidance, xt, t, ctx)

    def fake(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        return self.scaled(net.fake, self.fake_guidance, xt, t, ctx)


def with_batch(ctx: Ctx, **entries) -> Ctx:
    """The context with some entries of its batch replaced or added."""
    return dataclasses.replace(ctx, batch={**ctx.batch, **entries})


@dataclasses.dataclass(frozen=True, kw_only=True)
class NasaT(PGSB):
    """Training with negative prompts: in the teacher's guidance and in the student's attention. The
    fake score never sees one.
    """

    # alpha, the strength of the negative prompt in training. Uncertain: U(0, 1), drawn at every
    # iteration.
    nasa: Scale = Random(low=0.0, high=1.0)

    @property
    def needs(self):
        cond = {"text": Float[Spec, "B T D"]}
        negative = {"text": Float[Spec, "B N D"]}
        return {**super().needs, "cond": cond, "negative_cond": negative}

    def simulate(self, net: Nets, ctx: Ctx) -> Batch:
        """Backward simulation of the student with NASA at every step."""
        plain = ctx.batch["cond"]
        alpha = self.nasa.draw(ctx.key("nasa"), jax.tree.leaves(plain)[0].shape[0])
        active = negated(plain, ctx.batch["negative_cond"], alpha)
        batch = super().simulate(net, with_batch(ctx, cond=active))
        return {**batch, "cond": plain, "active": active}

    def generate(self, net: Nets, ctx: Ctx) -> Array:
        """f(z, y, y-; alpha)."""
        return super().generate(net, with_batch(ctx, cond=ctx.batch["active"]))

    def real(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        """(1 - k) eps(x, t, y-) + k eps(x, t, y)."""
        return super().real(
            net, xt, t, with_batch(ctx, null_cond=ctx.batch["negative_cond"])
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipped:
    """Mixed into a method above, in front of it: the clamped CLIP loss of SwiftBrush v2
    (arXiv:2408.14176) in the student's loss.

    Batches also hold `text_embed`, the embeddings of the prompts. The frozen role `judge`, an image
    tower with a projection, embeds what `decoder` makes of the samples.
    """

    clip_weight: float = 0.1  # at the first step
    # Steps over which the weight falls linearly to 0: the length of the run. Uncertain: the shape
    # of the decay.
    clip_steps: int = 60_000
    clip_tau: float = 0.37  # cosine similarity above which the loss is 0
    preprocess: Preprocess = CLIP  # of images for `judge`

    frozen = ("teacher", "decoder", "judge")

    @property
    def needs(self):
        return {**super().needs, "text_embed": Float[Spec, "B E"]}

    def student_terms(
        self, net: Nets, ctx: Ctx, x0: Array
    ) -> tuple[Array, dict[str, Array]]:
        loss, terms = super().student_terms(net, ctx, x0)
        image = self.preprocess(decoded(net.decoder, x0))
        embedding = net.judge(net.judge(image), method="pool")
        distance = cosine_distance(ctx.batch["text_embed"], embedding)
        # max(0, tau - cos)
        clip = jnp.mean(jax.nn.relu(distance - (1 - self.clip_tau)))
        weight = self.clip_weight * jnp.maximum(1 - ctx.step / self.clip_steps, 0.0)
        return loss + weight * clip, {**terms, "clip": clip}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedPGSB(Clipped, PGSB):
    """Proper guidance with the CLIP loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedNasaT(Clipped, NasaT):
    """The paper's complete training."""
