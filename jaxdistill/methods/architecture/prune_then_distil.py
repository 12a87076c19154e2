"""Minitron - Compact Language Models via Pruning and Knowledge Distillation (arXiv:2407.14679).

A trained model is cut down, not a small one trained up: layers and MLP neurons are ranked by their
activations on one calibration batch and the lowest are dropped; what is left is retrained on the
whole model's logits, and on some of its hidden states where many layers are gone. Cross-entropy to
the data is off, as the paper found best.

Departures: attention heads and embedding channels are not pruned, so that hidden states need no
projection.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Ctx, Nets, Out, Refused, Stage
from jaxdistill.methods.language._fields import changing
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import context, targets
from jaxdistill.objectives.divergence import masked_sum
from jaxdistill.objectives.features import hidden_mse
from jaxdistill.surgery.prune import prune


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneThenDistil(KD):
    depth: int = 0  # layers kept; 0: all
    mlp: int = 0  # neurons kept in each layer; 0: all
    hidden_weight: float = 1.0  # of the hidden states, in units of the logit loss's own size
    student_layers: tuple[
        int, ...
    ] = ()  # the layer map: states after these layers of the student ...
    teacher_layers: tuple[
        int, ...
    ] = ()  # ... match those after these of the teacher; none: logits alone

    inits = {"student": "teacher"}

    def __post_init__(self):
        super().__post_init__()
        if len(self.student_layers) != len(self.teacher_layers):
            raise Refused(
                f"method.student_layers={self.student_layers} and teacher_layers={self.teacher_layers} differ in number"
            )

    def stages(self, steps: int) -> tuple[Stage, ...]:
        return (Stage(self, steps, surgery=self.cut),)

    def cut(self, nets, params, batch):
        """Surgery: the student is the teacher, pruned (section 2)."""
        net, weights = prune(
            nets["teacher"], params["teacher"], batch, depth=self.depth, mlp=self.mlp
        )
        return {**nets, "student": net}, {**params, "student": weights}

    @changing
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        if not self.student_layers:
            return super().loss(net, ctx)
        run = lambda call, layers: call(
            ctx.batch["tokens"], hidden_only=self.chunk > 0, taps=layers, **context(ctx.batch)
        )
        teacher, wanted = run(net.teacher, self.teacher_layers)
        student, states = run(net.student, self.student_layers)
        out = self.compare(net, teacher, student, ctx.batch)
        _, mask = targets(ctx.batch)
        hidden = sum(masked_sum(hidden_mse(t, s), mask)[0] for t, s in zip(wanted, states)) / len(
            states
        )
        # L = L_logits + alpha L_is, alpha = L_logits / L_is (section 3): both terms weigh the same
        # at every step, in each micro-batch
        alpha = jax.lax.stop_gradient(out.metrics["divergence"] / jnp.maximum(hidden, 1e-12))
        return out._replace(
            loss=out.loss + self.hidden_weight * alpha * hidden,
            metrics={**out.metrics, "hidden": hidden},
        )
