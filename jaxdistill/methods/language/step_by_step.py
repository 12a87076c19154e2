"""Distilling Step-by-Step (arXiv:2305.02301): a teacher's reasons are a second task, not an input
and not part of the answer.

A large model, asked once, has given a rationale and a label for every input (data/rationales.py).
The student learns both from one set of weights, told apart by a prefix: so the answer needs neither
the teacher nor the rationale.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Refused, Turn
from jaxdistill.methods.language import _whole
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import targets
from jaxdistill.objectives.divergence import masked_sum

EXPLAIN = "explain_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepByStep(SFT):
    """Batches: a document of each row that ends in the label (tokens, mask, ...), and one that ends
    in the rationale (explain_tokens, explain_mask, ...). Another architecture overrides `nll`.
    """

    # weight of the label; 1 - alpha that of the rationale. The paper's lambda is (1 - alpha) /
    # alpha
    alpha: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise Refused(f"method.alpha={self.alpha}: expected 0 to 1")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss, gather=self.count),)

    def count(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch with the numbers of target tokens of both tasks."""
        return _whole.counted(
            ctx.batch,
            {"label": targets(ctx.batch)[1], "rationale": targets(explained(ctx.batch))[1]},
        )

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """alpha L_label + (1 - alpha) L_rationale, each the mean over its own target tokens in the
        batch.
        """
        label = _whole.mean(ctx.batch, "label", *self.nll(net, ctx.batch))
        rationale = _whole.mean(ctx.batch, "rationale", *self.nll(net, explained(ctx.batch)))
        loss = self.alpha * label + (1 - self.alpha) * rationale
        return Out(loss, {"label": label, "rationale": rationale}, count=_whole.share(ctx.batch))

    def nll(self, net: Nets, batch: Batch) -> tuple[Array, Array]:
        """(sum of -log q over the target tokens of these documents, their number)."""
        each, _, mask = self.each(net, batch)
        return masked_sum(each, mask)


def explained(batch: Batch) -> Batch:
    """The documents that end in the rationale."""
    return {k.removeprefix(EXPLAIN): v for k, v in batch.items() if k.startswith(EXPLAIN)}
