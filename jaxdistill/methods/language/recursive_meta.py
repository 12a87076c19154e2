"""Recursive Meta-Distillation (arXiv:2601.13100): generations of students, each held to the base
teacher.

A generation learns from a meta-teacher: a share gamma of the base teacher, the rest of the students
before it. With gamma > 0 its divergence from the base teacher shrinks by 1 - gamma each generation,
down to a floor of what a student cannot fit (eps / gamma); with gamma = 0 (born-again networks)
nothing pulls it back, and errors add up.

The first generation learns from the base teacher alone. The paper names axioms and no algorithm;
operators, the window and the default gamma are those of the specification, tests of the axioms are
in objectives/pooling.py.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxdistill.core.types import Ctx, Nets, Out, Refused, Stage, lookup
from jaxdistill.methods.language._fields import changing
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import context, targets
from jaxdistill.objectives.divergence import common, forward_kl, masked_sum
from jaxdistill.objectives.pooling import POOLS, anchored
from jaxdistill.surgery.ensemble import gather, split


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecursiveMeta(KD):
    generations: int = 5  # after the first, S_0
    gamma: tuple[float, ...] = (
        0.3,
    )  # the base's share in each generation, the last one for all later; 0.3 to 0.5, 1: plain KD
    pool: str = "linear"  # linear: probabilities are mixed | geometric: logits
    history: tuple[float, ...] = (
        1.0,
    )  # weights of the last students, newest first; the window W is their number
    restart: bool = True  # each student from fresh weights rather than from the one before
    teachers: tuple[float, ...] = (
        1.0,
    )  # weights of several base teachers: roles teacher, teacher1, teacher2, ...
    teacher_pool: str = "linear"  # how these are made one
    generation: int = 0  # which one a stage trains; set by `stages`

    unused = {"chunk": "a pooled teacher has no hidden states"}

    def __post_init__(self):
        super().__post_init__()
        (
            lookup(POOLS, self.pool, "method.pool"),
            lookup(POOLS, self.teacher_pool, "method.teacher_pool"),
        )
        if not self.gamma or not all(0 <= g <= 1 for g in self.gamma):
            raise Refused(f"method.gamma={self.gamma}: expected shares from 0 to 1")
        if not self.history or min(self.history) < 0 or not self.history[0] > 0:
            raise Refused(
                f"method.history={self.history}: expected weights that are not negative, the newest student's above 0"
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("teacher", *(f"teacher{i}" for i in range(1, len(self.teachers))))

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """One for each generation, equally long."""
        count = self.generations + 1
        lengths = [(steps + i) // count for i in reversed(range(count))]
        make = lambda g: dataclasses.replace(self, generation=g)
        return tuple(
            Stage(make(g), lengths[g], surgery=self.promote if g else None) for g in range(count)
        )

    def promote(self, nets, params, batch):
        """Surgery: the last student joins the teacher, as (base, newest, ..., oldest of the
        window).
        """
        base, *before = split(nets["teacher"], params["teacher"])
        window = [(nets["student"], params["student"]), *before][: len(self.history)]
        net, weights = gather([base, *window])
        kept = {role: p for role, p in params.items() if role != "student" or not self.restart}
        return {**nets, "teacher": net}, {**kept, "teacher": weights}

    @changing
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """D(sg[M_g] || S), and the divergence from the base teacher itself."""
        run = lambda call: call(ctx.batch["tokens"], **context(ctx.batch))
        first, *students = run(net.teacher) if self.generation else (run(net.teacher),)
        student = run(net.student)
        law = jax.nn.log_softmax
        others = [run(getattr(net, role)) for role in self.frozen[1:]]
        student, first, *rest = common(student, first, *others, *students)
        others, students = rest[: len(others)], rest[len(others) :]
        base = POOLS[self.teacher_pool]([law(z) for z in (first, *others)], self.teachers)
        meta = base
        if self.generation:
            gamma = self.gamma[min(self.generation, len(self.gamma)) - 1]
            meta = anchored(POOLS[self.pool], gamma, self.history)(base, [law(z) for z in students])
        out = self.compare(net, meta, student, ctx.batch)
        drift, _ = masked_sum(forward_kl(base, student), targets(ctx.batch)[1])
        return out._replace(metrics={**out.metrics, "base_kl": drift})
