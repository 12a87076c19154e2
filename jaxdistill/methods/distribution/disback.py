"""Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation
(DisBack, arXiv:2408.15991).

The samples of an untrained one-step student are far from its teacher's distribution, where the
teacher's score is unreliable. First, a copy of the teacher is degraded: it learns the distribution
of the untrained student's samples, and its weights are recorded along the way. Then the student is
distilled as by a host method, with the recorded networks as its teachers, from the last one back to
the original teacher; the fake score starts as the last one.

Departures: in an engine step the critics are updated before the student and on draws of their own,
as in the host. The released loop changes its target once, and its second stage goes on with a
trained fake score; here, as in the paper, the targets are all recorded networks, from s_N on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

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
    """Stage 1, degradation (algorithm 1): the host's critics learn the distribution of the frozen
    student's samples, and the fake score is recorded in `path`.

    `path` is a bank of networks: member 0 is the teacher, member i the fake score after i times
    `every` updates. A discriminator of the host is trained as well.
    """

    every: int  # updates of the fake score from one record to the next

    frozen = ("teacher",)
    ema = ()

    @property
    def inits(self) -> dict[str, str | None]:
        return {**self.host.inits, "path": "teacher"}

    @property
    def turns(self) -> tuple[Turn, ...]:
        critics = self.host.turns[0]
        return (dataclasses.replace(critics, after=self.record),)

    def record(
        self, weights: Mapping[str, Params], step: Array
    ) -> dict[str, Params]:
        """Overwrites the member at which the present interval ends by the current fake score.

        Raises Refused where the path is not a bank of networks like the fake score.
        """
        path = weights["path"]
        fake = weights["fake"]
        members = self.host.checkpoints + 1
        shapes = jax.tree.map(lambda w: (members, *w.shape), fake)
        if jax.tree.map(jnp.shape, path) != shapes:
            expected = (
                f"method.checkpoints + 1 = {members} networks like roles.fake"
            )
            raise Refused(f"roles.path: expected a bank of {expected}")
        member = step // self.every + 1
        return {
            "path": jax.tree.map(lambda bank, w: bank.at[member].set(w), path, fake)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backtracking:
    """Mixed into a host of the Diff-Instruct family, in front of it: DisBack on that host."""

    # N, the number of recorded networks; the role `path` is a bank of N + 1. About 10 in the
    # paper's SDXL script.
    checkpoints: int = 10
    # I_1, updates of the fake score between two records; the paper's 100
    record_every: int = 100
    # I_2, updates of the fake score for each target; the paper's 1000, or 200 of the student.
    interval: int = 1000
    # Targets below this index in the path are guided; 1: the original teacher only. Uncertain: the
    # released code guides every target, though the recorded networks have learnt the conditional
    # branch alone.
    guided_targets: int = 1_000_000

    frozen = ("teacher", "path")

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """Recording for N I_1 steps, or as many as there are; then the host. Without checkpoints
        the host alone.
        """
        recording = min(self.checkpoints * self.record_every, steps)
        if not recording:
            return (Stage(self, steps, surgery=undegraded),)
        degradation = Recording(host=self, every=self.record_every)
        return (Stage(degradation, recording), Stage(self, steps - recording))

    def target(self, step: Array) -> Array:
        """Index in the path of the real score at a step of stage 2, from N - 1 down to 0.

        A step is one update of the fake score.
        """
        return jnp.maximum(self.checkpoints - 1 - step // self.interval, 0)

    def real(self, net: Nets, xt: Array, t: Array, ctx: Ctx) -> Pred:
        """The prediction of the path's network that is the target at this step (algorithm 2)."""
        index = self.target(ctx.step)
        scale = self.guidance
        if scale != 1.0 and self.guided_targets < self.checkpoints:
            scale = jnp.where(index < self.guided_targets, scale, 1.0)
        target = functools.partial(net.path, member=index)
        cond = ctx.batch.get("cond")
        return guided(target, xt, t, cond, ctx.batch.get("null_cond"), scale)


def undegraded(nets, params, batch):
    """Surgery: a path whose only network is the teacher."""
    return nets, {**params, "path": params["teacher"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisBack(Backtracking, DMD2):
    """On DMD2, as in the released code: for SDXL with guidance 8, GAN weights 5e-3 and 1e-2."""

    gan_weight: float = 5e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisBackDiffInstruct(Backtracking, DiffInstruct):
    """On Diff-Instruct, which the paper compares with: without data, and with five updates of the
    fake score per student update.
    """

    critic_steps: int = 5
