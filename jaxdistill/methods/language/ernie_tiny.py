"""ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression
(arXiv:2106.02241).

From a pretrained teacher, general text and a loss on features to a fine-tuned teacher, task data
and labels is a large step for a small student. Four stages change one ingredient each: first the
teacher, then the data, then the loss.

The paper's text was not at hand: the form of the latent loss (attention distributions, and which
layers), its weights and the lengths of the stages are readings, and fields here. Layer m = 0, the
embeddings, is not matched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import (
    Array,
    Batch,
    Ctx,
    Method,
    Nets,
    Out,
    Refused,
    Stage,
    Turn,
    lookup,
    stage_lengths,
)
from jaxdistill.methods.language import _global_counts
from jaxdistill.objectives import attention as attention_loss
from jaxdistill.objectives.divergence import cross_entropy, masked_sum
from jaxdistill.objectives.features import hidden_mse


class Ingredients(NamedTuple):
    """What a stage is made of."""

    teacher: str  # role: pretrained | teacher (fine-tuned on the task)
    data: str  # general | task
    loss: str  # latent | labels (latent, soft and hard)


STAGES = {
    "GD": Ingredients("pretrained", "general", "latent"),  # general distillation
    "GED": Ingredients(
        "teacher", "general", "latent"
    ),  # general-enhanced distillation
    "TAD": Ingredients("teacher", "task", "latent"),  # task-adaptive distillation
    "TSD": Ingredients("teacher", "task", "labels"),  # task-specific distillation
}
PREFIXES = {"general": "general_", "task": ""}  # of the data's names in a batch
TASK = {
    "tokens": Int[Spec, "B T"],
    "mask": Shaped[Spec, "B T"],
    "label": Shaped[Spec, " B"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTune(Method):
    """Ordinary training of a classifier: it makes the fine-tuned teacher, and is the baseline."""

    needs = TASK
    inits = {"student": None}
    frozen = ()
    ema = ()

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        batch = ctx.batch
        logits = net.student(batch["tokens"], mask=batch["mask"])
        right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        return Out(hard_loss(logits, batch["label"]), {"accuracy": jnp.mean(right)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErnieTiny(Method):
    """The networks are encoders (models/language/bert.py): a call with tokens, mask, taps and
    scores gives (logits [B C], hidden states and attention scores of these layers).
    """

    # M: layers of the student
    student_depth: int = 4
    # N: layers of the teachers; layer m of the student learns from layer ceil(m N / M)
    teacher_depth: int = 12
    # the stages; the paper's ablations leave one out
    plan: tuple[str, ...] = ("GD", "GED", "TAD", "TSD")
    # share of the steps that each stage gets; not in the paper but for GED, a tenth of GD
    shares: tuple[float, ...] = (0.6, 0.06, 0.17, 0.17)
    # what is matched: kl (of softmax(scores)) | mse (of the scores, as TinyBERT does)
    attention: str = "kl"
    # of the soft labels; their loss has no factor T^2
    temperature: float = 1.0
    soft_weight: float = 1.0
    hard_weight: float = 1.0
    # the stage at hand; `stages` sets it
    stage: str = ""

    needs = {
        **TASK,
        "general_tokens": Int[Spec, "B S"],
        "general_mask": Shaped[Spec, "B S"],
    }
    inits = {"student": None, "projection": None}
    ema = ()

    def __post_init__(self):
        for name in self.plan:
            lookup(STAGES, name, "method.plan")
        lookup(attention_loss.KINDS, self.attention, "method.attention")
        if len(self.shares) != len(self.plan) or min(self.shares) <= 0:
            expected = f"a positive share for each of {', '.join(self.plan)}"
            raise Refused(f"method.shares={self.shares}: expected {expected}")

    @property
    def frozen(self) -> tuple[str, ...]:
        """The teacher of the stage; both teachers before a stage is chosen."""
        names = (self.stage,) if self.stage else self.plan
        return tuple(dict.fromkeys(STAGES[name].teacher for name in names))

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(
                ("student", "projection"), self.loss, gather=self.with_token_count
            ),
        )

    def with_token_count(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch with the number of tokens that the stage reads."""
        mask = chosen(ctx.batch, STAGES[self.stage].data)["mask"]
        return _global_counts.with_counts(ctx.batch, {"tokens": mask})

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """Student and projection go on from stage to stage."""
        lengths = stage_lengths(steps, self.shares)
        methods = [dataclasses.replace(self, stage=name) for name in self.plan]
        return tuple(
            Stage(method, length) for method, length in zip(methods, lengths)
        )

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        stage = STAGES[self.stage]
        batch = chosen(ctx.batch, stage.data)
        teacher = getattr(net, stage.teacher)
        teacher_layers = attention_loss.layer_map(
            self.student_depth, self.teacher_depth
        )
        p_logits, *p_latent = jax.lax.stop_gradient(
            run_encoder(teacher, batch, teacher_layers)
        )
        q_logits, *q_latent = run_encoder(
            net.student, batch, tuple(range(self.student_depth))
        )

        hidden = 0
        for p, q in zip(p_latent[0], q_latent[0], strict=True):
            each = hidden_mse(p, net.projection(q))
            hidden = hidden + self.token_mean(ctx.batch, each, batch["mask"])
        maps = 0
        match = attention_loss.KINDS[self.attention]
        for p, q in zip(p_latent[1], q_latent[1], strict=True):
            each = match(p, q, batch["mask"])
            maps = maps + self.token_mean(ctx.batch, each, batch["mask"])

        share = _global_counts.share_of_batch(ctx.batch)
        loss = hidden + maps
        metrics = {"hidden": hidden, "attention": maps}
        if stage.loss == "labels":
            soft = share * soft_loss(p_logits, q_logits, self.temperature)
            hard = share * hard_loss(q_logits, batch["label"])
            loss = loss + self.soft_weight * soft + self.hard_weight * hard
            metrics |= {"soft": soft, "hard": hard}
        return Out(loss, metrics, count=share)

    def token_mean(
        self, batch: Batch, each: Float[Array, "B T"], mask: Shaped[Array, "B T"]
    ):
        """Mean over the real tokens of the complete batch."""
        return _global_counts.mean(batch, "tokens", *masked_sum(each, mask))


def chosen(batch: Batch, data: str) -> Batch:
    """tokens, mask and, of the task's data, label: the general or the task's half of a batch."""
    prefix = PREFIXES[data]
    return {
        k: batch[prefix + k]
        for k in ("tokens", "mask", "label")
        if prefix + k in batch
    }


def run_encoder(call: Callable, batch: Batch, layers: tuple[int, ...]):
    """(logits, hidden states and attention scores of `layers`)."""
    return call(batch["tokens"], mask=batch["mask"], taps=layers, scores=layers)


def soft_loss(
    teacher: Float[Array, "B C"], student: Float[Array, "B C"], temperature: float
) -> Float[Array, ""]:
    """Mean of -sum softmax(teacher / T) log softmax(student / T); squared error if C is 1."""
    if student.shape[-1] == 1:
        return jnp.mean((teacher - student) ** 2)
    p = jax.nn.softmax(teacher / temperature)
    return -jnp.mean(jnp.sum(p * jax.nn.log_softmax(student / temperature), -1))


def hard_loss(
    logits: Float[Array, "B C"], label: Shaped[Array, " B"]
) -> Float[Array, ""]:
    """Mean of -log softmax(logits)[label]; squared error if C is 1."""
    if logits.shape[-1] == 1:
        return jnp.mean((logits[:, 0] - label) ** 2)
    return jnp.mean(cross_entropy(logits, label))
