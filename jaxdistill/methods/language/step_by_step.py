"""Distilling Step-by-Step (arXiv:2305.02301): a teacher's rationales are a second task, neither an
input nor a part of the answer.

A large model has given, once, a rationale and a label for every input (data/rationales.py). One
student learns both tasks, told apart by a prefix, so that its answer needs neither the teacher nor
the rationale.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Float, Int, Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Refused, Turn
from jaxdistill.methods.language import _global_counts
from jaxdistill.methods.language._fields import TEXT
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import targets
from jaxdistill.objectives.divergence import masked_sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepByStep(SFT):
    """A sample is two texts: one ends in the label, the other (explain_...) in the rationale.

    Another architecture overrides `nll`.
    """

    # weight of the label; that of the rationale is 1 - alpha. The paper's lambda is
    # (1 - alpha) / alpha
    alpha: float = 0.5

    needs = {
        **TEXT,
        "explain_tokens": Int[Spec, "B S"],
        "explain_mask": Shaped[Spec, "B S"],
    }

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise Refused(f"method.alpha={self.alpha}: expected 0 to 1")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss, gather=self.with_token_counts),)

    def with_token_counts(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch with the numbers of target tokens of both tasks."""
        _, label = targets(ctx.batch)
        _, rationale = targets(rationale_text(ctx.batch))
        return _global_counts.with_counts(
            ctx.batch, {"label": label, "rationale": rationale}
        )

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """alpha L_label + (1 - alpha) L_rationale, each a mean over its own target tokens."""
        batch = ctx.batch
        total, count = self.nll(net, batch)
        label = _global_counts.mean(batch, "label", total, count)
        total, count = self.nll(net, rationale_text(batch))
        rationale = _global_counts.mean(batch, "rationale", total, count)
        loss = self.alpha * label + (1 - self.alpha) * rationale
        metrics = {"label": label, "rationale": rationale}
        return Out(loss, metrics, count=_global_counts.share_of_batch(batch))

    def nll(
        self, net: Nets, batch: Batch
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(sum of -log q over the target tokens of these texts, their number)."""
        nll, _, mask = self.token_losses(net, batch)
        return masked_sum(nll, mask)


def rationale_text(batch: Batch) -> Batch:
    """The texts that end in the rationale, under the names of the others."""
    prefix = "explain_"
    return {
        k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)
    }
