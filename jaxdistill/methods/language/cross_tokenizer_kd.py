"""Knowledge distillation across tokenizers: approximate likelihood matching on aligned pieces of text (ALM, arXiv:2503.20083),
and universal logit distillation (ULD, arXiv:2402.12030).

Where teacher and student cut a text differently their next-token laws are over different things. Pieces that are whole
tokens on both sides are not: their probabilities, products over their tokens, are matched on the data's text. ULD, which
needs no alignment, matches the sorted probabilities of next-token laws.

Departures: divergences are multiplied by tau and summed over the batch's spans, then divided by the student's target tokens,
as in `KD`, so that gradients keep their scale. Spans are the finest common ones: where a token's end depends on what
follows (most subword vocabularies), the two sides' laws of a fine span differ; ALM leaves biased ones out, here the data
set may end spans at words alone (data.two_tokenizers). No matching of hidden states.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Refused
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.lm import context, following, targets
from jaxdistill.objectives.divergence import masked_sum, sorted_distance
from jaxdistill.objectives.spans import event_divergence, span_sum

NEEDS = ("span", "teacher_tokens", "teacher_mask", "teacher_span")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossTokenizerKD(KD):
    """On a data set as data.two_tokenizers makes them."""

    temperature: float = 100.0  # tau: spans' probabilities are raised to 1 / tau; ALM's 100

    def __post_init__(self):
        super().__post_init__()
        if self.top_k:
            raise Refused(f"method.top_k={self.top_k}: expected 0, for spans' probabilities need whole laws")

    def check(self, nets, data) -> None:
        missing = [name for name in NEEDS if name not in data.spec()]
        if missing:
            raise Refused(f"data: {type(data).__name__} has no {missing[0]}; expected text in both tokenizers, as in data.two_tokenizers")

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        batch = ctx.batch
        theirs = {k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")}
        run = lambda call, batch: call(batch["tokens"], hidden_only=self.chunk > 0, **context(batch))
        head = lambda call: call(method="head") if self.chunk else None
        student = (run(net.student, batch), head(net.student), batch)
        each, where = self.match((run(net.teacher, theirs), head(net.teacher), theirs), student)
        soft, pairs = masked_sum(each, where)
        hard, count = masked_sum(self.nll(*student), targets(batch)[1])
        loss = (1 - self.hard_weight) * soft + (self.hard_weight * hard if self.hard_weight else 0.0)
        return Out(loss, {"divergence": (soft, pairs), "cross_entropy": hard}, count=count)

    def nll(self, out: Array, head: Array | None, batch: Batch) -> Array:
        """-log of the token after each of a side's own, [B T]."""
        return self.hard(out, following(batch["tokens"]), head)

    def match(self, teacher, student) -> tuple[Array, Array]:
        """(divergence of every pair, whether there is one), [B N], from either side's (outputs [B T ...], head, batch).

        Here a pair is a span: f(p^(1/tau), q^(1/tau)) + f(1 - p^(1/tau), 1 - q^(1/tau)), p and q of the text that it has.
        """
        count = min(teacher[2]["span"].shape[1], student[2]["span"].shape[1])
        total = lambda side: span_sum(-self.nll(*side), following(side[2]["span"], -1), count)
        (log_p, theirs), (log_q, ours) = total(teacher), total(student)
        return event_divergence(self.kind, log_p, log_q, temperature=self.temperature, **self.options), theirs & ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULD(CrossTokenizerKD):
    """ULD as published: the i-th target of the student's tokens with the i-th of the teacher's, up to the shorter."""

    temperature: float = 1.0  # of both softmaxes
    hard_weight: float = 0.4  # CE + lambda ULD with the paper's lambda = 1.5, up to a factor

    def __post_init__(self):
        super().__post_init__()
        if self.chunk:
            raise Refused(f"method.chunk={self.chunk}: expected 0, for probabilities are sorted over the whole vocabulary")

    def at(self, batch: Batch) -> Array:
        """After which tokens the next is compared, bool [B T]."""
        return targets(batch)[1]

    def match(self, teacher, student) -> tuple[Array, Array]:
        places = [self.at(batch) for _, _, batch in (teacher, student)]
        count = min(place.shape[1] for place in places)
        pick = lambda out, place: jnp.take_along_axis(out, jnp.argsort(~place, 1, stable=True)[:, :count, None], 1)
        laws = [pick(out, place) for (out, _, _), place in zip((teacher, student), places)]
        least = jnp.minimum(*(place.sum(1) for place in places))
        return sorted_distance(*laws, temperature=self.temperature), jnp.arange(count) < least[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanULD(ULD):
    """The same where both have read the same text: at the first token of each span."""

    def at(self, batch: Batch) -> Array:
        after = following(batch["span"], -1)
        return (after >= 0) & (after != batch["span"])
