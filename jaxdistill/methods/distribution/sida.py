"""SiDA - Adversarial Score identity Distillation: Rapidly Surpassing the Teacher in One Step
(arXiv:2410.14919).

SiD needs no data, so its student is at best what the teacher's scores say. SiDA adds a GAN on real
data: the fake score's encoder also tells noised real samples from noised samples of the student.
Both parts of the student's loss carry SiD's weight omega = 1 / sg[mean |x0 - D_phi|]; both critics
learn at the same noise levels:

    L = scale L_SiD(alpha) + gan_weight numel omega softplus(-logit)                       (1)
    L_critics = L_denoise + disc_weight L_discriminator                                    (2)

This is Uni-Instruct's loss (`uni_instruct.py`) with SiD's expansion for its two terms, and without
a ratio. alpha = 1 is Uni-Instruct's reverse KL. SiD2A is SiDA of a student that SiD trained:
`--config.roles.student.init=RUN`, and with `SharedSiDA` the paper's discriminator.

Departures: in `SiDA` a head reads the encoder's features; `SharedSiDA` takes the mean over channels
as the logits, as the paper does. The paper averages logits over the samples of a device, here each
sample has its own.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Shaped

from jaxdistill.core.fields import Natural
from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Ctx, Nets
from jaxdistill.diffusion.process import Pred
from jaxdistill.methods.distribution.uni_instruct import (
    SharedUniInstruct,
    UniInstruct,
)
from jaxdistill.objectives import score
from jaxdistill.objectives.fdivergence import FDivergence, ReverseKL


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiDA(UniInstruct):
    # no field here
    divergence: FDivergence = dataclasses.field(default=ReverseKL(), init=False)
    alpha: float = 1.2  # as SiD's; Uni-Instruct's code has 1
    critic_only: Natural = 0  # steps before the student moves

    needs = {"x": Shaped[Spec, "B ..."]}  # real samples, of the discriminator

    def expansion(
        self,
        net: Nets,
        ctx: Ctx,
        x0: Array,
        xt: Array,
        t: Array,
        real: Pred,
        fake: Pred,
        logits: Array,
    ) -> Array:
        """SiD's loss without its scale, [B]."""
        return score.sid_loss(x0, real.x0, fake.x0, self.alpha, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSiDA(SiDA, SharedUniInstruct):
    """With the paper's discriminator, which has no weights of its own."""
