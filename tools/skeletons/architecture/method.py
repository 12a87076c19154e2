"""My method (arXiv:2601.00000).

The idea in three sentences. As it stands, the student is the teacher without some of its layers,
and is trained on the teacher's logits. Departures from the paper are stated here.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.core.types import Stage
from jaxdistill.methods.language.kd import KD
from jaxdistill.surgery.prune import prune


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyMethod(KD):
    """Each field has its role, its unit and the paper's value."""

    # layers that are kept; 0: all
    depth: int = 0

    inits = {"student": "teacher"}

    def stages(self, steps: int) -> tuple[Stage, ...]:
        return (Stage(self, steps, surgery=self.prune_teacher),)

    def prune_teacher(self, nets, params, batch):
        """Surgery (section 1): the student is the teacher, pruned. What `prune` does belongs into
        surgery/, where other methods may use it.
        """
        net, weights = prune(
            nets["teacher"], params["teacher"], batch, depth=self.depth, mlp=0
        )
        return {**nets, "student": net}, {**params, "student": weights}
