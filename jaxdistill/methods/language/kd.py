"""Knowledge distillation on logits (arXiv:1503.02531), token by token on given text
(arXiv:1606.07947).

At every target token of the data the student's next-token distribution is matched to the teacher's
by a divergence, and to the data's own token by cross-entropy. The loss is the weighted sum of both
over the batch's target tokens, divided by their number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jaxtyping import Float, Int, Shaped

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Batch, Ctx, Method, Nets, Out, Refused
from jaxdistill.methods.language._fields import (
    TEXT,
    check_divergence_fields,
    refuse_unused,
)
from jaxdistill.models.language.lm import context, same_vocabulary, targets
from jaxdistill.objectives import divergence
from jaxdistill.objectives.divergence import Divergence, ForwardKL
from jaxdistill.objectives.schedule import Schedule, follows_schedules, weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class KD(Method):
    """The student learns from the teacher's logits on the data's text.

    `temperature`, `hard_weight` and the parameters of the divergence are numbers or schedules.
    """

    # Divergence between the teacher's and the student's next-token distributions, an object with
    # parameters of its own, e.g. ForwardKL(), ReverseKL().
    divergence: Divergence = ForwardKL()
    # Temperature tau of both softmaxes. The divergence is multiplied by tau^2, so that the scale of
    # its gradients does not depend on tau.
    temperature: float | Schedule = 1.0
    # Weight of the cross-entropy to the data's tokens; the divergence has weight 1 - hard_weight.
    hard_weight: float | Schedule = 0.0
    # Number of likeliest tokens that are compared one by one; 0: the complete vocabulary.
    top_k: int = 0
    # Network whose likeliest tokens these are: teacher | student. Those of the student suit the
    # reverse KL.
    support: str = "teacher"
    # All other tokens. bucket: merged into one outcome; dropped: left out, and both distributions
    # are renormalised.
    tail: str = "bucket"
    # Number of vocabulary entries whose logits are computed at a time, to save memory; the loss is
    # the same. 0: all at once.
    chunk: int = 0

    needs = TEXT
    inits = {"student": None}
    ema = ()
    # Fields that a subclass inherits and does not read -> the reason.
    unused: ClassVar[Mapping[str, str]] = {}
    renamed: ClassVar[Mapping[str, str]] = {
        "kind": "divergence",
        "beta": "divergence.beta",
    }

    def __post_init__(self):
        refuse_unused(self)  # raises Refused if a field without effect is set
        check_divergence_fields(self)
        if self.top_k and self.chunk:
            given = f"method.top_k={self.top_k}"
            raise Refused(
                f"{given} needs whole rows of logits, hence method.chunk=0"
            )

    @classmethod
    def upgraded(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Config fields with `kind`, `params` and `beta` of version 0.1 as a divergence."""
        return divergence.from_kind(given)

    def check(self, nets, data) -> None:
        """Raises Refused if teacher and student have different vocabularies."""
        same_vocabulary(self, nets)

    @follows_schedules  # in the body, schedule fields of `self` are their values at ctx.step
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        teacher = self.outputs(net.teacher, ctx.batch)
        student = self.outputs(net.student, ctx.batch)
        return self.compare(net, teacher, student, ctx.batch)

    def outputs(self, call: Callable, batch: Batch) -> Float[Array, "B T _"]:
        """A network's logits [B T V]; with `chunk` its final hidden states [B T D].

        `context` passes on the batch's `segments` and `positions` (packed sequences), if present.
        """
        return call(batch["tokens"], hidden_only=self.chunk > 0, **context(batch))

    def heads(self, net: Nets) -> tuple[Array | None, Array | None]:
        """With `chunk` the output matrices [D V] of teacher and student, else two None."""
        if not self.chunk:
            return None, None
        return net.teacher(method="unembedding"), net.student(method="unembedding")

    def compare(
        self, net: Nets, teacher: Any, student: Float[Array, "B T _"], batch: Batch
    ) -> Out:
        """(1 - hard_weight) divergence + hard_weight cross-entropy, summed over target tokens.

        `student` is what `outputs` returns. `teacher` is the same for the teacher, or anything else
        that the class's `soft` accepts.
        """
        labels, mask = targets(batch)
        teacher_head, student_head = self.heads(net)
        each = self.soft(teacher, student, teacher_head, student_head)
        soft, _ = divergence.masked_sum(each, mask)
        each = self.hard(student, labels, student_head)
        hard, count = divergence.masked_sum(each, mask)
        # With hard_weight=0 `weighted` gives exactly 0 even if the cross-entropy is not finite; the
        # divergence is always in the loss.
        loss = (1 - self.hard_weight) * soft + weighted(self.hard_weight, hard)
        return Out(loss, {"divergence": soft, "cross_entropy": hard}, count=count)

    def soft(
        self,
        teacher: Any,
        student: Float[Array, "B T _"],
        teacher_head: Array | None = None,
        student_head: Array | None = None,
    ) -> Float[Array, "B T"]:
        """tau^2 D(softmax(teacher / tau), softmax(student / tau)) at every position.

        Logits at position i predict token i + 1.
        """
        between = self.divergence
        options: dict[str, Any] = {"temperature": self.temperature}
        if self.chunk:
            sides = (teacher, teacher_head, student, student_head)
            return divergence.chunked_divergence(
                between, *sides, chunk=self.chunk, **options
            )
        if self.top_k:
            options |= {"support": self.support, "tail": self.tail}
            k = self.top_k
            return divergence.restricted_divergence(
                between, teacher, student, k, **options
            )
        return divergence.token_divergence(between, teacher, student, **options)

    def hard(
        self,
        student: Float[Array, "B T _"],
        labels: Int[Array, "B T"],
        head: Array | None,
    ) -> Float[Array, "B T"]:
        """-log q(label) at every position, at temperature 1.

        The label of position i is token i + 1.
        """
        if self.chunk:
            return divergence.chunked_cross_entropy(
                student, head, labels, chunk=self.chunk
            )
        return divergence.cross_entropy(student, labels)


FIXED_BY_FILE = "it has no effect on stored logits, whose tokens the file fixes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredKD(KD):
    """KD from a file of the teacher's K likeliest tokens at every position, in place of a teacher.

    tools/store_logits.py writes the file, for one `top_k` and one `temperature`, and
    data.logits:StoredLogits reads it.
    """

    frozen = ()
    needs = {
        **TEXT,
        "teacher_ids": Int[Spec, "B T K"],
        "teacher_log_probs": Shaped[Spec, "B T K"],
        "teacher_log_tail": Shaped[Spec, "B T"],
    }
    unused = dict.fromkeys(("top_k", "support", "chunk"), FIXED_BY_FILE)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.temperature, Schedule):
            expected = "expected the number that the store was made with"
            raise Refused(f"method.temperature: a schedule, {expected}")

    def check(self, nets, data) -> None:
        """Raises Refused if the file of logits has another temperature or vocabulary."""
        store = data.store
        vocab = getattr(nets["student"].config, "vocab", store["vocab"])
        if (vocab, self.temperature) != (store["vocab"], store["temperature"]):
            stored = (
                f"of {store['vocab']} tokens at temperature {store['temperature']}"
            )
            expected = (
                f"the student's {vocab} at method.temperature={self.temperature}"
            )
            raise Refused(f"data.path={data.path}: {stored}, expected {expected}")

    @follows_schedules
    def loss(self, net: Nets, ctx: Ctx) -> Out:
        # What `soft` of this class takes for the teacher: ids and log-probabilities of the K
        # likeliest tokens, and the log-probability of all others together.
        batch = ctx.batch
        teacher = (
            batch["teacher_ids"],
            batch["teacher_log_probs"],
            batch["teacher_log_tail"],
        )
        student = self.outputs(net.student, batch)
        return self.compare(net, teacher, student, batch)

    def soft(self, teacher, student, teacher_head=None, student_head=None):
        ids, log_probs, log_tail = teacher
        if self.tail == "dropped":
            log_tail = None
        kept = (ids, log_probs, log_tail)
        tau = self.temperature
        return divergence.topk_divergence(
            self.divergence, *kept, student, temperature=tau
        )
