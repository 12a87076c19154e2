"""Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation
(DisBack, arXiv:2408.15991).

A one-step student starts far from its teacher's law, where the teacher's score is unreliable. First
a copy of the teacher is degraded: it learns the law of the untouched student, and weights along the
way are recorded. Then the student is distilled as by its host, with the recorded networks as
targets, from the last one back to the teacher; the fake score starts as the last.

Departures: in an engine step the critics move before the student and on draws of their own, as in
the host. The released loop moves its target once, and its stage 2 takes over a trained fake score;
here as in the paper the whole path is walked, from s_N.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Ctx, Nets, Params, Refused, Stage, Turn
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Pred
from jaxdistill.methods._hosted import Hosted
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.dmd2 import DMD2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording(Hosted):
    """Stage 1, degradation (algorithm 1): the host's critics learn the frozen student's law, and
    `path` follows the fake score.

    Member 0 of the path is the teacher, member i the fake score after `every` i updates. A
    discriminator is trained along.
    """

    every: int

    frozen = ("teacher",)
    ema = ()

    @property
    def inits(self) -> dict[str, str | None]:
        return {**self.host.inits, "path": "teacher"}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (dataclasses.replace(self.host.turns[0], after=self.record),)

    def record(self, weights, step: Array) -> dict[str, Params]:
        """Writes the fake score over the member that its interval ends with. Raises Refused where
        the path has other weights.
        """
        path = weights["path"]
        fake = weights["fake"]
        shapes = jax.tree.map(lambda w: (self.host.checkpoints + 1, *w.shape), fake)
        if jax.tree.map(jnp.shape, path) != shapes:
            raise Refused(
                f"roles.path: expected a bank of method.checkpoints + 1 = {self.host.checkpoints + 1} networks like roles.fake"
            )
        return {"path": jax.tree.map(lambda p, w: p.at[step // self.every + 1].set(w), path, fake)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backtracking:
    """What DisBack adds to a host, a method of the Diff-Instruct family; it comes before the host
    among a class's bases.
    """

    # N, recorded networks; the role `path` is a bank of N + 1. The paper's SDXL script: about 10
    checkpoints: int = 10
    record_every: int = 100  # I_1, updates of the fake score between two of them; the paper's 100
    # I_2, updates of the fake score for each target; the paper's 1000, that is 200 of the student
    interval: int = 1000
    # uncertain: the released code guides every target, though the recorded ones have learnt the
    # conditional branch alone
    guided_targets: int = (
        1_000_000  # targets below this index are guided; 1: the original teacher alone
    )

    frozen = ("teacher", "path")

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """Recording, as long as N I_1 or all there is; then the host, in what is left. Without
        checkpoints the host alone.
        """
        recording = min(self.checkpoints * self.record_every, steps)
        if not recording:
            return (Stage(self, steps, surgery=undegraded),)
        return Stage(Recording(host=self, every=self.record_every), recording), Stage(
            self, steps - recording
        )

    def target(self, step: Array) -> Array:
        """Index in the path of the real score at a step of stage 2, which is one update of the fake
        score: N - 1 down to 0.
        """
        return jnp.maximum(self.checkpoints - 1 - step // self.interval, 0)

    def real(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        """The host's real score, by the network that the path has reached (algorithm 2)."""
        index = self.target(ctx.step)
        scale = self.guidance
        if scale != 1.0 and self.guided_targets < self.checkpoints:
            scale = jnp.where(index < self.guided_targets, scale, 1.0)
        member = functools.partial(net.path, member=index)
        return guided(member, xt, t, ctx.batch.get("cond"), ctx.batch.get("null_cond"), scale)


def undegraded(nets, params, batch):
    """Surgery: a path of the teacher alone."""
    return nets, {**params, "path": params["teacher"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisBack(Backtracking, DMD2):
    """On DMD2: the released code, for SDXL with guidance 8 and GAN weights 5e-3 and 1e-2."""

    gan_weight: float = 5e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisBackDiffInstruct(Backtracking, DiffInstruct):
    """On Diff-Instruct, which needs no data: what the paper compares with. Five updates of the fake
    score to one of the student.
    """

    critic_steps: int = 5
