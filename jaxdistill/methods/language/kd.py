"""Knowledge distillation on logits (arXiv:1503.02531), word by word on given text
(arXiv:1606.07947).

At every target token of the data the student's next-token law is drawn to the teacher's, by a
divergence of choice, and to the data's own token by cross-entropy. Both are sums over the batch's
target tokens divided by their number.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxdistill.core.types import Array, Batch, Ctx, Method, Nets, Out, Refused, Turn, lookup
from jaxdistill.methods.language._fields import changing, check_shares, refuse_unused
from jaxdistill.models.language.lm import context, same_vocabulary, targets
from jaxdistill.objectives import divergence
from jaxdistill.objectives.schedule import Schedule, weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class KD(Method):
    """Temperature, hard_weight and the kind's parameters are numbers or schedules
    (objectives.schedule).
    """

    # divergence of the student's law from the teacher's, a key of objectives.divergence.KINDS
    kind: str = "forward_kl"
    # the kind's own: beta of jsd, alpha of the skew kinds, mass of adaptive_kl; None: their
    # defaults
    params: Any = None
    temperature: float | Schedule = (
        1.0  # of both softmaxes; the divergence is multiplied by its square
    )
    hard_weight: float | Schedule = (
        0.0  # of cross-entropy to the data's tokens; the divergence has 1 - hard_weight
    )
    top_k: int = 0  # likeliest tokens that are compared one by one; 0: every token
    support: str = "teacher"  # whose likeliest: teacher | student, which suits the reverse KL
    # all others are one more outcome (bucket) | left out, both laws renormalised (dropped)
    tail: str = "bucket"
    # vocabulary columns projected at a time, which saves memory and changes nothing else; 0: all
    chunk: int = 0

    inits = {"student": None}
    ema = ()
    unused: ClassVar[
        Mapping[str, str]
    ] = {}  # inherited fields that this class does not read -> why

    def __post_init__(self):
        refuse_unused(self)
        check_shares(self)
        kind = lookup(divergence.KINDS, self.kind, "method.kind")
        for name in self.options:
            if name not in inspect.signature(kind).parameters:
                raise Refused(f"method.kind={self.kind!r} has no parameter {name!r}")
        if self.top_k and self.chunk:
            raise Refused(
                f"method.top_k={self.top_k} needs whole rows of logits, hence method.chunk=0"
            )

    @property
    def options(self) -> Mapping[str, float]:
        """Parameters of the divergence."""
        return self.params or {}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def check(self, nets, data) -> None:
        same_vocabulary(self, nets)

    @changing
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        run = lambda call: call(
            ctx.batch["tokens"], hidden_only=self.chunk > 0, **context(ctx.batch)
        )
        return self.compare(net, run(net.teacher), run(net.student), ctx.batch)

    def compare(self, net: Nets, teacher: Array, student: Array, batch: Batch) -> Out:
        """The loss from both networks' logits [B T V], or with `chunk` from their final states [B T
        D].
        """
        labels, mask = targets(batch)
        heads = (
            (net.teacher(method="head"), net.student(method="head")) if self.chunk else (None, None)
        )
        soft, _ = divergence.masked_sum(self.soft(teacher, student, *heads), mask)
        hard, count = divergence.masked_sum(self.hard(student, labels, heads[1]), mask)
        loss = (1 - self.hard_weight) * soft + weighted(self.hard_weight, hard)
        return Out(loss, {"divergence": soft, "cross_entropy": hard}, count=count)

    def soft(
        self, teacher: Array, student: Array, teacher_head: Array | None, student_head: Array | None
    ) -> Array:
        """T^2 D(softmax(teacher / T), softmax(student / T)) of every token, [B T]."""
        options = {"temperature": self.temperature, **self.options}
        if self.chunk:
            return divergence.chunked_divergence(
                self.kind, teacher, teacher_head, student, student_head, chunk=self.chunk, **options
            )
        if self.top_k:
            how = {"support": self.support, "tail": self.tail, **options}
            return divergence.restricted_divergence(self.kind, teacher, student, self.top_k, **how)
        return divergence.token_divergence(self.kind, teacher, student, **options)

    def hard(self, student: Array, labels: Array, head: Array | None) -> Array:
        """-log q(label) of every token, [B T], at temperature 1."""
        if self.chunk:
            return divergence.chunked_cross_entropy(student, head, labels, chunk=self.chunk)
        return divergence.cross_entropy(student, labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredKD(KD):
    """The teacher is a store of its likeliest tokens (tools/store_logits.py), read by
    data.logits:StoredLogits: KD with the `top_k` and `temperature` that it was made with.
    """

    frozen = ()
    unused = dict.fromkeys(("top_k", "support", "chunk"), "the store has said what it keeps")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.temperature, Schedule):
            raise Refused(
                "method.temperature: a schedule, expected the number that the store was made with"
            )

    def check(self, nets, data) -> None:
        if not hasattr(data, "store"):
            raise Refused(
                f"data: {type(data).__name__} holds no teacher; expected data.logits:StoredLogits (tools/store_logits.py)"
            )
        vocab = getattr(nets["student"].config, "vocab", data.store["vocab"])
        if (vocab, self.temperature) != (data.store["vocab"], data.store["temperature"]):
            raise Refused(
                f"data.path={data.path}: of {data.store['vocab']} tokens at temperature {data.store['temperature']}, "
                f"expected the student's {vocab} at method.temperature={self.temperature}"
            )

    @changing
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        kept = tuple(ctx.batch[f"teacher_{name}"] for name in ("ids", "log_probs", "log_tail"))
        return self.compare(
            net, kept, net.student(ctx.batch["tokens"], **context(ctx.batch)), ctx.batch
        )

    def soft(self, teacher: tuple[Array, ...], student: Array, *_) -> Array:
        ids, kept, rest = teacher
        rest = rest if self.tail == "bucket" else None
        return divergence.topk_divergence(
            self.kind, ids, kept, rest, student, temperature=self.temperature, **self.options
        )
