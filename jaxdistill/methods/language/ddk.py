"""DDK - Distilling Domain Knowledge for Efficient Large Language Models (arXiv:2407.16154).

A student lags behind its teacher by very different amounts in different domains. Every `interval`
steps the ratio of their perplexities on fixed held-out rows of each domain is measured, and the
next interval's data are drawn in proportion to a smoothed softmax of these ratios. The loss is
cross-entropy with a little forward KL.

The data set is a `data.domains:Domains` of the same `interval` and `measures`, whose batches at the
measuring steps are held-out rows, as many of each domain. A measurement reaches the data with the
next line of the log: for it to be in time, `log_every` divides both `interval` and `measures`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdistill.core.types import Array, Batch, Controller, Ctx, Nets, Out, Refused, Turn
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import context, targets
from jaxdistill.objectives.divergence import masked_sum
from jaxdistill.objectives.mixture import discrepancy, refresh


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDK(KD):
    domains: int  # N; the paper's 10
    # K: training steps between measurements; a few percent of the run (50 was worse than uniform)
    interval: int = 1000
    measures: int = (
        1  # batches of held-out rows in a measurement; the paper's 500 rows of each domain
    )
    smoothing: float = 0.5  # alpha of eq. 2; 0: uniform weights, 1: no floor
    gamma: float = (
        0.2  # of the forward KL beside cross-entropy 1; no T^2 (set gamma = 0.2 T^2 for it)
    )
    # whether r_0 (eq. 1) draws the first interval; the paper's text: the corpus as it stands
    use_r0: bool = False

    unused = {"hard_weight": "cross-entropy weighs 1 and the divergence method.gamma"}

    def __post_init__(self):
        super().__post_init__()
        for name in ("domains", "interval", "measures"):
            if getattr(self, name) < 1:
                raise Refused(f"method.{name}={getattr(self, name)}: expected a positive integer")
        if not 0 <= self.smoothing <= 1:
            raise Refused(f"method.smoothing={self.smoothing}: expected 0 to 1")

    def check(self, nets, data) -> None:
        """Raises Refused where the data's measuring steps or domains are others, so that held-out
        rows would be trained on.
        """
        super().check(nets, data)
        found = {
            "interval": getattr(data, "interval", 0),
            "measures": getattr(data, "measures", 0),
            "domains": len(getattr(data, "parts", ())),
        }
        for name, value in found.items():
            if value != getattr(self, name):
                raise Refused(
                    f"method.{name}={getattr(self, name)}: the data ({type(data).__name__}) has {value}, expected the same"
                )
        data.check_method(self)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Training, and measuring: the first one, which the teacher shares, and the last batch of
        each, which reports.
        """
        at = lambda case: lambda step: self.phase(step) == case
        cases = [(first, last) for first in (True, False) for last in (True, False)]
        make = lambda first, last: (
            functools.partial(self.measured, last),
            at((first, last)),
            functools.partial(self.measure, first),
        )
        return (
            Turn(("student",), self.loss, when=at(None)),
            *(Turn((), *make(*case)) for case in cases),
        )

    def phase(self, step: int) -> tuple[bool, bool] | None:
        """(first measurement?, its last batch?) at a measuring step; None at a training step."""
        within = step % (self.interval + self.measures)
        return (
            (step < self.measures, within == self.measures - 1) if within < self.measures else None
        )

    def memory(self) -> dict[str, Any]:
        """Sums of -log q and numbers of tokens, [2 N]: of the measurement under way, and the
        teacher's of the first.
        """
        return {role: jnp.zeros((2, self.domains)) for role in ("student", "teacher")}

    def measure(self, first: bool, net: Nets, ctx: Ctx) -> Batch:
        """The domains' sums so far, this whole batch included, in every row: float32 [B 2 N] for
        both roles.
        """
        sums = dict(ctx.memory)
        for role in ("student", "teacher") if first else ("student",):
            sums[role] = sums[role] + self.tally(getattr(net, role), ctx.batch)
        return {
            role: jnp.broadcast_to(total, (len(ctx.batch["tokens"]), *total.shape))
            for role, total in sums.items()
        }

    def tally(self, call, batch: Batch) -> Array:
        """(sum of -log q, number of tokens) of each domain's held-out targets, float32 [2 N]."""
        states = call(batch["tokens"], hidden_only=self.chunk > 0, **context(batch))
        labels, mask = targets(batch)
        each = self.hard(states, labels, call(method="head") if self.chunk else None)
        held = mask & (batch["heldout"] > 0)[:, None]
        mine = lambda i: jnp.stack(masked_sum(each, held & (batch["domain"] == i)[:, None]))
        return jnp.stack([mine(i) for i in range(self.domains)], 1)

    def measured(self, last: bool, net: Nets, ctx: Ctx) -> Out:
        """Remembers the sums; the last batch of a measurement makes ratios of perplexities of them,
        and room for the next.
        """
        student = ctx.batch["student"][0]
        teacher = ctx.batch["teacher"][0]
        if not last:
            return Out(jnp.zeros(()), memory={"student": student, "teacher": teacher})
        ratio = jnp.exp(student[0] / student[1] - teacher[0] / teacher[1])
        metrics = {f"ratio{i}": ratio[i] for i in range(self.domains)}
        return Out(jnp.zeros(()), metrics, {"student": jnp.zeros_like(student), "teacher": teacher})

    def compare(self, net, teacher, student, batch) -> Out:
        """CE + gamma KL(teacher || student) (eq. 3), both over all target tokens, whatever their
        domain.
        """
        out = super().compare(net, teacher, student, batch)
        kl = out.metrics["divergence"] / self.temperature**2
        return out._replace(loss=out.metrics["cross_entropy"] + self.gamma * kl)

    def controller(self) -> Controller:
        return Mixture(self.domains, self.smoothing, self.use_r0)


class Mixture(Controller):
    """Domain weights r: r_0 by eq. 1 from the first measurement, then eq. 2 from each that follows."""

    def __init__(self, domains: int, smoothing: float, use_r0: bool):
        self.domains = domains
        self.smoothing = smoothing
        self.use_r0 = use_r0
        self.weights: list[float] | None = None  # r of the interval under way
        self.measured = 0

    def update(self, metrics: Mapping[str, float]) -> Mapping[str, Any]:
        if "measured/ratio0" not in metrics:
            return {}
        ratio = np.array([metrics[f"measured/ratio{i}"] for i in range(self.domains)])
        first = self.weights is None
        self.weights = (
            discrepancy(ratio) if first else refresh(self.weights, ratio, self.smoothing)
        ).tolist()
        self.measured += 1
        return {} if first and not self.use_r0 else {"weights": tuple(self.weights)}

    def state(self):
        return {"weights": self.weights, "measured": self.measured}

    def restore(self, state):
        self.weights = state["weights"]
        self.measured = state["measured"]
