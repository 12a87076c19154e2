"""Knowledge distillation across tokenizers: approximate likelihood matching on aligned pieces of
text (ALM, arXiv:2503.20083), and universal logit distillation (ULD, arXiv:2402.12030).

Where teacher and student cut a text differently their next-token laws are over different things.
Pieces that are whole tokens on both sides are not: their probabilities, products over their tokens,
are matched on the data's text. ULD, which needs no alignment, matches the sorted probabilities of
next-token laws.

Departures: divergences are multiplied by tau and summed over the batch's spans, then divided by the
student's target tokens, as in `KD`, so that gradients keep their scale. Spans are the finest common
ones: where a token's end depends on what follows (most subword vocabularies), the two sides' laws
of a fine span differ. As ALM does, the data set can end spans only where that bias is small
(ends="unbiased"), or at words alone (data.two_tokenizers). No matching of hidden states.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Refused
from jaxdistill.methods.language._fields import changing
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import context, following, targets
from jaxdistill.objectives.divergence import (
    chunked_log_mass,
    log_mass,
    masked_sum,
    sequence_mean,
    sorted_distance,
)
from jaxdistill.objectives.schedule import Schedule, weighted
from jaxdistill.objectives.spans import ends, event_divergence, span_sum, unpacked

NEEDS = ("span", "teacher_tokens", "teacher_mask", "teacher_span")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossTokenizerKD(KD):
    """On a data set as data.two_tokenizers makes them."""

    temperature: float | Schedule = (
        100.0  # tau: spans' probabilities are raised to 1 / tau; ALM's 100
    )

    unused = dict.fromkeys(("top_k", "support", "tail"), "spans' probabilities need whole laws")

    def check(self, nets, data) -> None:
        missing = [name for name in NEEDS if name not in data.spec()]
        if missing:
            raise Refused(
                f"data: {type(data).__name__} has no {missing[0]}; expected text in both tokenizers, as in data.two_tokenizers"
            )

    @changing
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        batch = ctx.batch
        theirs = {
            k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")
        }
        run = lambda call, batch: call(
            batch["tokens"], hidden_only=self.chunk > 0, **context(batch)
        )
        head = lambda call: call(method="head") if self.chunk else None
        student = (run(net.student, batch), head(net.student), batch)
        each, where = self.match((run(net.teacher, theirs), head(net.teacher), theirs), student)
        soft, pairs = masked_sum(each, where)
        hard, count = masked_sum(self.nll(*student), targets(batch)[1])
        loss = (1 - self.hard_weight) * self.reduced(each, where, count) + weighted(
            self.hard_weight, hard
        )
        return Out(loss, {"divergence": (soft, pairs), "cross_entropy": hard}, count=count)

    def reduced(self, each: Array, where: Array, count: Array) -> Array:
        """The batch's divergence, to be divided by its `count` of target tokens, from those of the
        pairs [B N]: their sum.
        """
        return masked_sum(each, where)[0]

    def nll(self, out: Array, head: Array | None, batch: Batch) -> Array:
        """-log of the token after each of a side's own, [B T]."""
        return self.hard(out, following(batch["tokens"]), head)

    def match(self, teacher, student) -> tuple[Array, Array]:
        """(divergence of every pair, whether there is one), [B N], from either side's (outputs [B T
        ...], head, batch).

        Here a pair is a span: f(p^(1/tau), q^(1/tau)) + f(1 - p^(1/tau), 1 - q^(1/tau)), p and q of
        the text that it has.
        """
        count = min(teacher[2]["span"].shape[1], student[2]["span"].shape[1])
        (log_p, theirs), (log_q, ours) = (
            self.likelihoods(side, count) for side in (teacher, student)
        )
        return event_divergence(
            self.kind, log_p, log_q, temperature=self.temperature, **self.options
        ), theirs & ours

    def likelihoods(self, side, count: int) -> tuple[Array, Array]:
        """(log-probability of every span's text, whether the row has that span), [B count]."""
        return span_sum(-self.nll(*side), following(side[2]["span"], -1), count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpacedKD(CrossTokenizerKD):
    """ALM's "append_space": a span's event is its text, and after it a token that begins with white
    space or is special. So a word that could go on is told from one that ends, which a span's
    tokens alone do not say where the two sides cut words differently. Spans at the end of a text
    stay as they are. On data with "space" (data.two_tokenizers, space=True).
    """

    def check(self, nets, data) -> None:
        super().check(nets, data)
        if "space" not in data.spec():
            raise Refused(
                f"data: {type(data).__name__} does not say which tokens begin with a space; expected data.space=True"
            )

    def likelihoods(self, side, count: int) -> tuple[Array, Array]:
        (log_q, present), (out, head, batch) = super().likelihoods(side, count), side
        members = unpacked(batch["space"][0], (out if head is None else head).shape[-1])
        after = (
            chunked_log_mass(out, head, members, chunk=self.chunk)
            if self.chunk
            else log_mass(out, members)
        )
        ended = ends(batch["span"], targets(batch)[1])
        return log_q + span_sum(jnp.where(ended, after, 0.0), batch["span"], count)[0], present


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULD(CrossTokenizerKD):
    """ULD as published: the i-th target of the student's tokens with the i-th of the teacher's, up
    to the shorter; the mean over each row's pairs and then over rows that have any, beside the mean
    of cross-entropy over tokens. With micro-batches, of each of these.
    """

    temperature: float | Schedule = 1.0  # of both softmaxes
    hard_weight: float | Schedule = (
        0.4  # CE + lambda ULD with the paper's lambda = 1.5, up to a factor
    )

    unused = {
        **CrossTokenizerKD.unused,
        **dict.fromkeys(
            ("kind", "params", "chunk"), "probabilities are sorted over the whole vocabulary"
        ),
    }

    def reduced(self, each: Array, where: Array, count: Array) -> Array:
        rows = jnp.sum(jnp.any(where, 1).astype(jnp.float32))
        return count * jnp.sum(sequence_mean(each, where)) / jnp.maximum(rows, 1.0)

    def at(self, batch: Batch) -> Array:
        """After which tokens the next is compared, bool [B T]."""
        return targets(batch)[1]

    def match(self, teacher, student) -> tuple[Array, Array]:
        places = [self.at(batch) for _, _, batch in (teacher, student)]
        count = min(place.shape[1] for place in places)
        pick = lambda out, place: jnp.take_along_axis(
            out, jnp.argsort(~place, 1, stable=True)[:, :count, None], 1
        )
        laws = [pick(out, place) for (out, _, _), place in zip((teacher, student), places)]
        least = jnp.minimum(*(place.sum(1) for place in places))
        return sorted_distance(*laws, temperature=self.temperature), jnp.arange(count) < least[
            :, None
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanULD(ULD):
    """The same where both have read the same text: at the first token of each span."""

    def at(self, batch: Batch) -> Array:
        after = following(batch["span"], -1)
        return (after >= 0) & (after != batch["span"])
