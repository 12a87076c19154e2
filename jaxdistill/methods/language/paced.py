"""PACED - Distillation at the frontier of student competence (arXiv:2603.11178).

Problems that the student always solves give no gradient, and problems far beyond it give gradients
that disagree. So each problem has the weight p (1 - p), p being the pass rate of the student's own
attempts. Forward KL on the teacher's responses comes first, to cover the teacher's modes; then
reverse KL on the student's own responses, to consolidate.

Readings of the abstract and of surveys, not of the paper's text: the lengths of the stages, K, who
writes the responses, and that pass rates stay fixed within a stage.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.fields import Limit
from jaxdistill.core.net import Net, materialise
from jaxdistill.core.types import (
    Array,
    Batch,
    Collect,
    Ctx,
    Nets,
    Out,
    Params,
    Refused,
    Stage,
    stage_lengths,
)
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.models.language.lm import common_vocabulary, targets
from jaxdistill.objectives.divergence import (
    Divergence,
    ForwardKL,
    ReverseKL,
    from_kinds,
    sequence_mean,
)
from jaxdistill.objectives.pacing import beta_kernel, signal_to_noise_by_bin
from jaxdistill.objectives.reward import Exact
from jaxdistill.objectives.schedule import follows_schedules
from jaxdistill.samplers.prompts import solution_first

REFERENCES = ("teacher", "student", "dataset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paced(GKD):
    """Before every stage the student attempts a pool of problems; those of weight 0 are left out
    (data.arrayrecord.stored), and the stage trains on the rest.
    """

    # verifier, of objectives.reward
    reward: Any = Exact()
    # reward from which on an attempt has passed
    success: float = 0.5
    # K: the student's attempts at a problem
    attempts: int = 8
    # size of the pool, in batches of data.batch_size problems
    batches: int = 1000
    # exponent of p; a > b prefers easier problems
    a: float = 1.0
    # exponent of 1 - p; with a = b = 0 it is plain distillation
    b: float = 1.0
    # upper limit of a weight; the mean of the weights is 1
    most: Limit = float("inf")
    # divergence of each stage
    divergences: tuple[Divergence, ...] = (ForwardKL(), ReverseKL())
    # who writes the responses of each stage: teacher | student | dataset
    references: tuple[str, ...] = ("teacher", "student")
    # divergence and writer of the stage at hand; `stages` sets them
    divergence: Divergence = ForwardKL()
    reference: str = "teacher"

    renamed = {**GKD.renamed, "kinds": "divergences"}
    unused = {
        "hard_weight": "no term has the data's tokens",
        "on_policy": "method.references say who writes",
    }

    def __post_init__(self):
        super().__post_init__()
        if len(self.divergences) != len(self.references) or not self.divergences:
            given = f"method.divergences={self.divergences}, method.references={self.references}"
            raise Refused(f"{given}: expected one of each for every stage")
        for name in (*self.references, self.reference):
            if name not in REFERENCES:
                raise Refused(
                    f"method.references: {name!r}, expected teacher, student or dataset"
                )
        if self.attempts < 1 or min(self.a, self.b) < 0:
            given = f"method.attempts={self.attempts}, a={self.a}, b={self.b}"
            raise Refused(f"{given}: expected at least 1, 0 and 0")

    @classmethod
    def upgraded(cls, given):
        """Also `kinds` of version 0.1, whose "jsd" had the method's `beta`, as divergences."""
        return super().upgraded(from_kinds(given))

    def is_on_policy(self, step: int) -> bool:
        return self.reference == "student"

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """One for each divergence, equally long."""
        stages = []
        for i, length in enumerate(stage_lengths(steps, len(self.divergences))):
            own = {
                "divergence": self.divergences[i],
                "reference": self.references[i],
            }
            method = dataclasses.replace(self, **own)
            surgery = None if i else self.initialise_student
            collect = Collect(method.measure, self.batches)
            stages.append(Stage(method, length, surgery=surgery, collect=collect))
        return tuple(stages)

    def initialise_student(self, nets, params, batch):
        """Surgery: the student gets random weights where it has none, as it is measured first."""
        if "student" in params:
            return nets, params
        return nets, {**params, "student": nets["student"].init(jax.random.key(0))}

    def measure(self, net: Nets, ctx: Ctx) -> Batch:
        """The problems with pass_rate and worth, float32 [B].

        Where the teacher writes the stage's responses, these are in the places of the data's.
        """
        vocab = common_vocabulary(net)
        score, failed = self.reward(
            self.write(net.student, ctx, "try", self.attempts, vocab)
        )
        passed = (score >= self.success).reshape(-1, self.attempts)
        pass_rate = jnp.mean(passed, 1)
        failed = jnp.mean(failed.reshape(-1, self.attempts), 1)
        batch = ctx.batch
        if self.reference == "teacher":
            batch = self.write(net.teacher, ctx, "teach", vocab=vocab)
        worth = self.worth(pass_rate)
        return {**batch, "pass_rate": pass_rate, "failed": failed, "worth": worth}

    def worth(self, pass_rate: Float[Array, " B"]) -> Float[Array, " B"]:
        """w(p) = p^a (1 - p)^b, up to a factor."""
        return beta_kernel(pass_rate, self.a, self.b)

    def compare(self, net, teacher, student, batch) -> Out:
        """(1/B) times the sum of each problem's weight times its response's mean divergence.

        All weights are 1 in a batch that comes from no pool.
        """
        _, mask = targets(batch)
        each = sequence_mean(self.soft(teacher, student, *self.heads(net)), mask)
        weight = jnp.minimum(batch.get("weight", jnp.ones_like(each)), self.most)
        weight = jax.lax.stop_gradient(weight)
        metrics = {"divergence": jnp.sum(each), "weight": jnp.sum(weight)}
        metrics |= {
            name: jnp.sum(batch[name])
            for name in ("pass_rate", "failed")
            if name in batch
        }
        return Out(jnp.sum(weight * each), metrics, count=jnp.float32(len(each)))

    def snr(
        self,
        nets: dict[str, Net],
        params: dict[str, Params],
        batch: Batch,
        bins: int = 5,
    ) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
        """Signal to noise of the problems' gradients, by their pass rate.

        Args:
          batch: as `measure` makes it, with the responses that the loss is of.

        Returns:
          (signal to noise of the unweighted gradients, number of problems) of each bin.
        """

        def loss(student, problem):
            weights = {**params, "student": student}
            bound = Nets(
                **{role: net.bind(role, weights) for role, net in nets.items()}
            )
            one = {name: x[None] for name, x in problem.items() if name != "weight"}
            return self.loss(
                bound, Ctx(one, jax.random.key(0), jnp.int32(0), {})
            ).loss

        def gradient(problem):
            return jax.grad(loss)(params["student"], problem)

        return signal_to_noise_by_bin(gradient, batch, batch["pass_rate"], bins)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfPaced(Paced):
    """On-policy self-distillation: the teacher is the model as it was, and reads the data's own
    solution of a problem before it judges the student's response to the same problem.

    The student starts as the teacher and never reads a solution.
    """

    # the paper's, for Qwen2.5-Math-7B-Instruct
    divergences: tuple[Divergence, ...] = (ReverseKL(),)
    references: tuple[str, ...] = ("student",)
    divergence: Divergence = ReverseKL()
    reference: str = "student"

    inits = {"student": "teacher"}

    def __post_init__(self):
        super().__post_init__()
        if set(self.references) != {"student"}:
            reason = "a teacher that has read the solution copies it"
            raise Refused(
                f"method.references={self.references}: expected 'student', for {reason}"
            )

    def initialise_student(self, nets, params, batch):
        """Surgery: a student without weights of its own starts as the teacher."""
        if "student" not in params and not nets["student"].adapts:
            params = {**params, "student": materialise(params["teacher"])}
        return super().initialise_student(nets, params, batch)

    @follows_schedules
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """The loss of `Paced`; the teacher's distributions are those after problem, solution,
        problem again, and the response so far.
        """
        length = ctx.batch["tokens"].shape[1]
        shown = solution_first(ctx.batch, self.prompt_length)
        teacher = self.outputs(net.teacher, shown)[:, -length:]
        student = self.outputs(net.student, ctx.batch)
        return self.compare(net, teacher, student, ctx.batch)
