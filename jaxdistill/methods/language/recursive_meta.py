"""Recursive Meta-Distillation (arXiv:2601.13100): generations of students, each anchored to the
base teacher.

A generation learns from a meta-teacher: a share gamma of the base teacher, the rest of the students
before it. With gamma > 0 the divergence from the base teacher shrinks by 1 - gamma each generation,
down to a lower limit of what a student cannot fit (eps / gamma); with gamma = 0 (born-again
networks) nothing pulls it back, and errors add up. The first generation learns from the base
teacher alone.

The paper states axioms and no algorithm: the operators, the window and the default of gamma are
choices of this library. Tests of the axioms are those of objectives/pooling.py.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxdistill.core.types import (
    Ctx,
    Nets,
    Out,
    Refused,
    Stage,
    lookup,
    stage_lengths,
)
from jaxdistill.methods.language._fields import teacher_roles
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import targets
from jaxdistill.objectives.divergence import ForwardKL, common, masked_sum
from jaxdistill.objectives.pooling import POOLS, anchored
from jaxdistill.objectives.schedule import follows_schedules
from jaxdistill.surgery.ensemble import gather, split


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecursiveMeta(KD):
    """KD from the meta-teacher of each generation."""

    # number of generations after the first one, S_0
    generations: int = 5
    # the base teacher's share in each generation, the last entry for all later ones; 1: plain KD
    gamma: tuple[float, ...] = (0.3,)
    # mean of base teacher and students: linear (of probabilities) | geometric (of logits)
    pool: str = "linear"
    # weights of the last students, newest first; the window W is their number
    history: tuple[float, ...] = (1.0,)
    # whether each student starts from fresh weights, in place of those of the one before
    restart: bool = True
    # weights of several base teachers, roles teacher, teacher1, teacher2, ...
    teachers: tuple[float, ...] = (1.0,)
    # mean of these teachers, as in `pool`
    teacher_pool: str = "linear"
    # the generation at hand; `stages` sets it
    generation: int = 0

    unused = {"chunk": "a pooled teacher has no hidden states"}

    def __post_init__(self):
        super().__post_init__()
        lookup(POOLS, self.pool, "method.pool")
        lookup(POOLS, self.teacher_pool, "method.teacher_pool")
        if not self.gamma or not all(0 <= g <= 1 for g in self.gamma):
            raise Refused(f"method.gamma={self.gamma}: expected shares from 0 to 1")
        if not self.history or min(self.history) < 0 or not self.history[0] > 0:
            expected = "weights that are not negative, the newest student's above 0"
            raise Refused(f"method.history={self.history}: expected {expected}")

    @property
    def frozen(self) -> tuple[str, ...]:
        return teacher_roles(len(self.teachers))

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """One for each generation, equally long."""
        stages = []
        for generation, length in enumerate(
            stage_lengths(steps, self.generations + 1)
        ):
            method = dataclasses.replace(self, generation=generation)
            surgery = self.promote if generation else None
            stages.append(Stage(method, length, surgery=surgery))
        return tuple(stages)

    def promote(self, nets, params, batch):
        """Surgery: the role teacher becomes (base teacher, newest student, ..., oldest student)."""
        base, *students = split(nets["teacher"], params["teacher"])
        students = [(nets["student"], params["student"]), *students]
        net, weights = gather([base, *students[: len(self.history)]])
        kept = {
            role: p
            for role, p in params.items()
            if role != "student" or not self.restart
        }
        return {**nets, "teacher": net}, {**kept, "teacher": weights}

    @follows_schedules
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """D(sg[M_g] || S_g); the metric base_kl is the divergence from the base teacher."""
        batch = ctx.batch
        base = self.outputs(net.teacher, batch)
        students = ()
        if self.generation:
            base, *students = base
        bases = [
            base,
            *(self.outputs(getattr(net, role), batch) for role in self.frozen[1:]),
        ]
        student, *teachers = common(
            self.outputs(net.student, batch), *bases, *students
        )
        log_p = [jax.nn.log_softmax(logits) for logits in teachers]
        log_bases = log_p[: len(bases)]
        log_students = log_p[len(bases) :]

        base = POOLS[self.teacher_pool](log_bases, self.teachers)
        meta = base
        if self.generation:
            gamma = self.gamma[min(self.generation, len(self.gamma)) - 1]
            meta = anchored(POOLS[self.pool], gamma, self.history)(
                base, log_students
            )
        out = self.compare(net, meta, student, batch)
        base_kl, _ = masked_sum(ForwardKL()(base, student), targets(batch)[1])
        return out._replace(metrics={**out.metrics, "base_kl": base_kl})
