"""ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression
(arXiv:2106.02241).

From a pretrained teacher, general text and a loss on features to a fine-tuned teacher, task data
and labels is a large jump for a small student. Four stages change one ingredient each: first the
teacher, then the data, then the loss.

The paper's text was not at hand: the form of the latent loss (attention distributions, which
layers), its weights and the lengths of the stages are readings, and fields here. Layer m = 0
(embeddings) is not matched.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Method, Nets, Out, Refused, Turn, lookup
from jaxdistill.core.types import Stage as Part
from jaxdistill.methods.language import _whole
from jaxdistill.objectives import attention
from jaxdistill.objectives.divergence import cross_entropy, masked_sum
from jaxdistill.objectives.features import hidden_mse


class Ingredients(NamedTuple):
    """What a stage is made of."""

    teacher: str  # role: pretrained | teacher (fine-tuned on the task)
    data: str  # general | task
    loss: str  # latent | labels (latent, soft and hard)


STAGES = {
    "GD": Ingredients("pretrained", "general", "latent"),  # general distillation
    "GED": Ingredients("teacher", "general", "latent"),  # general-enhanced
    "TAD": Ingredients("teacher", "task", "latent"),  # task-adaptive
    "TSD": Ingredients("teacher", "task", "labels"),  # task-specific
}


def rows(batch: Batch, data: str) -> Batch:
    """tokens int [B T], mask bool [B T] and, of the task's, label [B]: the general or the task half
    of a batch.
    """
    prefix = {"general": "general_", "task": ""}[data]
    return {k: batch[prefix + k] for k in ("tokens", "mask", "label") if prefix + k in batch}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTune(Method):
    """Ordinary training of a classifier: what makes the fine-tuned teacher, and the baseline."""

    inits = {"student": None}
    frozen = ()
    ema = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        batch = ctx.batch
        logits = net.student(batch["tokens"], mask=batch["mask"])
        return Out(
            hard_loss(logits, batch["label"]),
            {"accuracy": jnp.mean((logits.argmax(-1) == batch["label"]).astype(jnp.float32))},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErnieTiny(Method):
    """Networks are encoders (models/language/bert.py): tokens, mask, features, scores -> (logits [B
    C], states, attention scores).

    Batches: tokens, mask, label of the task, and general_tokens, general_mask of general text.
    """

    student_depth: int = 4  # M layers
    teacher_depth: int = 12  # N layers; layer m follows g(m) = ceil(m N / M)
    plan: tuple[str, ...] = ("GD", "GED", "TAD", "TSD")  # leaving one out is the paper's ablation
    shares: tuple[float, ...] = (
        0.6,
        0.06,
        0.17,
        0.17,
    )  # of the steps; not stated (GED about a tenth of GD's)
    attention: str = "kl"  # kl: rows of softmax(scores) | mse: the scores, as TinyBERT
    temperature: float = 1.0  # of the soft labels, without T^2
    soft_weight: float = 1.0
    hard_weight: float = 1.0
    stage: str = ""  # which one is trained; set by `stages`

    inits = {"student": None, "projection": None}
    ema = ()

    def __post_init__(self):
        for name in self.plan:
            lookup(STAGES, name, "method.plan")
        lookup(attention.KINDS, self.attention, "method.attention")
        if len(self.shares) != len(self.plan) or min(self.shares) <= 0:
            raise Refused(
                f"method.shares={self.shares}: expected a positive share for each of {', '.join(self.plan)}"
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        """The stage's teacher; both teachers before a stage is chosen."""
        return (
            (STAGES[self.stage].teacher,)
            if self.stage
            else tuple(dict.fromkeys(STAGES[name].teacher for name in self.plan))
        )

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student", "projection"), self.loss, gather=self.count),)

    def count(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch with the number of tokens that the stage reads."""
        return _whole.counted(
            ctx.batch, {"tokens": rows(ctx.batch, STAGES[self.stage].data)["mask"]}
        )

    def stages(self, steps: int) -> tuple[Part, ...]:
        """Student and projection go on from stage to stage."""
        ends = [
            round(steps * sum(self.shares[: i + 1]) / sum(self.shares))
            for i in range(len(self.plan))
        ]
        make = lambda name: dataclasses.replace(self, stage=name)
        return tuple(
            Part(make(name), end - start) for name, start, end in zip(self.plan, [0, *ends], ends)
        )

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        part = STAGES[self.stage]
        batch = rows(ctx.batch, part.data)
        mine = tuple(range(self.student_depth))
        theirs = attention.layer_map(self.student_depth, self.teacher_depth)
        run = lambda call, layers: call(
            batch["tokens"], mask=batch["mask"], taps=layers, scores=layers
        )
        wanted = jax.lax.stop_gradient(run(getattr(net, part.teacher), theirs))
        student = run(net.student, mine)
        share = _whole.share(ctx.batch)
        match = attention.KINDS[self.attention]
        mean = lambda each: _whole.mean(
            ctx.batch, "tokens", *masked_sum(each, batch["mask"])
        )  # over real tokens
        hidden = sum(
            mean(hidden_mse(t, net.projection(s)))
            for t, s in zip(wanted[1], student[1], strict=True)
        )
        maps = sum(
            mean(match(t, s, batch["mask"])) for t, s in zip(wanted[2], student[2], strict=True)
        )
        out = {"hidden": hidden, "attention": maps}
        if part.loss == "labels":
            soft = soft_loss(wanted[0], student[0], self.temperature)
            hard = hard_loss(student[0], batch["label"])
            out |= {"soft": share * soft, "hard": share * hard}
        loss = (
            hidden
            + maps
            + self.soft_weight * out.get("soft", 0.0)
            + self.hard_weight * out.get("hard", 0.0)
        )
        return Out(loss, out, count=share)


def soft_loss(teacher: Array, student: Array, temperature: float) -> Array:
    """Mean of -sum softmax(teacher / T) log softmax(student / T); of one output, the squared
    difference.
    """
    if student.shape[-1] == 1:
        return jnp.mean((teacher - student) ** 2)
    law = jax.nn.softmax(teacher / temperature)
    return -jnp.mean(jnp.sum(law * jax.nn.log_softmax(student / temperature), -1))


def hard_loss(logits: Array, label: Array) -> Array:
    """Mean of -log softmax(logits)[label]; of one output, the squared difference."""
    return jnp.mean(
        (logits[:, 0] - label) ** 2 if logits.shape[-1] == 1 else cross_entropy(logits, label)
    )
