"""PACED - Distillation at the frontier of student competence (arXiv:2603.11178).

Problems that the student always solves give no gradient, and those far beyond it gradients that do
not agree. So each problem is weighted by p (1 - p), p the pass rate of the student's own attempts,
whatever the divergence. Forward KL comes first, on the teacher's responses, to cover its modes;
then reverse KL, on the student's own, to consolidate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.core.fields import Limit
from jaxdistill.core.net import Net, materialise
from jaxdistill.core.types import Array, Batch, Collect, Ctx, Nets, Out, Params, Refused, Stage
from jaxdistill.methods.language._fields import changing
from jaxdistill.methods.language._rollout import solved_first
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.models.language.lm import common_vocabulary, context, targets
from jaxdistill.objectives.divergence import sequence_mean
from jaxdistill.objectives.pacing import beta_kernel, signal_to_noise_by_bin
from jaxdistill.objectives.reward import Exact

REFERENCES = ("teacher", "student", "dataset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paced(GKD):
    """Every stage measures its pool of problems anew, leaves out those of weight 0
    (data.arrayrecord.stored) and trains on
    the rest. Stage lengths, K, the references and that pass rates stay fixed within a stage are
    readings of the abstract and of surveys, not the paper's text.
    """

    reward: Any = Exact()  # of objectives.reward: the verifier
    success: float = 0.5  # reward from which an attempt has passed
    attempts: int = 8  # K, of the student at a problem
    batches: int = 1000  # of data.batch_size problems that make the pool of a stage
    a: float = 1.0  # exponent of p; a > b prefers easier problems
    b: float = 1.0  # exponent of 1 - p; a = b = 0: plain distillation
    most: Limit = float("inf")  # cap on a weight; their mean is 1
    kinds: tuple[str, ...] = ("forward_kl", "reverse_kl")  # divergence of each stage
    references: tuple[str, ...] = (
        "teacher",
        "student",
    )  # who writes each stage's responses: teacher | student | dataset
    kind: str = "forward_kl"  # of the stage at hand
    reference: str = "teacher"

    unused = {
        "hard_weight": "no term has the data's tokens",
        "on_policy": "method.references say who writes",
    }

    def __post_init__(self):
        super().__post_init__()
        if len(self.kinds) != len(self.references) or not self.kinds:
            raise Refused(
                f"method.kinds={self.kinds} and method.references={self.references}: expected one of each for every stage"
            )
        for name in (*self.references, self.reference):
            if name not in REFERENCES:
                raise Refused(f"method.references: {name!r}, expected teacher, student or dataset")
        if self.attempts < 1 or min(self.a, self.b) < 0:
            raise Refused(
                f"method.attempts={self.attempts}, a={self.a}, b={self.b}: expected at least 1, 0 and 0"
            )

    @property
    def options(self):
        return super().options if self.kind == "jsd" else self.params or {}

    def writes(self, step: int) -> bool:
        return self.reference == "student"

    def stages(self, steps):
        """One for each divergence, equally long."""
        lengths = [(steps + i) // len(self.kinds) for i in reversed(range(len(self.kinds)))]
        make = lambda i: dataclasses.replace(self, kind=self.kinds[i], reference=self.references[i])
        return tuple(
            Stage(
                make(i),
                length,
                surgery=None if i else self.begin,
                collect=Collect(make(i).measure, self.batches),
            )
            for i, length in enumerate(lengths)
        )

    def measure(self, net: Nets, ctx: Ctx) -> Batch:
        """The problems with `pass_rate` and `worth` [B], and the responses that the stage learns
        from where they are fixed.
        """
        score, failed = self.reward(
            self.write(net.student, ctx, "try", self.attempts, common_vocabulary(net))
        )
        rate, failed = (
            jnp.mean(x.reshape(-1, self.attempts), 1) for x in (score >= self.success, failed)
        )
        batch = (
            self.write(net.teacher, ctx, "teach", vocab=common_vocabulary(net))
            if self.reference == "teacher"
            else ctx.batch
        )
        return {**batch, "pass_rate": rate, "failed": failed, "worth": self.worth(rate)}

    def worth(self, rate: Array) -> Array:
        """w(p), up to a factor."""
        return beta_kernel(rate, self.a, self.b)

    def compare(self, net: Nets, teacher: Array, student: Array, batch: Batch) -> Out:
        """(1/B) sum of weight times the response's mean divergence; a batch that no pool has
        weighted counts evenly.
        """
        _, mask = targets(batch)
        heads = (
            (net.teacher(method="head"), net.student(method="head")) if self.chunk else (None, None)
        )
        each = sequence_mean(self.soft(teacher, student, *heads), mask)
        weight = jax.lax.stop_gradient(
            jnp.minimum(batch.get("weight", jnp.ones_like(each)), self.most)
        )
        metrics = {"divergence": jnp.sum(each), "weight": jnp.sum(weight)}
        metrics |= {name: jnp.sum(batch[name]) for name in ("pass_rate", "failed") if name in batch}
        return Out(jnp.sum(weight * each), metrics, count=jnp.float32(len(each)))

    def begin(self, nets, params, batch):
        """Surgery: a student without weights of its own begins with random ones, since it has to be
        measured first.
        """
        return nets, params if "student" in params else {
            **params,
            "student": nets["student"].init(jax.random.key(0)),
        }

    def snr(
        self, nets: dict[str, Net], params: dict[str, Params], batch: Batch, bins: int = 5
    ) -> tuple[Array, Array]:
        """(signal to noise [bins] of the problems' unweighted gradients by their pass rate,
        problems in each bin [bins]), of a batch that `measure` has made, with the responses that
        the loss is of.
        """

        def loss(weights, row):
            bound = Nets(
                **{
                    role: net.bind(role, {**params, "student": weights})
                    for role, net in nets.items()
                }
            )
            one = {name: x[None] for name, x in row.items() if name != "weight"}
            return self.loss(bound, Ctx(one, jax.random.key(0), jnp.int32(0), {})).loss

        return signal_to_noise_by_bin(
            lambda row: jax.grad(loss)(params["student"], row), batch, batch["pass_rate"], bins
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfPaced(Paced):
    """On-policy self-distillation: the teacher is the model as it was, shown the data's own
    solution of a problem before it is asked how the student's response to the same problem goes on.
    The student starts from it, and never sees a solution.
    """

    kinds: tuple[str, ...] = ("reverse_kl",)  # Qwen2.5-Math-7B-Instruct
    references: tuple[str, ...] = ("student",)
    kind: str = "reverse_kl"
    reference: str = "student"

    inits = {"student": "teacher"}

    def __post_init__(self):
        super().__post_init__()
        if set(self.references) != {"student"}:
            raise Refused(
                f"method.references={self.references}: expected 'student', for a teacher that has read the solution copies it"
            )

    def begin(self, nets, params, batch):
        """Surgery: a student without weights of its own begins as the teacher."""
        own = {} if nets["student"].adapts else {"student": materialise(params["teacher"])}
        return super().begin(nets, {**own, **params}, batch)

    @changing
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """`Paced`'s, where the teacher's law of a token is the one after solved problem, problem
        and response so far.
        """
        shown = solved_first(ctx.batch, self.prompt_length)
        length = ctx.batch["tokens"].shape[1]
        run = lambda call, batch: call(
            batch["tokens"], hidden_only=self.chunk > 0, **context(batch)
        )
        return self.compare(
            net, run(net.teacher, shown)[:, -length:], run(net.student, ctx.batch), ctx.batch
        )
