"""TSD-KD - Token-selective dual knowledge distillation, "Explain in your own words"
(arXiv:2603.13260).

A small student is not given the teacher's whole law everywhere. At the opener, where most of a
response's entropy lies, the teacher only ranks the student's own candidates; matching of laws is
gated, strong where the student is uncertain and the teacher is not; and the student's entropy is
lowered where it is largest. All on what the student writes.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Nets, Out, Refused
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.models.language.lm import targets
from jaxdistill.objectives.divergence import common, masked_sum
from jaxdistill.objectives.ranking import plackett_luce, reranked
from jaxdistill.objectives.selection import confidence_gate, entropy, most_uncertain, opener


@dataclasses.dataclass(frozen=True, kw_only=True)
class TSDKD(GKD):
    """L = ranking_weight L_ind + L_dir + entropy_weight L_em, all three at 0, no gate and
    `direct_on` all: GKD.

    The opener is taken from each response and the uncertain tokens from the batch, as the paper has
    the one and its code the other; with micro-batches, from each of these. The end-of-text token
    counts.
    """

    beta: float = 0.9  # of the JSD
    on_policy: float = 1.0  # lambda
    share: float = 0.1  # c: of the entropy, in the opener; of the tokens, whose entropy is lowered
    ranking_weight: float = 0.1  # alpha
    candidates: int = 10  # k: the student's likeliest tokens, which the teacher ranks
    gate_temperature: float = 1.0  # tau; not in the paper's text, 1 in its code; 0: no gate
    entropy_weight: float = 1.0
    # all | opener: where laws are matched; the paper's equation and code have all, its figure the
    # opener
    direct_on: str = "all"

    unused = {**GKD.unused, "hard_weight": "no term has the data's tokens"}

    def __post_init__(self):
        super().__post_init__()
        if self.direct_on not in ("all", "opener"):
            raise Refused(f"method.direct_on={self.direct_on!r}: expected all or opener")
        if not 0 < self.share <= 1 or self.gate_temperature < 0:
            raise Refused(
                f"method.share={self.share}, gate_temperature={self.gate_temperature}: expected (0, 1] and 0 or more"
            )
        if self.chunk or self.candidates < 1:
            raise Refused(
                f"method.chunk={self.chunk}, candidates={self.candidates}: expected 0 (entropies need whole rows) and at least 1"
            )

    def compare(self, net: Nets, teacher: Array, student: Array, batch: Batch) -> Out:
        _, mask = targets(batch)
        teacher, student = common(teacher, student)
        mine = entropy(student)
        theirs = entropy(teacher)
        opening = opener(mine, mask, self.share)
        uncertain = most_uncertain(mine, mask, self.share)

        gate = (
            confidence_gate(theirs, mine, self.gate_temperature)
            if self.gate_temperature
            else jnp.ones_like(mine)
        )
        each = self.soft(teacher, student, None, None)
        direct, count = masked_sum(
            each, mask, gate * (opening if self.direct_on == "opener" else 1.0)
        )
        ranking = masked_sum(self.ranking(reranked(teacher, student, self.candidates)), opening)
        least = masked_sum(mine, uncertain)
        mean = lambda pair: pair[0] / jnp.maximum(pair[1], 1.0)
        loss = direct + count * (
            self.ranking_weight * mean(ranking) + self.entropy_weight * mean(least)
        )
        metrics = {
            "divergence": direct,
            "ranking": ranking,
            "uncertain": least,
            "gate": masked_sum(gate, mask),
            "entropy": masked_sum(mine, mask),
            "opener": (ranking[1], count),
        }
        return Out(loss, metrics, count=count)

    def ranking(self, scores: Array) -> Array:
        return plackett_luce(scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released(TSDKD):
    """As the authors' code ranks: normalised over the items so far, which is the likelihood of the
    reversed ranking and lowers the teacher's favourite.
    """

    def ranking(self, scores: Array) -> Array:
        return plackett_luce(scores[..., ::-1])
