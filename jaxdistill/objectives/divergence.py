"""Divergences between two next-token distributions: p the teacher's, q the student's.

A divergence is a small dataclass with its own parameters. Called on logits, it gives one value per
token at temperature 1. The functions of this file take any divergence, at any temperature: over the
whole vocabulary (`token_divergence`), over the k likeliest tokens (`topk_divergence`,
`restricted_divergence`), or chunk by chunk together with the projection of the hidden states
(`chunked_divergence`). Only `masked_sum` and `sequence_mean` reduce over tokens. Everything is
computed in float32, or in float64 where that is given.

Sources: GKD arXiv:2306.13649 (Jensen-Shannon), DistiLLM arXiv:2402.03898 (skew divergences),
arXiv:2404.02657 (adaptive KL).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from jaxdistill.core.rows import by_rows, keep, project
from jaxdistill.core.types import Array, Refused, lookup
from jaxdistill.objectives.numerics import wide
from jaxdistill.objectives.schedule import Schedule, bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """Base of all divergences. A subclass gives `of`, or `summand` where it is a `Sum`."""

    def __call__(
        self, teacher: Shaped[Array, "*B V"], student: Shaped[Array, "*B V"]
    ) -> Float[Array, "*B"]:
        """D(p, q) of every token, from logits."""
        return self.of(_log_softmax(teacher), _log_softmax(student))

    def of(
        self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
    ) -> Float[Array, "*B"]:
        """D(p, q) of every token, from log-probabilities."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum(Divergence):
    """Base of the divergences that are a sum over the vocabulary of some d(log p_v, log q_v)."""

    def summand(
        self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
    ) -> Float[Array, "*B V"]:
        """d(log p_v, log q_v)."""
        raise NotImplementedError

    def of(self, log_p, log_q):
        return jnp.sum(self.summand(log_p, log_q), -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardKL(Sum):
    """KL(p || q), which seeks the mean. Its gradient in the student's logits is q - p."""

    def summand(self, log_p, log_q):
        return _kl(log_p, log_q)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseKL(Sum):
    """KL(q || p), which seeks a mode."""

    def summand(self, log_p, log_q):
        return _kl(log_q, log_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JensenShannon(Sum):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD).

    For beta = 0.5 it is at most log 2. At beta = 0 and 1, where its value would be 0, it is the
    limit of JSD / beta and of JSD / (1 - beta): KL(p || q) and KL(q || p).
    """

    # towards 0 it acts like the forward KL, towards 1 like the reverse KL; GKD's 0.1, 0.5 and 0.9,
    # the best of which depends on the task
    beta: float | Schedule = 0.5

    def __post_init__(self):
        least, most = bounds(self.beta)
        if not 0 <= least <= most <= 1:
            raise Refused(f"beta={self.beta}: expected 0 to 1")

    def summand(self, log_p, log_q):
        beta = self.beta
        if isinstance(beta, Array):  # the number that a schedule gives at a step
            inside = (beta > 0) & (beta < 1)
            between = _jensen_shannon(log_p, log_q, jnp.where(inside, beta, 0.5))
            limit = jnp.where(beta > 0, _kl(log_q, log_p), _kl(log_p, log_q))
            return jnp.where(inside, between, limit)
        if beta == 0:
            return _kl(log_p, log_q)
        if beta == 1:
            return _kl(log_q, log_p)
        return _jensen_shannon(log_p, log_q, beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewKL(Sum):
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM), which is at most -log alpha."""

    alpha: float | Schedule = 0.1

    def summand(self, log_p, log_q):
        return _kl(log_p, _mix(self.alpha, log_p, log_q))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewReverseKL(Sum):
    """KL(q || alpha q + (1 - alpha) p) (DistiLLM), which is at most -log alpha."""

    alpha: float | Schedule = 0.1

    def summand(self, log_p, log_q):
        return _kl(log_q, _mix(self.alpha, log_q, log_p))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TotalVariation(Sum):
    """Half the L1 distance, which is at most 1, and at most sqrt(KL / 2)."""

    def summand(self, log_p, log_q):
        return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveKL(Divergence):
    """w KL(p || q) + (1 - w) KL(q || p), where w is the share of sum |p - q| that lies in the
    teacher's head (AKL, arXiv:2404.02657).

    The head is the smallest set of most likely tokens that have at least `mass` together; w is
    under stop_gradient.
    """

    mass: float | Schedule = 0.5

    def of(self, log_p, log_q):
        p = jnp.exp(log_p)
        gap = jnp.abs(p - jnp.exp(log_q))
        order = jnp.argsort(-p, axis=-1)
        p = jnp.take_along_axis(p, order, -1)
        gap = jnp.take_along_axis(gap, order, -1)
        head = jnp.cumsum(p, -1) - p < self.mass
        total = jnp.sum(gap, -1)
        share = jnp.sum(gap * head, -1) / jnp.where(total > 0, total, 1.0)
        w = jax.lax.stop_gradient(share)
        return w * jnp.sum(_kl(log_p, log_q), -1) + (1 - w) * jnp.sum(
            _kl(log_q, log_p), -1
        )


NAMES = {  # as configs of version 0.1 name them
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JensenShannon,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "total_variation": TotalVariation,
    "adaptive_kl": AdaptiveKL,
}


def described(name: str, **parameters: Any) -> dict[str, Any]:
    """The config of the divergence called `name` in version 0.1. Raises Refused on another name."""
    cls = lookup(NAMES, name, "divergence")
    return {"name": f"objectives.divergence:{cls.__name__}", **parameters}


def from_kind(given: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields of a method in which those of version 0.1 have become `divergence`.

    These were `kind`, its parameters as `params`, and `beta`, which only the Jensen-Shannon
    divergence had. A `divergence` that is text is the name of one.
    """
    given = dict(given)
    kind = given.pop("kind", None)
    parameters = dict(given.pop("params", None) or {})
    beta = given.pop("beta", None)
    if beta is not None and kind in (None, "jsd"):
        kind = "jsd"
        parameters["beta"] = beta
    if isinstance(given.get("divergence"), str):
        kind = given.pop("divergence")
    if kind is not None:
        given["divergence"] = described(kind, **parameters)
    return given


def from_kinds(given: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields of a method in which `kinds` of version 0.1 have become `divergences`.

    Their Jensen-Shannon divergences had the method's `beta`. Entries of `divergences` that are text
    are names as well.
    """
    given = dict(given)
    kinds = given.pop("kinds", given.get("divergences"))
    if kinds is None:
        return given
    beta = given.get("beta")
    made = []
    for kind in kinds:
        if kind == "jsd" and beta is not None:
            kind = described(kind, beta=beta)
        elif isinstance(kind, str):
            kind = described(kind)
        made.append(kind)
    return {**given, "divergences": tuple(made)}


def common(*logits: Shaped[Array, "... _"]) -> tuple[Shaped[Array, "... V"], ...]:
    """Logits over the ids that all models have: the columns beyond the smallest vocabulary are cut.

    Models of one tokenizer have tables padded to different lengths (Qwen2.5: 152,064 rows at 7B,
    151,936 at 0.5B), and what lies beyond the shorter one is padding. Whether the tokenizer is the
    same is checked by `models.language.lm.same_vocabulary`.
    """
    least = min(z.shape[-1] for z in logits)
    return tuple(z if z.shape[-1] == least else z[..., :least] for z in logits)


def token_divergence(
    divergence: Divergence,
    teacher: Shaped[Array, "*B V"],
    student: Shaped[Array, "*B W"],
    *,
    temperature: float | Array = 1.0,
) -> Float[Array, "*B"]:
    """T^2 D(softmax(teacher / T), softmax(student / T)) of every token, from logits.

    The factor keeps the scale of the gradients. Vocabularies of different sizes are compared on
    their `common` ids.
    """
    teacher, student = common(teacher, student)

    def at_temperature(*logits: Array) -> Array:
        return divergence(*(wide(z) / temperature for z in logits))

    return temperature**2 * by_rows(at_temperature, teacher, student)


def sorted_distance(
    teacher: Shaped[Array, "*B V"],
    student: Shaped[Array, "*B W"],
    *,
    temperature: float | Array = 1.0,
) -> Float[Array, "*B"]:
    """sum_i |p_(i) - q_(i)| of the probabilities in falling order (ULD, arXiv:2402.12030).

    The vocabularies are any two; the shorter distribution is filled up with zeros. It is at most 2,
    and 0 where one distribution is a permutation of the other.
    """
    size = max(teacher.shape[-1], student.shape[-1])

    def ranked(logits: Array) -> Array:
        p = jnp.sort(jax.nn.softmax(wide(logits) / temperature), descending=True)
        before = [(0, 0)] * (p.ndim - 1)
        return jnp.pad(p, [*before, (0, size - p.shape[-1])])

    return jnp.sum(jnp.abs(ranked(teacher) - ranked(student)), -1)


def topk_log_probs(
    teacher: Shaped[Array, "*B V"], k: int, *, temperature: float | Array = 1.0
) -> tuple[Int[Array, "*B k"], Float[Array, "*B k"], Float[Array, "*B"]]:
    """The teacher's k likeliest tokens: their ids, their log-probabilities, and the log-probability
    of all other tokens together.

    Raises:
      Refused: unless 0 < k < V.
    """
    vocab = teacher.shape[-1]
    if not 0 < k < vocab:
        expected = f"expected 1 to {vocab - 1}, fewer than the {vocab} tokens of the vocabulary"
        raise Refused(f"k={k}: {expected}")
    log_p = _log_softmax(wide(teacher) / temperature)
    ids = jax.lax.top_k(log_p, k)[1]
    kept, rest = _buckets(log_p, ids)
    return ids, kept, rest


def topk_divergence(
    divergence: Divergence,
    ids: Int[Array, "*B k"],
    log_probs: Shaped[Array, "*B k"],
    log_tail: Shaped[Array, "*B"] | None,
    student: Shaped[Array, "*B V"],
    *,
    temperature: float | Array = 1.0,
) -> Float[Array, "*B"]:
    """`token_divergence` over k + 1 outcomes: the teacher's k tokens, and all others together.

    No KL is negative, or larger than that of the full distributions (data processing).

    Args:
      ids, log_probs, log_tail: from `topk_log_probs` at the same temperature. Where `log_tail` is
        None, the k tokens are the only outcomes, both distributions are renormalised over them, and
        the probability that the student gives to other tokens has no effect.
      student: logits.
    """
    log_q = _log_softmax(wide(student) / temperature)
    log_p = wide(log_probs)
    if log_tail is None:
        log_q = jnp.take_along_axis(log_q, ids, -1)
    else:
        log_p = jnp.concatenate([log_p, _at_least(wide(log_tail))[..., None]], -1)
        kept, rest = _buckets(log_q, ids)
        log_q = jnp.concatenate([kept, rest[..., None]], -1)
    return temperature**2 * token_divergence(divergence, log_p, log_q)


# whose likeliest tokens are compared one by one
Support = Literal["teacher", "student"]
SUPPORTS = ("teacher", "student")
# all other tokens are one more outcome, or left out with both distributions renormalised
Tail = Literal["bucket", "dropped"]
TAILS = ("bucket", "dropped")


def restricted_divergence(
    divergence: Divergence,
    teacher: Shaped[Array, "*B V"],
    student: Shaped[Array, "*B W"],
    k: int,
    *,
    support: Support = "teacher",
    tail: Tail = "bucket",
    temperature: float | Array = 1.0,
) -> Float[Array, "*B"]:
    """`topk_divergence` of logits on the k likeliest tokens of the teacher or of the student.

    No gradient flows through the choice of tokens. The teacher's support suits the forward KL,
    whose summands it weighs, and the student's support the reverse KL.

    Raises:
      Refused: unless 0 < k < V.
    """
    teacher, student = common(teacher, student)
    if support == "teacher":
        ids, kept, rest = topk_log_probs(teacher, k, temperature=temperature)
    else:
        ids = topk_log_probs(jax.lax.stop_gradient(student), k)[0]
        kept, rest = _buckets(_log_softmax(wide(teacher) / temperature), ids)
    if tail == "dropped":
        rest = None
    return topk_divergence(
        divergence, ids, kept, rest, student, temperature=temperature
    )


def chunked_divergence(
    divergence: Divergence,
    teacher_hidden: Shaped[Array, "*B D"],
    teacher_head: Shaped[Array, "D V"],
    student_hidden: Shaped[Array, "*B E"],
    student_head: Shaped[Array, "E W"],
    *,
    chunk: int,
    temperature: float | Array = 1.0,
) -> Float[Array, "*B"]:
    """`token_divergence` of hidden @ head that never holds more than `chunk` logits of a token.

    A first pass over the vocabulary gives both normalisers, a second one the divergence; the
    backward pass projects again. A chunk takes every n-th column, so that a vocabulary that is
    sharded over devices stays where it is. Heads of different lengths are compared on their
    `common` ids.

    Raises:
      Refused: on a divergence that is no `Sum` (`AdaptiveKL` sorts the vocabulary).
    """
    if not isinstance(divergence, Sum):
        sums = [cls.__name__ for cls in NAMES.values() if issubclass(cls, Sum)]
        name = type(divergence).__name__
        raise Refused(
            f"{name} sorts the whole vocabulary: expected one of {', '.join(sums)}"
        )
    teacher_head, student_head = common(teacher_head, student_head)
    real, teacher_columns = _columns(teacher_head, chunk)
    student_columns = _columns(student_head, chunk)[1]
    p_norm = _log_norm(teacher_hidden, real, teacher_columns, temperature)[
        ..., None
    ]
    q_norm = _log_norm(student_hidden, real, student_columns, temperature)[
        ..., None
    ]

    def add(total: Array, columns: tuple[Array, ...]) -> tuple[Array, None]:
        real, teacher_part, student_part = columns
        log_p = _project(teacher_hidden, teacher_part) / temperature - p_norm
        log_q = _project(student_hidden, student_part) / temperature - q_norm
        summands = divergence.summand(log_p, log_q)
        return total + jnp.sum(jnp.where(real, summands, 0.0), -1), None

    zero = jnp.zeros_like(q_norm[..., 0])
    total, _ = jax.lax.scan(
        _recompute(add), zero, (real, teacher_columns, student_columns)
    )
    return temperature**2 * total


def cross_entropy(
    logits: Shaped[Array, "*B V"], labels: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """-log q(label) of every token."""
    return -jnp.take_along_axis(_log_softmax(logits), labels[..., None], -1)[..., 0]


def chunked_cross_entropy(
    hidden: Shaped[Array, "*B D"],
    head: Shaped[Array, "D V"],
    labels: Int[Array, "*B"],
    *,
    chunk: int,
) -> Float[Array, "*B"]:
    """`cross_entropy` of hidden @ head that never holds more than `chunk` logits of a token."""
    columns = jnp.take(head.T, labels, axis=0)
    precision = jnp.promote_types(hidden.dtype, jnp.float32)
    label = jnp.einsum(
        "...d,...d->...", hidden, columns, preferred_element_type=precision
    )
    return _log_norm(hidden, *_columns(head, chunk)) - label


def log_mass(
    logits: Shaped[Array, "*B V"], members: Bool[Array, " V"]
) -> Float[Array, "*B"]:
    """Log of the probability that softmax(logits) gives to the tokens of `members`.

    `members` holds for at least one token.
    """
    return jax.nn.logsumexp(_log_softmax(logits), -1, where=members)


def chunked_log_mass(
    hidden: Shaped[Array, "*B D"],
    head: Shaped[Array, "D V"],
    members: Bool[Array, " V"],
    *,
    chunk: int,
) -> Float[Array, "*B"]:
    """`log_mass` of hidden @ head that never holds more than `chunk` logits of a token."""
    real, columns = _columns(head, chunk)
    inside = _columns(members[None].astype(head.dtype), chunk)[1][:, 0] > 0
    return _log_norm(hidden, real & inside, columns) - _log_norm(
        hidden, real, columns
    )


def chunked_likelihood(
    hidden: Shaped[Array, "*B D"],
    head: Shaped[Array, "D V"],
    labels: Int[Array, "*B"],
    *,
    chunk: int,
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
    """`chunked_cross_entropy`, and whether the label is the likeliest token.

    Only the first has a gradient. Of equal logits the lower id counts as the likeliest.
    """
    nll = chunked_cross_entropy(hidden, head, labels, chunk=chunk)
    hidden, head = jax.lax.stop_gradient((hidden, head))
    real, columns = _columns(head, chunk)
    count = len(real)

    def best(
        found: tuple[Array, Array], chunk: tuple[Array, ...]
    ) -> tuple[Any, None]:
        top_logit, top_id = found
        i, real, columns = chunk
        logits = jnp.where(real, _project(hidden, columns), -jnp.inf)
        logit = jnp.max(logits, -1)
        token = jnp.argmax(logits, -1) * count + i  # a chunk has every count-th id
        better = (logit > top_logit) | ((logit == top_logit) & (token < top_id))
        return (
            jnp.where(better, logit, top_logit),
            jnp.where(better, token, top_id),
        ), None

    none = (
        jnp.full(labels.shape, -jnp.inf, nll.dtype),
        jnp.full(labels.shape, head.shape[-1]),
    )
    (_, likeliest), _ = jax.lax.scan(best, none, (jnp.arange(count), real, columns))
    return nll, likeliest == labels


def masked_sum(
    per_token: Shaped[Array, "*B"],
    mask: Shaped[Array, "*B"],
    weights: Shaped[Array, "*W"] | None = None,
) -> tuple[Shaped[Array, ""], Float[Array, ""]]:
    """(sum over the tokens where `mask` holds, their number): loss and count of `core.types.Out`.

    `weights` multiply the summands and have no effect on the number. Values that are masked out may
    be infinite or NaN.
    """
    kept = jnp.where(mask, per_token, 0.0)
    if weights is not None:
        kept = kept * weights
    return jnp.sum(kept), jnp.sum(mask.astype(jnp.float32))


def sequence_mean(
    per_token: Shaped[Array, "B T"], mask: Shaped[Array, "B T"]
) -> Shaped[Array, " B"]:
    """Mean over the tokens of each sample where `mask` holds; 0 for a sample without any.

    Values that are masked out may be infinite or NaN.
    """
    count = jnp.sum(mask.astype(jnp.float32), -1)
    return jnp.sum(jnp.where(mask, per_token, 0.0), -1) / jnp.maximum(count, 1.0)


def _log_softmax(logits: Array) -> Array:
    logits = wide(logits)
    shifted = logits - keep(
        jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    )
    return shifted - keep(jnp.log(jnp.sum(jnp.exp(shifted), -1, keepdims=True)))


def _kl(log_a: Array, log_b: Array) -> Array:
    """a log(a / b), and 0 where a is 0."""
    a = jnp.exp(log_a)
    return a * jnp.where(a > 0, log_a - log_b, 0.0)


def _jensen_shannon(log_p: Array, log_q: Array, beta: float | Array) -> Array:
    m = _mix(beta, log_p, log_q)
    return beta * _kl(log_p, m) + (1 - beta) * _kl(log_q, m)


def _mix(weight: float | Array, log_a: Array, log_b: Array) -> Array:
    """log(weight a + (1 - weight) b), at least the log of the smallest normal number: where both a
    and b are smaller, they change no sum.
    """
    if not isinstance(weight, Array) and weight in (0, 1):
        return log_a if weight else log_b
    mixed = weight * jnp.exp(log_a) + (1 - weight) * jnp.exp(log_b)
    return jnp.log(jnp.maximum(mixed, jnp.finfo(mixed.dtype).tiny))


def _buckets(log_p: Array, ids: Array) -> tuple[Array, Array]:
    """Log-probabilities of `ids` [..., k], and of all other tokens together [...]: `_least` where
    these have none.
    """
    others = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
    empty = jnp.max(others, -1, keepdims=True) == -jnp.inf
    rest = jax.nn.logsumexp(jnp.where(empty, 0.0, others), -1)
    rest = jnp.where(empty[..., 0], _least(log_p), rest)
    return jnp.take_along_axis(log_p, ids, -1), rest


def _least(x: Array) -> Array:
    """Log of the smallest normal number of x's type: it is finite, and so small a probability
    changes no sum.
    """
    return jnp.log(jnp.finfo(x.dtype).tiny).astype(x.dtype)


def _at_least(log_p: Array) -> Array:
    """`_least` in place of -inf, which would make values infinite and gradients NaN."""
    return jnp.where(log_p > -jnp.inf, log_p, _least(log_p))


_recompute = functools.partial(jax.checkpoint, prevent_cse=False)


def _columns(head: Array, chunk: int) -> tuple[Array, Array]:
    """A head [D V] in n chunks: which columns are no padding, bool [n chunk]; columns [n D chunk].

    Raises Refused on a chunk below 1.
    """
    if chunk < 1:
        raise Refused(f"chunk={chunk}: expected at least 1")
    dim, vocab = head.shape
    n = -(-vocab // chunk)
    padded = jnp.pad(head, ((0, 0), (0, n * chunk - vocab)))
    real = (jnp.arange(n * chunk) < vocab).reshape(chunk, n).T
    return real, jnp.moveaxis(padded.reshape(dim, chunk, n), -1, 0)


def _project(hidden: Array, head: Array) -> Array:
    return project(hidden, head, jnp.promote_types(hidden.dtype, jnp.float32))


def _log_norm(
    hidden: Array, real: Array, columns: Array, temperature: float | Array = 1.0
) -> Array:
    """log sum exp(logits / temperature) over all chunks, [...]."""

    def part(nothing: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        real, columns = chunk
        logits = _project(hidden, columns) / temperature
        return None, jax.nn.logsumexp(logits, -1, where=real)

    parts = jax.lax.scan(_recompute(part), None, (real, columns))[1]
    return jax.nn.logsumexp(parts, 0)
