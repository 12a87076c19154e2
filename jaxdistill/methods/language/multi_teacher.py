"""Several teachers for one student: ensembles and specialists (Distilling the Knowledge in a Neural
Network, arXiv:1503.02531).

An ensemble is better than its members and too dear to serve; its averaged law can be taught to one
network. Specialists are each better on a domain of their own: on text whose domain is known the
student learns from the one that knows it.

Both also on what the student writes itself, as GKD (arXiv:2306.13649) has it: EnsembleGKD and
RoutedGKD.

The frozen roles are teacher, teacher1, teacher2, ..., of any sizes and with the student's
vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Ctx, Nets, Out, Refused, lookup
from jaxdistill.methods.language._fields import changing
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import context
from jaxdistill.objectives.divergence import common
from jaxdistill.objectives.pooling import POOLS


def roles(count: int) -> tuple[str, ...]:
    return ("teacher", *(f"teacher{i}" for i in range(1, count)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleKD(KD):
    """The target is the teachers' mixture sum_i w_i softmax(z_i / T) (section 3); one that counts
    nothing is not run.
    """

    weights: tuple[float, ...] = (0.5, 0.5)  # w, which sum to 1; the paper's are equal
    # linear: the arithmetic mean of probabilities | geometric: their geometric mean; the paper
    # names both
    pool: str = "linear"

    unused = {"chunk": "a mixture has no final states"}

    def __post_init__(self):
        super().__post_init__()
        lookup(POOLS, self.pool, "method.pool")
        if not self.weights or min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-6:
            raise Refused(
                f"method.weights={self.weights}: expected one of each teacher, none negative, that sum to 1"
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        return roles(len(self.weights))

    @changing
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        run = lambda call: call(ctx.batch["tokens"], **context(ctx.batch))
        used = [
            (run(getattr(net, role)), weight)
            for role, weight in zip(self.frozen, self.weights)
            if weight
        ]
        laws, weights = zip(*used)
        laws = common(*laws)
        teacher = laws[0]
        if len(laws) > 1:
            teacher = self.temperature * POOLS[self.pool](
                [jax.nn.log_softmax(z / self.temperature) for z in laws], weights
            )
        return self.compare(net, teacher, run(net.student), ctx.batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedKD(KD):
    """Each row learns from the teacher of its batch["domain"] alone. Every teacher reads the whole
    batch.
    """

    routes: tuple[int, ...] = (0, 1)  # the teacher of each domain

    def __post_init__(self):
        super().__post_init__()
        if sorted(set(self.routes)) != list(range(len(set(self.routes)))) or not self.routes:
            raise Refused(
                f"method.routes={self.routes}: expected teachers' numbers, each of 0, 1, ... at least once"
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        return roles(max(self.routes) + 1)

    def check(self, nets, data) -> None:
        super().check(nets, data)
        if "domain" not in data.spec():
            raise Refused(
                f"data: {type(data).__name__} has no domain; expected text of several, as in data.domains"
            )
        if (count := len(getattr(data, "parts", ()))) > len(self.routes):
            raise Refused(
                f"method.routes={self.routes}: the data has {count} domains, expected a teacher for each"
            )

    @changing
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """The sum of KD's losses, each over the rows of one teacher."""
        batch = ctx.batch
        which = jnp.asarray(self.routes)[ctx.batch["domain"]]
        run = lambda call: call(batch["tokens"], hidden_only=self.chunk > 0, **context(batch))
        student = run(net.student)
        outs = []
        for i, role in enumerate(self.frozen):
            call = getattr(net, role)
            rows = {**batch, "mask": batch["mask"] * (which == i)[:, None]}
            outs.append(
                self.compare(Nets(teacher=call, student=net.student), run(call), student, rows)
            )
        total = lambda values: sum(values[1:], values[0])
        metrics = {name: total([out.metrics[name] for out in outs]) for name in outs[0].metrics}
        return Out(
            total([out.loss for out in outs]), metrics, count=total([out.count for out in outs])
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleGKD(EnsembleKD, GKD):
    """GKD whose teacher is the mixture, by `weights`, on given text and on the student's own."""

    kind: str = "jsd"

    unused = {**EnsembleKD.unused, **GKD.unused}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedGKD(RoutedKD, GKD):
    """GKD whose teacher is the one of the row's domain; what the student writes after a prompt has
    the prompt's domain.
    """

    kind: str = "jsd"

    unused = GKD.unused
