"""Flash-DMD - few-step distillation with a timestep-aware split of its losses (arXiv:2511.20549).
Its second stage, joint reinforcement learning, is flash_dmd_rl.py.

Each loss acts on the steps of the student's sampling chain where it helps: distribution matching on
the noisy steps, and on the clean ones a GAN, whose discriminator judges decoded samples by heads on
a frozen network's features. The fake score is trained by denoising alone and drawn towards the
student's weights, so that one or two of its updates per student update are enough.

Choices where the paper is silent: the order fake score, discriminator, student; the discriminator
judges samples of sampling chains of its own; the clean step is drawn for each sample, the noisy one
for the batch (as in DMD2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxdistill.core.types import (
    Array,
    Batch,
    Ctx,
    Nets,
    Out,
    Params,
    Refused,
    Turn,
)
from jaxdistill.methods.distribution.dmd import Normalised
from jaxdistill.objectives import gan
from jaxdistill.objectives.pixels import Preprocess, decoded
from jaxdistill.samplers.fewstep import chain
from jaxdistill.surgery.mix import mix


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashDMD(Normalised):
    """Batches hold x, of which only the shape is read where they also hold `image`: real samples as
    `decoder` makes them. Without `image` the samples x themselves are the real ones.

    The frozen role `decoder` has the methods `denormalise` and `decode`; `features` is the network
    that the discriminator's heads look at.
    """

    # The paper's, of 1000 time steps.
    student_times: tuple[float, ...] = (0.999, 0.749, 0.499, 0.249)
    # Indices in student_times of the steps that distribution matching trains.
    match_steps: tuple[int, ...] = (0, 1)
    gan_steps: tuple[int, ...] = (2, 3)  # and of those that the GAN trains
    # Updates of the fake score per student update; the paper's 1 (for 1 k steps) and 2 (for 8 k).
    critic_steps: int = 1
    # Share of its own weights that the fake score keeps after a student update; 1: all. Uncertain,
    # since the paper does not state it.
    injection: float = 0.999
    match_weight: float = 1.0  # of distribution matching in the student's loss
    # Of the GAN in the student's loss. Uncertain: DMD2's for SDXL; values up to 1 are in use.
    gan_weight: float = 5e-3
    # Layers of `features` that have a head. Uncertain: their number.
    taps: tuple[int, ...] = (0, 1, 2)
    preprocess: Preprocess = Preprocess()  # of images for `features`

    inits = {"student": "teacher", "fake": "teacher", "disc": None}
    frozen = ("teacher", "decoder", "features")

    def __post_init__(self):
        super().__post_init__()
        self.check_steps("match_steps", len(self.student_times))
        self.check_steps("gan_steps", len(self.student_times))

    def check_steps(self, name: str, below: int) -> None:
        steps = getattr(self, name)
        if not steps or not all(0 <= i < below for i in steps):
            expected = f"expected places in student_times, from 0 to {below - 1}"
            raise Refused(f"method.{name}={steps}: {expected}")

    @property
    def turns(self) -> tuple[Turn, ...]:
        fake, student = super().turns
        disc = Turn(
            ("disc",), self.disc_loss, when=student.when, gather=self.rollout
        )
        student = dataclasses.replace(
            student, gather=self.rollout, after=self.inject
        )
        return (fake, disc, student)

    def sampling_chain(self, net: Nets, ctx: Ctx) -> tuple[Callable, Array, Array]:
        """(the student with its condition bound, noise, times) of a chain of the student's own."""
        noise = jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape)
        denoise = lambda x, t: net.student(x, t, ctx.batch.get("cond"))
        return denoise, noise, jnp.array(self.student_times)

    def draw_step(
        self,
        ctx: Ctx,
        steps: tuple[int, ...],
        name: str = "index",
        shape: tuple[int, ...] = (),
    ) -> Array:
        """One of `steps`, or one for each entry of `shape`; all are equally likely."""
        drawn = jax.random.randint(ctx.key(name), shape, 0, len(steps))
        return jnp.array(steps)[drawn]

    def rollout(self, net: Nets, ctx: Ctx) -> Batch:
        """Adds the inputs of the student's two calls: (xt, t), a state of its chain at a noisy
        step, and (x_low, t_low), the end of the chain noised to a clean step.
        """
        denoise, noise, times = self.sampling_chain(net, ctx)
        states, x0 = chain(self.process, denoise, noise, times, ctx.key("chain"))
        n = noise.shape[0]
        index = self.draw_step(ctx, self.match_steps)
        noisy = {"xt": states[index], "t": jnp.full(n, times[index])}
        t_low = times[self.draw_step(ctx, self.gan_steps, "low", (n,))]
        eps = jax.random.normal(ctx.key("low_eps"), x0.shape)
        clean = {"x_low": self.process.add_noise(x0, eps, t_low), "t_low": t_low}
        return {**ctx.batch, **noisy, **clean}

    def refine(self, net: Nets, ctx: Ctx) -> Array:
        """The student's x0 at a clean step of its own chain: the only call that the GAN trains."""
        return net.student(
            ctx.batch["x_low"], ctx.batch["t_low"], ctx.batch.get("cond")
        ).x0

    def logits(self, net: Nets, image: Array, ctx: Ctx) -> Array:
        """The discriminator's logits, [B heads]."""
        _, features = net.features(self.preprocess(image), taps=self.taps)
        return net.disc(features)

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        match, _, _ = self.match(net, ctx, self.generate(net, ctx))
        image = decoded(net.decoder, self.refine(net, ctx))
        adversarial = jnp.mean(
            gan.non_saturating_generator(self.logits(net, image, ctx))
        )
        loss = self.match_weight * match + self.gan_weight * adversarial
        return Out(loss, {"match": match, "gan": adversarial})

    def disc_loss(self, net: Nets, ctx: Ctx) -> Out:
        image = jax.lax.stop_gradient(decoded(net.decoder, self.refine(net, ctx)))
        real = self.logits(net, ctx.batch.get("image", ctx.batch["x"]), ctx)
        fake = self.logits(net, image, ctx)
        return Out(jnp.mean(gan.non_saturating_discriminator(real, fake)))

    def inject(
        self, weights: Mapping[str, Params], step: Array
    ) -> dict[str, Params]:
        """psi <- lam psi + (1 - lam) theta: the fake score is drawn towards the student.

        Where both are adapters, the adapters' weights are mixed. Raises Refused where the two
        networks differ.
        """
        return mix(weights, "fake", "student", self.injection)
