"""Minitron - Compact Language Models via Pruning and Knowledge Distillation (arXiv:2407.14679).

A trained model is cut down, in place of training a small one from scratch. Layers and MLP neurons
are ranked by their activations on one calibration batch, and the lowest are dropped. The rest is
trained on the unpruned model's logits, and on some of its hidden states where many layers are gone.
Cross-entropy to the data is off, as the paper found best.

Departures: attention heads and embedding channels are not pruned, so that hidden states need no
projection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Batch, Ctx, Nets, Out, Refused, Stage
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import context, targets
from jaxdistill.objectives.divergence import masked_sum
from jaxdistill.objectives.features import hidden_mse
from jaxdistill.objectives.schedule import follows_schedules
from jaxdistill.surgery.prune import prune


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneThenDistil(KD):
    """KD of the pruned teacher from the teacher."""

    # layers that are kept; 0: all
    depth: int = 0
    # neurons that are kept in the MLP of each layer; 0: all
    mlp: int = 0
    # weight of the loss on hidden states, which is scaled to the size of the loss on logits
    hidden_weight: float = 1.0
    # the layer map: hidden states after these layers of the student ...
    student_layers: tuple[int, ...] = ()
    # ... are matched to those after these layers of the teacher; (): the loss on logits alone
    teacher_layers: tuple[int, ...] = ()

    inits = {"student": "teacher"}

    def __post_init__(self):
        super().__post_init__()
        if len(self.student_layers) != len(self.teacher_layers):
            given = f"method.student_layers={self.student_layers}"
            raise Refused(
                f"{given} and teacher_layers={self.teacher_layers} differ in number"
            )

    def stages(self, steps: int) -> tuple[Stage, ...]:
        return (Stage(self, steps, surgery=self.prune_teacher),)

    def prune_teacher(self, nets, params, batch):
        """Surgery: the student is the teacher, pruned (section 2)."""
        teacher = nets["teacher"]
        net, weights = prune(
            teacher, params["teacher"], batch, depth=self.depth, mlp=self.mlp
        )
        return {**nets, "student": net}, {**params, "student": weights}

    @follows_schedules
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """L_logits + hidden_weight alpha L_is, with alpha = L_logits / L_is (section 3).

        So both terms have the same size at every step, in each micro-batch.
        """
        if not self.student_layers:
            return super().loss(net, ctx)
        batch = ctx.batch
        teacher, teacher_hidden = self.outputs_and_taps(
            net.teacher, batch, self.teacher_layers
        )
        student, student_hidden = self.outputs_and_taps(
            net.student, batch, self.student_layers
        )
        out = self.compare(net, teacher, student, batch)
        _, mask = targets(batch)
        hidden = 0
        for p, q in zip(teacher_hidden, student_hidden):
            hidden = hidden + masked_sum(hidden_mse(p, q), mask)[0]
        hidden = hidden / len(student_hidden)
        alpha = out.metrics["divergence"] / jnp.maximum(hidden, 1e-12)
        loss = out.loss + self.hidden_weight * jax.lax.stop_gradient(alpha) * hidden
        return out._replace(loss=loss, metrics={**out.metrics, "hidden": hidden})

    def outputs_and_taps(
        self, call: Callable, batch: Batch, layers: tuple[int, ...]
    ):
        """(what `outputs` gives, hidden states [B T D] after these layers)."""
        hidden_only = self.chunk > 0
        return call(
            batch["tokens"], hidden_only=hidden_only, taps=layers, **context(batch)
        )
