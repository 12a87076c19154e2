"""Several teachers for one student: ensembles and specialists (Distilling the Knowledge in a Neural
Network, arXiv:1503.02531).

An ensemble is better than its members and too expensive to serve; its averaged distribution can be
taught to one network. Specialists are each better on a domain of their own: on text whose domain is
known the student learns from that domain's specialist. EnsembleGKD and RoutedGKD do both also on
the student's own responses, as GKD (arXiv:2306.13649) does.

The frozen roles are teacher, teacher1, teacher2, ..., of any sizes and with the student's
vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Int

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Ctx, Nets, Out, Refused, lookup
from jaxdistill.methods.language._fields import TEXT, teacher_roles
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.kd import KD
from jaxdistill.objectives.divergence import Divergence, JensenShannon, common
from jaxdistill.objectives.pooling import POOLS
from jaxdistill.objectives.schedule import follows_schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleKD(KD):
    """The target is the mixture of the teachers, sum_i w_i softmax(z_i / T) (section 3).

    A teacher of weight 0 is not run.
    """

    # w, one for each teacher, with the sum 1; the paper's are equal
    weights: tuple[float, ...] = (0.5, 0.5)
    # mean of the teachers' probabilities: linear (arithmetic) | geometric; the paper names both
    pool: str = "linear"

    unused = {"chunk": "a mixture has no final hidden states"}

    def __post_init__(self):
        super().__post_init__()
        lookup(POOLS, self.pool, "method.pool")
        if (
            not self.weights
            or min(self.weights) < 0
            or abs(sum(self.weights) - 1) > 1e-6
        ):
            expected = "one of each teacher, none negative, that sum to 1"
            raise Refused(f"method.weights={self.weights}: expected {expected}")

    @property
    def frozen(self) -> tuple[str, ...]:
        return teacher_roles(len(self.weights))

    @follows_schedules
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        used = {
            role: weight
            for role, weight in zip(self.frozen, self.weights)
            if weight
        }
        logits = [self.outputs(getattr(net, role), ctx.batch) for role in used]
        logits = common(*logits)
        teacher = logits[0]
        if len(logits) > 1:
            log_p = [jax.nn.log_softmax(z / self.temperature) for z in logits]
            teacher = self.temperature * POOLS[self.pool](
                log_p, tuple(used.values())
            )
        student = self.outputs(net.student, ctx.batch)
        return self.compare(net, teacher, student, ctx.batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedKD(KD):
    """Each sample learns from the teacher of its domain alone; every teacher reads the batch."""

    # number of the teacher of each domain: 0 is `teacher`, 1 `teacher1`, ...
    routes: tuple[int, ...] = (0, 1)

    needs = {**TEXT, "domain": Int[Spec, " B"]}

    def __post_init__(self):
        super().__post_init__()
        teachers = sorted(set(self.routes))
        if not self.routes or teachers != list(range(len(teachers))):
            expected = "teachers' numbers, each of 0, 1, ... at least once"
            raise Refused(f"method.routes={self.routes}: expected {expected}")

    @property
    def frozen(self) -> tuple[str, ...]:
        return teacher_roles(max(self.routes) + 1)

    def check(self, nets, data) -> None:
        super().check(nets, data)
        domains = len(getattr(data, "parts", ()))
        if domains > len(self.routes):
            found = f"the data has {domains} domains"
            raise Refused(
                f"method.routes={self.routes}: {found}, expected a teacher for each"
            )

    @follows_schedules
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """The sum of the losses of `KD`, each over the samples of one teacher."""
        batch = ctx.batch
        number = jnp.asarray(self.routes)[batch["domain"]]
        student = self.outputs(net.student, batch)
        loss = 0
        metrics = {"divergence": 0, "cross_entropy": 0}
        count = 0
        for i, role in enumerate(self.frozen):
            pair = Nets(teacher=getattr(net, role), student=net.student)
            of_teacher = {**batch, "mask": batch["mask"] * (number == i)[:, None]}
            teacher = self.outputs(pair.teacher, batch)
            out = self.compare(pair, teacher, student, of_teacher)
            loss = loss + out.loss
            metrics = {
                name: value + out.metrics[name] for name, value in metrics.items()
            }
            count = count + out.count
        return Out(loss, metrics, count=count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleGKD(EnsembleKD, GKD):
    """GKD whose teacher is the mixture, on given text and on the student's own responses."""

    divergence: Divergence = JensenShannon(beta=0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedGKD(RoutedKD, GKD):
    """GKD whose teacher is that of the sample's domain; a response has its prompt's domain."""

    divergence: Divergence = JensenShannon(beta=0.5)
