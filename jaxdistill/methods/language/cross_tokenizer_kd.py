"""Knowledge distillation across tokenizers: approximate likelihood matching on aligned pieces of
text (ALM, arXiv:2503.20083), and universal logit distillation (ULD, arXiv:2402.12030).

Where teacher and student split a text into different tokens, their next-token distributions are
over different things. A span is a piece of text that is a number of complete tokens on both sides:
its two probabilities, products over its tokens, can be compared. ALM matches them on the data's
text. ULD needs no alignment: it matches the sorted probabilities of next-token distributions.

Departures: divergences are multiplied by tau and summed over the batch's spans, then divided by the
number of the student's target tokens, as in `KD`, so that gradients keep their scale. Spans are the
finest common ones. Where a token's end depends on the text that follows (most subword
vocabularies), the two sides' distributions of a fine span differ; as ALM does, the data set can end
spans only where that bias is small (ends="unbiased"), or only at words (data.two_tokenizers).
Hidden states are not matched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out
from jaxdistill.methods.language._fields import TEXT
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import following, targets
from jaxdistill.objectives.divergence import (
    chunked_log_mass,
    log_mass,
    masked_sum,
    sequence_mean,
    sorted_distance,
)
from jaxdistill.objectives.schedule import Schedule, follows_schedules, weighted
from jaxdistill.objectives.spans import ends, event_divergence, span_sum, unpacked


class Side(NamedTuple):
    """A network with the text in its own tokens."""

    outputs: Array  # logits [B T V]; with `chunk` the final hidden states [B T D]
    head: Array | None  # with `chunk` the output matrix [D V]
    batch: Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossTokenizerKD(KD):
    """ALM, on a data set of data.two_tokenizers."""

    # tau: the probabilities of spans are raised to 1 / tau; ALM's 100
    temperature: float | Schedule = 100.0

    needs = {
        **TEXT,
        "span": Int[Spec, "B T"],
        "teacher_tokens": Int[Spec, "B S"],
        "teacher_mask": Shaped[Spec, "B S"],
        "teacher_span": Int[Spec, "B S"],
    }
    unused = dict.fromkeys(
        ("top_k", "support", "tail"),
        "spans' probabilities need complete distributions",
    )

    def check(self, nets, data) -> None:
        """Nothing is refused: the vocabularies may differ."""

    @follows_schedules
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        teacher = self.side(net.teacher, teacher_text(ctx.batch))
        student = self.side(net.student, ctx.batch)
        each, paired = self.match(teacher, student)
        soft, pairs = masked_sum(each, paired)
        hard, count = masked_sum(self.nll(student), targets(ctx.batch)[1])
        total = self.reduced(each, paired, count)
        loss = (1 - self.hard_weight) * total + weighted(self.hard_weight, hard)
        return Out(
            loss, {"divergence": (soft, pairs), "cross_entropy": hard}, count=count
        )

    def side(self, call: Callable, batch: Batch) -> Side:
        head = call(method="unembedding") if self.chunk else None
        return Side(self.outputs(call, batch), head, batch)

    def reduced(
        self,
        each: Float[Array, "B N"],
        paired: Bool[Array, "B N"],
        count: Float[Array, ""],
    ) -> Float[Array, ""]:
        """The batch's divergence from those of its pairs, times `count`, the target tokens."""
        return masked_sum(each, paired)[0]

    def nll(self, side: Side) -> Float[Array, "B T"]:
        """-log q of the token after each."""
        return self.hard(side.outputs, following(side.batch["tokens"]), side.head)

    def match(
        self, teacher: Side, student: Side
    ) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
        """(divergence of every pair, whether there is such a pair).

        Here a pair is a span: D = f(p^(1/tau), q^(1/tau)) + f(1 - p^(1/tau), 1 - q^(1/tau)), where
        p and q are the probabilities of its text.
        """
        count = min(teacher.batch["span"].shape[1], student.batch["span"].shape[1])
        log_p, teacher_has = self.likelihoods(teacher, count)
        log_q, student_has = self.likelihoods(student, count)
        each = event_divergence(
            self.divergence, log_p, log_q, temperature=self.temperature
        )
        return each, teacher_has & student_has

    def likelihoods(
        self, side: Side, count: int
    ) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
        """(log-probability of every span's text, whether the sample has that span), N = `count`."""
        return span_sum(-self.nll(side), following(side.batch["span"], -1), count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpacedKD(CrossTokenizerKD):
    """ALM's "append_space": a span counts only if a token with white space in front, or a special
    one, follows.

    So a word that could go on differs from one that ends, which a span's tokens alone do not tell
    where the two sides split words differently. Spans at the end of a text stay as they are. The
    data set needs space=True.
    """

    needs = {**CrossTokenizerKD.needs, "space": Shaped[Spec, "B _"]}

    def likelihoods(self, side, count):
        log_q, present = super().likelihoods(side, count)
        outputs, head, batch = side
        vocab = (outputs if head is None else head).shape[-1]
        opens_word = unpacked(batch["space"][0], vocab)
        if self.chunk:
            after = chunked_log_mass(outputs, head, opens_word, chunk=self.chunk)
        else:
            after = log_mass(outputs, opens_word)
        ended = ends(batch["span"], targets(batch)[1])
        return log_q + span_sum(jnp.where(ended, after, 0.0), batch["span"], count)[
            0
        ], present


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULD(CrossTokenizerKD):
    """ULD as published: the i-th target token of the student with the i-th of the teacher, up to
    the shorter side.

    The loss is the mean over each sample's pairs, then over samples that have any, beside the mean
    of cross-entropy over tokens; with micro-batches it is that of each micro-batch.
    """

    # of both softmaxes
    temperature: float | Schedule = 1.0
    # CE + lambda ULD with the paper's lambda = 1.5, up to a factor
    hard_weight: float | Schedule = 0.4

    unused = {
        **CrossTokenizerKD.unused,
        **dict.fromkeys(
            ("divergence", "chunk"),
            "probabilities are sorted over the complete vocabulary",
        ),
    }

    def reduced(self, each, paired, count):
        samples = jnp.sum(jnp.any(paired, 1).astype(jnp.float32))
        return (
            count * jnp.sum(sequence_mean(each, paired)) / jnp.maximum(samples, 1.0)
        )

    def compared(self, batch: Batch) -> Bool[Array, "B T"]:
        """Whether the distribution of the next token is compared."""
        return targets(batch)[1]

    def match(self, teacher, student):
        at_teacher = self.compared(teacher.batch)
        at_student = self.compared(student.batch)
        count = min(at_teacher.shape[1], at_student.shape[1])
        p = first_marked(teacher.outputs, at_teacher, count)
        q = first_marked(student.outputs, at_student, count)
        pairs = jnp.minimum(at_teacher.sum(1), at_student.sum(1))
        each = sorted_distance(p, q, temperature=self.temperature)
        return each, jnp.arange(count) < pairs[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanULD(ULD):
    """ULD at the first token of each span, where both sides have read the same text."""

    def compared(self, batch):
        span = following(batch["span"], -1)
        return (span >= 0) & (span != batch["span"])


def teacher_text(batch: Batch) -> Batch:
    """The text in the teacher's tokens, under the names that the student's have."""
    prefix = "teacher_"
    return {
        k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)
    }


def first_marked(
    x: Float[Array, "B T V"], marked: Bool[Array, "B T"], count: int
) -> Float[Array, "B N V"]:
    """The first N = `count` marked entries of each sample, unmarked ones after them."""
    order = jnp.argsort(~marked, 1, stable=True)
    return jnp.take_along_axis(x, order[:, :count, None], 1)
