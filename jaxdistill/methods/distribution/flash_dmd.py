"""Flash-DMD - few-step distillation with a timestep-aware split of its losses (arXiv:2511.20549).
Its second stage, joint reinforcement learning, is flash_dmd_rl.py.

Each loss acts on the steps of the student's chain where it helps: distribution matching on the
noisy ones, and on the clean ones a GAN, judged on decoded samples by heads on a frozen network. The
fake score is trained by denoising alone and drawn towards the student's weights, so that one or two
updates to one of the student are enough.

Choices where the paper is silent: fake score, discriminator, student in this order; the
discriminator judges samples of its own chains; the clean step is drawn for each sample, the noisy
one for the batch (DMD2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Params, Refused, Turn
from jaxdistill.methods.distribution.dmd import Normalised
from jaxdistill.objectives import gan
from jaxdistill.objectives.pixels import Preprocess, decoded
from jaxdistill.samplers.fewstep import chain


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashDMD(Normalised):
    """Batches: x (what the student makes: only its shape is read, unless it is also what `features`
    look at), image (real samples as `decoder` makes them, where it does). The decoder has
    `denormalise` and `decode`.
    """

    student_times: tuple[float, ...] = (0.999, 0.749, 0.499, 0.249)  # the paper's, of 1000
    match_steps: tuple[int, ...] = (
        0,
        1,
    )  # places in student_times that distribution matching trains
    gan_steps: tuple[int, ...] = (2, 3)  # and those that the GAN trains
    critic_steps: int = (
        1  # updates of the fake score to one of the student; the paper's 1 (1 k steps), 2 (8 k)
    )
    # share that the fake score keeps of its own weights; 1: off. Uncertain, the paper's is not
    # known
    injection: float = 0.999
    match_weight: float = 1.0
    gan_weight: float = 5e-3  # uncertain: DMD2's for SDXL; up to 1
    taps: tuple[int, ...] = (
        0,
        1,
        2,
    )  # layers of `features` that have a head; their number is uncertain
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
            raise Refused(
                f"method.{name}={steps}: expected places in student_times, from 0 to {below - 1}"
            )

    @property
    def turns(self) -> tuple[Turn, ...]:
        fake, student = super().turns
        disc = Turn(("disc",), self.disc_loss, when=student.when, gather=self.walk)
        return (fake, disc, dataclasses.replace(student, gather=self.walk, after=self.inject))

    def denoise_chain(self, net: Nets, ctx: Ctx):
        """(student with its condition bound, noise, times) of a chain of the student's own."""
        noise = jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape)
        return (
            lambda x, t: net.student(x, t, ctx.batch.get("cond")),
            noise,
            jnp.array(self.student_times),
        )

    def one_of(
        self, ctx: Ctx, steps: tuple[int, ...], name: str = "index", shape: tuple[int, ...] = ()
    ) -> Array:
        return jnp.array(steps)[jax.random.randint(ctx.key(name), shape, 0, len(steps))]

    def walk(self, net: Nets, ctx: Ctx) -> Batch:
        """The states of the generator's two calls: one that the chain has at a noisy step, and its
        end, noised to a clean step.
        """
        denoise, noise, times = self.denoise_chain(net, ctx)
        states, x0 = chain(self.process, denoise, noise, times, ctx.key("chain"))
        index = self.one_of(ctx, self.match_steps)
        n = noise.shape[0]
        t_low = times[self.one_of(ctx, self.gan_steps, "low", (n,))]
        x_low = self.process.add_noise(x0, jax.random.normal(ctx.key("low_eps"), x0.shape), t_low)
        return {
            **ctx.batch,
            "xt": states[index],
            "t": jnp.full(n, times[index]),
            "x_low": x_low,
            "t_low": t_low,
        }

    def refine(self, net: Nets, ctx: Ctx) -> Array:
        """The student's x0 at a clean step, from a sample of its own: the only call that the GAN
        trains.
        """
        return net.student(ctx.batch["x_low"], ctx.batch["t_low"], ctx.batch.get("cond")).x0

    def logits(self, net: Nets, image: Array, ctx: Ctx) -> Array:
        """One logit a head, [B heads]."""
        return net.disc(net.features(self.preprocess(image), taps=self.taps)[1])

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        match = self.match(net, ctx, self.generate(net, ctx))[0]
        fake = self.logits(net, decoded(net.decoder, self.refine(net, ctx)), ctx)
        adversarial = jnp.mean(gan.non_saturating_generator(fake))
        return Out(
            self.match_weight * match + self.gan_weight * adversarial,
            {"match": match, "gan": adversarial},
        )

    def disc_loss(self, net: Nets, ctx: Ctx) -> Out:
        image = jax.lax.stop_gradient(decoded(net.decoder, self.refine(net, ctx)))
        real = self.logits(net, ctx.batch.get("image", ctx.batch["x"]), ctx)
        return Out(jnp.mean(gan.non_saturating_discriminator(real, self.logits(net, image, ctx))))

    def inject(self, weights: Mapping[str, Params], step: Array) -> dict[str, Params]:
        """psi <- lam psi + (1 - lam) theta; adapters on adapters where both roles have them. Raises
        Refused where they differ.
        """
        fake = weights["fake"]
        student = weights["student"]
        if jax.tree.map(jnp.shape, fake) != jax.tree.map(jnp.shape, student):
            raise Refused(
                "roles.fake: it takes in the student's weights, so both need the same model (and the same lora.rank)"
            )
        return {
            "fake": jax.tree.map(
                lambda psi, theta: self.injection * psi + (1 - self.injection) * theta,
                fake,
                student,
            )
        }
