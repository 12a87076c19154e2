"""f-distill - One-step Diffusion Models with f-Divergence Distribution Matching (arXiv:2502.15681).

The reverse KL that distribution matching descends seeks modes. Any f-divergence of the noised
teacher's density q from the student's p moves samples along the same difference of scores, weighted
by the density ratio r = q / p (theorem 1):

    grad = h(r) (s_p(x_t) - s_q(x_t)),  h(r) = r^2 f''(r)                                  (1)

h is 1 for reverse KL (this is DMD2), r for forward KL, r / (1 + r) for Jensen-Shannon. r is exp of
DMD2's discriminator's logit, clipped; h is divided by its batch mean (2), so that the step size is
the host's:

    grad = h(r) / mean h(r) * DMD2's gradient                                              (2)

`BinnedFDistill` first divides the ratios by their mean at like noise levels, as the released code
does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Shaped

from jaxdistill.core.fields import Limit
from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Ctx, Nets, Out
from jaxdistill.diffusion.process import expand
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.objectives import fdivergence, score
from jaxdistill.objectives.fdivergence import FDivergence, JensenShannon


@dataclasses.dataclass(frozen=True, kw_only=True)
class FDistill(DMD2):
    divergence: FDivergence = JensenShannon()  # the paper's best
    # where r is clipped; the code's (.1, 20)
    ratio_range: tuple[float, Limit] = (
        0.0,
        math.inf,
    )

    needs = {"x": Shaped[Spec, "B ..."]}  # real samples, of the discriminator

    @classmethod
    def upgraded(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Config fields in which the name of a divergence is that divergence."""
        return fdivergence.from_name(given)

    def weigh(self, net: Nets, ctx: Ctx, xt: Array, t: Array) -> Array:
        """h(r) over its batch mean, [B]."""
        logits = self.logits(net, xt, t, ctx.batch.get("cond"))
        return fdivergence.f_weight(self.divergence, logits, *self.ratio_range)

    def match(self, net: Nets, ctx: Ctx, x0: Array) -> tuple[Array, Array, Array]:
        """(loss whose gradient in x0 is that of (2) over numel, x_t, t)."""
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        h = self.weigh(net, ctx, xt, t)
        gradient = self.direction(
            x0, self.real(net, xt, t, ctx), self.fake(net, xt, t, ctx), t
        )
        return score.gradient_surrogate(x0, expand(h, x0) * gradient), xt, t


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinnedFDistill(FDistill):
    """As released: ratios over their running mean in the bin of their time, so that no noise level
    outweighs the others.
    """

    ratio_range: tuple[float, float] = (0.1, 20.0)
    bins: int = 10  # equal parts of the process
    # share of its old mean that a bin keeps; the code's .5 on ImageNet-64
    bin_rate: float = 0.0

    def memory(self):
        return {"ratio_means": jnp.ones(self.bins)}

    def means(self, logits: Array, t: Array, ctx: Ctx) -> tuple[Array, Array]:
        """(mean ratios by bin [bins], those of the samples' bins [B])."""
        r = fdivergence.f_ratio(logits, *self.ratio_range)
        ends = (self.process.t_min, self.process.t_max)
        return fdivergence.binned_means(
            ctx.memory["ratio_means"], r, t, *ends, self.bin_rate
        )

    def weigh(self, net: Nets, ctx: Ctx, xt: Array, t: Array) -> Array:
        logits = self.logits(net, xt, t, ctx.batch.get("cond"))
        scale = self.means(logits, t, ctx)[1] + 1e-6
        return fdivergence.f_weight(
            self.divergence, logits, *self.ratio_range, scale=scale
        )

    def student_loss(self, net: Nets, ctx: Ctx) -> Out:
        out = super().student_loss(net, ctx)
        # The draws and values are those of `match`, which XLA finds equal and computes once.
        x0 = self.generate(net, ctx)
        xt, t, _ = self.diffuse(x0, self.match_times, ctx, "match")
        logits = self.logits(net, xt, t, ctx.batch.get("cond"))
        means, _ = self.means(logits, t, ctx)
        return out._replace(memory={**out.memory, "ratio_means": means})
