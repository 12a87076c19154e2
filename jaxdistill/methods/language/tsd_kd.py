"""TSD-KD - Token-selective dual knowledge distillation, "Explain in your own words"
(arXiv:2603.13260).

A small student is not given the teacher's complete distribution at every token. At the opener, the
tokens that hold most of a response's entropy, the teacher only ranks the student's own candidates
(L_ind). The matching of distributions (L_dir) is gated: strong where the student is uncertain and
the teacher is not. The student's entropy is lowered where it is largest (L_em). All three are on
the student's own responses.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.types import Array, Out, Refused
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.models.language.lm import targets
from jaxdistill.objectives.divergence import (
    Divergence,
    JensenShannon,
    common,
    masked_sum,
)
from jaxdistill.objectives.ranking import plackett_luce, reranked
from jaxdistill.objectives.selection import (
    confidence_gate,
    entropy,
    most_uncertain,
    opener,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TSDKD(GKD):
    """L = ranking_weight L_ind + L_dir + entropy_weight L_em.

    With both weights 0, no gate and direct_on="all" it is GKD. The opener is chosen in each
    response, as in the paper's text, and the uncertain tokens in the batch, as in its code; with
    micro-batches, in each of these. The end token counts.
    """

    # of the student's distribution from the teacher's
    divergence: Divergence = JensenShannon(beta=0.9)
    # lambda: share of batches with the student's own responses
    on_policy: float = 1.0
    # c: of the response's entropy, in the opener; of the batch's tokens, with lowered entropy
    share: float = 0.1
    # alpha: weight of L_ind
    ranking_weight: float = 0.1
    # k: number of the student's likeliest tokens, which the teacher ranks
    candidates: int = 10
    # tau of the gate; not in the paper's text, 1 in its code; 0: no gate
    gate_temperature: float = 1.0
    # weight of L_em
    entropy_weight: float = 1.0
    # tokens of L_dir: all, as in the paper's equation and code | opener, as in its figure
    direct_on: str = "all"

    unused = {"hard_weight": "no term has the data's tokens"}

    def __post_init__(self):
        super().__post_init__()
        if self.direct_on not in ("all", "opener"):
            raise Refused(
                f"method.direct_on={self.direct_on!r}: expected all or opener"
            )
        if not 0 < self.share <= 1 or self.gate_temperature < 0:
            given = f"method.share={self.share}, gate_temperature={self.gate_temperature}"
            raise Refused(f"{given}: expected (0, 1] and 0 or more")
        if self.chunk or self.candidates < 1:
            given = f"method.chunk={self.chunk}, candidates={self.candidates}"
            raise Refused(
                f"{given}: expected 0 (entropies need whole rows) and at least 1"
            )

    def compare(self, net, teacher, student, batch) -> Out:
        _, mask = targets(batch)
        teacher, student = common(teacher, student)
        student_entropy = entropy(student)
        teacher_entropy = entropy(teacher)
        opening = opener(student_entropy, mask, self.share)
        uncertain = most_uncertain(student_entropy, mask, self.share)

        gate = jnp.ones_like(student_entropy)
        if self.gate_temperature:
            gate = confidence_gate(
                teacher_entropy, student_entropy, self.gate_temperature
            )
        weight = gate * opening if self.direct_on == "opener" else gate
        l_dir, count = masked_sum(self.soft(teacher, student), mask, weight)
        ranking = self.ranking_loss(reranked(teacher, student, self.candidates))
        l_ind, opening_count = masked_sum(ranking, opening)
        l_em, uncertain_count = masked_sum(student_entropy, uncertain)

        # L_ind and L_em are means over other tokens than `count`, which the engine divides by
        mean_ind = l_ind / jnp.maximum(opening_count, 1.0)
        mean_em = l_em / jnp.maximum(uncertain_count, 1.0)
        means = self.ranking_weight * mean_ind + self.entropy_weight * mean_em
        metrics = {
            "divergence": l_dir,
            "ranking": (l_ind, opening_count),
            "uncertain": (l_em, uncertain_count),
            "gate": masked_sum(gate, mask),
            "entropy": masked_sum(student_entropy, mask),
            "opener": (opening_count, count),
        }
        return Out(l_dir + count * means, metrics, count=count)

    def ranking_loss(self, scores: Float[Array, "*T K"]) -> Float[Array, "*T"]:
        """L_ind of the student's scores of its candidates, in the teacher's order."""
        return plackett_luce(scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released(TSDKD):
    """The ranking loss of the authors' code: normalised over the candidates so far.

    That is the likelihood of the reversed ranking, and it lowers the teacher's favourite.
    """

    def ranking_loss(self, scores):
        return plackett_luce(scores[..., ::-1])
