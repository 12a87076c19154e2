"""Sequence-level knowledge distillation (arXiv:1606.07947): the student is trained on the teacher's
responses.

Matching a teacher token by token on given text does not show how it continues its own text. Here
the responses of every batch are the teacher's, and the student learns them by cross-entropy. The
paper decodes with a beam, an approximation of the mode; here the teacher decodes greedily
(`sample_temperature` 0), or samples, which in expectation is the forward KL between distributions
of complete responses.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.core.types import Batch, Ctx, Nets, Turn
from jaxdistill.methods.language._rollout import Writing
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import common_vocabulary, same_vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceKD(SFT, Writing):
    """SFT on the teacher's responses to the data's prompts."""

    # temperature at which the teacher's responses are sampled; 0: greedily
    sample_temperature: float = 0.0

    frozen = ("teacher",)

    def __post_init__(self):
        SFT.__post_init__(self)
        Writing.__post_init__(self)

    def check(self, nets, data) -> None:
        same_vocabulary(self, nets)

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss, gather=self.rollout),)

    def rollout(self, net: Nets, ctx: Ctx) -> Batch:
        """The teacher's responses in the places of the data's."""
        return self.write(net.teacher, ctx, "write", vocab=common_vocabulary(net))
