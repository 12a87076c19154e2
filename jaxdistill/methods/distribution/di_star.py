"""DI* - Diff-Instruct*: Towards Human-Preferred One-step Text-to-image Generative Models
(arXiv:2410.20898).

DI++ (`di_plus_plus.py`) with another regulariser: in place of the integral KL divergence, whose
minimiser seeks modes, a divergence of scores, SIM's with the pseudo-Huber distance (`sim.py`). Its
gradient flows through both denoisers, the reward's through the sample; no image data is needed:

    L = L_SIM - reward_weight E[r(x0, c)]                                                  (1)

The paper reports that this keeps samples more diverse at equal rewards, and is stabler.
"""

from __future__ import annotations

import dataclasses

from jaxdistill.methods.distribution.di_plus_plus import Rewarded
from jaxdistill.methods.distribution.sim import SIM


@dataclasses.dataclass(frozen=True, kw_only=True)
class DIStar(Rewarded, SIM):
    """Score implicit matching with a reward."""
