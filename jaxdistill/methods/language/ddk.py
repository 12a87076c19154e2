"""DDK - Distilling Domain Knowledge for Efficient Large Language Models (arXiv:2407.16154).

How far a student lags behind its teacher differs strongly between domains. DDK measures, every
`interval` training steps, the ratio of their perplexities on fixed held-out text of each domain,
and draws the next training data in proportion to weights r made of these ratios:

    r_0 = softmax(ratio)                                                         (eq. 1)
    r_t+1 = alpha psi / sum(psi) + (1 - alpha) / N,   psi = r_t exp(ratio)       (eq. 2)
    L = CE(student, y) + gamma KL(teacher || student)                            (eq. 3)

A cycle is `measures` steps that measure, then `interval` steps that train. The data set is a
`data.domains:Domains` with the same two numbers: at the measuring steps its batches are held-out
text, equally much of each domain. The ratios reach `DomainWeights` with the next line of the log;
`log_every` must divide both numbers, so that they do before the interval begins.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import (
    Array,
    Batch,
    Controller,
    Ctx,
    Nets,
    Out,
    Refused,
    Turn,
)
from jaxdistill.methods.language._fields import TEXT
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import targets
from jaxdistill.objectives.divergence import masked_sum
from jaxdistill.objectives.mixture import discrepancy, refresh


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDK(KD):
    """Continued pre-training with a little KL and domains weighted by the student's lag."""

    domains: int  # N; the paper's 10
    # K: training steps between measurements; the paper's 1000, a few percent of the run
    interval: int = 1000
    # steps of a measurement, a held-out batch each; the paper's 500 sequences of each domain
    measures: int = 1
    # alpha of eq. 2; the paper's 0.5; 0: uniform weights, 1: no lower bound of a weight
    smoothing: float = 0.5
    # gamma, weight of the KL; the paper's 0.2. The KL has no factor T^2
    gamma: float = 0.2
    # whether r_0 draws the first interval's data; in the paper these come as the corpus has them
    use_r0: bool = False

    needs = {**TEXT, "domain": Int[Spec, " B"], "heldout": Shaped[Spec, " B"]}
    unused = {
        "hard_weight": "cross-entropy weighs 1 and the divergence method.gamma"
    }

    def __post_init__(self):
        super().__post_init__()
        for name in ("domains", "interval", "measures"):
            if getattr(self, name) < 1:
                raise Refused(
                    f"method.{name}={getattr(self, name)}: expected a positive integer"
                )
        if not 0 <= self.smoothing <= 1:
            raise Refused(f"method.smoothing={self.smoothing}: expected 0 to 1")

    def check(self, nets, data) -> None:
        """Raises Refused unless the data set measures at the same steps and has as many domains."""
        super().check(nets, data)
        found = {
            "interval": getattr(data, "interval", 0),
            "measures": getattr(data, "measures", 0),
            "domains": len(getattr(data, "parts", ())),
        }
        for name, value in found.items():
            own = getattr(self, name)
            if value != own:
                given = f"method.{name}={own}: the data ({type(data).__name__})"
                raise Refused(f"{given} has {value}, expected the same")
        data.check_method(self)

    @property
    def cycle(self) -> int:
        """A measurement and one update of the student.

        Later measurements have turns of their own, which only leave out the teacher.
        """
        return self.measures + 1

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(("student",), self.loss, when=self.is_training),
            self.measuring_turn(first=True, last=True),
            self.measuring_turn(first=True, last=False),
            self.measuring_turn(first=False, last=True),
            self.measuring_turn(first=False, last=False),
        )

    def step_of_cycle(self, step: int) -> int:
        """0 to measures - 1 at steps that measure, measures and above at steps that train."""
        return step % (self.measures + self.interval)

    def is_training(self, step: int) -> bool:
        return self.step_of_cycle(step) >= self.measures

    def compare(self, net, teacher, student, batch) -> Out:
        """Eq. 3; both terms are means over all target tokens, whatever their domain."""
        out = super().compare(net, teacher, student, batch)
        kl = out.metrics["divergence"] / self.temperature**2
        return out._replace(loss=out.metrics["cross_entropy"] + self.gamma * kl)

    def measuring_turn(self, first: bool, last: bool) -> Turn:
        """The turn of one batch of a measurement, which moves no role.

        Args:
          first: whether it is the first measurement, the only one that runs the teacher too, since
            the teacher's perplexities do not change.
          last: whether it is a measurement's last batch, which reports the ratios.
        """

        def when(step: int) -> bool:
            is_first = step < self.measures
            is_last = self.step_of_cycle(step) == self.measures - 1
            return not self.is_training(step) and (is_first, is_last) == (
                first,
                last,
            )

        roles = ("student", "teacher") if first else ("student",)
        gather = functools.partial(self.add_batch, roles)
        return Turn(
            (), self.report if last else self.remember, when=when, gather=gather
        )

    def memory(self) -> dict[str, Any]:
        """role -> (sum of -log q, number of tokens) of each domain, float32 [2 N].

        The student's are those of the current measurement, the teacher's those of the first one.
        """
        return {
            role: jnp.zeros((2, self.domains)) for role in ("student", "teacher")
        }

    def add_batch(self, roles: tuple[str, ...], net: Nets, ctx: Ctx) -> Batch:
        """The sums in the memory, with this batch's added for `roles`.

        They have equal entries along the batch axis, float32 [B 2 N]: a `gather` returns a batch.
        """
        sums = dict(ctx.memory)
        for role in roles:
            sums[role] = sums[role] + self.domain_sums(
                getattr(net, role), ctx.batch
            )
        size = len(ctx.batch["tokens"])
        return {
            role: jnp.broadcast_to(total, (size, *total.shape))
            for role, total in sums.items()
        }

    def domain_sums(self, call: Callable, batch: Batch) -> Float[Array, "2 N"]:
        """Sum of -log q, and number of tokens, of each domain's held-out targets."""
        labels, mask = targets(batch)
        head = call(method="unembedding") if self.chunk else None
        nll = self.hard(self.outputs(call, batch), labels, head)
        heldout = mask & (batch["heldout"] > 0)[:, None]
        sums = []
        for domain in range(self.domains):
            of_domain = (batch["domain"] == domain)[:, None]
            sums.append(jnp.stack(masked_sum(nll, heldout & of_domain)))
        return jnp.stack(sums, 1)

    def remember(self, net: Nets, ctx: Ctx) -> Out:
        """Writes the sums of `add_batch` to the memory."""
        sums = {role: ctx.batch[role][0] for role in ("student", "teacher")}
        return Out(jnp.zeros(()), memory=sums)

    def report(self, net: Nets, ctx: Ctx) -> Out:
        """Ratios of perplexities from the complete measurement; the student's sums begin anew."""
        student = ctx.batch["student"][0]
        teacher = ctx.batch["teacher"][0]
        student_loss = student[0] / student[1]
        teacher_loss = teacher[0] / teacher[1]
        ratio = jnp.exp(student_loss - teacher_loss)
        metrics = {f"ratio{i}": ratio[i] for i in range(self.domains)}
        return Out(
            jnp.zeros(()),
            metrics,
            {"student": jnp.zeros_like(student), "teacher": teacher},
        )

    def controller(self) -> Controller:
        return DomainWeights(self.domains, self.smoothing, self.use_r0)


class DomainWeights(Controller):
    """The weights r with which the data set draws domains, renewed by every measurement."""

    def __init__(self, domains: int, smoothing: float, use_r0: bool):
        self.domains = domains
        self.smoothing = smoothing
        self.use_r0 = use_r0
        # r; None before the first measurement
        self.weights: list[float] | None = None
        self.measured = 0  # measurements so far

    def update(self, metrics: Mapping[str, float]) -> Mapping[str, Any]:
        if "measured/ratio0" not in metrics:
            return {}
        ratio = np.array(
            [metrics[f"measured/ratio{i}"] for i in range(self.domains)]
        )
        first = self.weights is None
        if first:
            weights = discrepancy(ratio)  # eq. 1
        else:
            weights = refresh(self.weights, ratio, self.smoothing)  # eq. 2
        self.weights = weights.tolist()
        self.measured += 1
        if first and not self.use_r0:
            return {}
        return {"weights": tuple(self.weights)}

    def state(self):
        return {"weights": self.weights, "measured": self.measured}

    def restore(self, state):
        self.weights = state["weights"]
        self.measured = state["measured"]
