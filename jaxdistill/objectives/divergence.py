"""Divergences between two next-token laws, given as logits: p the teacher's, q the student's.

Every function returns one value per token and never reduces over tokens; `masked_sum` does. Inside
all is float32 (or float64, if given), whatever the input dtype. A kind that is a sum over the
vocabulary of some d(log p_v, log q_v) also comes fused with the projection of the hidden states,
chunk by chunk (`chunked_divergence`), and on the teacher's k best tokens with the rest as one
bucket (`topk_divergence`). Sources: GKD arXiv:2306.13649 (JSD), DistiLLM arXiv:2402.03898 (skew),
00-foundations section 10 (all, with gradients).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.core.rows import by_rows, keep, project
from jaxdistill.core.types import Array, Refused, lookup


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _log_softmax(logits: Array) -> Array:
    logits = _wide(logits)
    shifted = logits - keep(jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True)))
    return shifted - keep(jnp.log(jnp.sum(jnp.exp(shifted), -1, keepdims=True)))


def _kl(log_a: Array, log_b: Array) -> Array:
    """Summand a log(a / b); 0 where a is."""
    a = jnp.exp(log_a)
    return a * jnp.where(a > 0, log_a - log_b, 0.0)


def _mix(weight: float | Array, log_a: Array, log_b: Array) -> Array:
    """log(weight a + (1 - weight) b), not below that of the smallest normal number, where a and b
    weigh nothing in any sum.
    """
    if not isinstance(weight, Array) and weight in (0, 1):
        return log_a if weight else log_b
    mixed = weight * jnp.exp(log_a) + (1 - weight) * jnp.exp(log_b)
    return jnp.log(jnp.maximum(mixed, jnp.finfo(mixed.dtype).tiny))


def pointwise(summand: Callable) -> Callable:
    """A divergence of logits [..., V] -> [...] from its summand on log-probabilities, kept as
    `.summand`.
    """

    @functools.wraps(summand)
    def divergence(teacher: Array, student: Array, **params) -> Array:
        return jnp.sum(summand(_log_softmax(teacher), _log_softmax(student), **params), -1)

    divergence.summand = summand
    return divergence


@pointwise
def forward_kl(teacher: Array, student: Array) -> Array:
    """KL(p || q): mean seeking. Gradient in the student's logits: q - p."""
    return _kl(teacher, student)


@pointwise
def reverse_kl(teacher: Array, student: Array) -> Array:
    """KL(q || p): mode seeking."""
    return _kl(student, teacher)


@pointwise
def jsd(teacher: Array, student: Array, beta: float = 0.5) -> Array:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD); at most log 2 for
    beta = 0.5.

    Its value at beta = 0 and 1 would be 0: there it returns the limits of JSD/beta and JSD/(1 -
    beta), KL(p || q) and KL(q || p).
    beta may be an array [], as schedules give it.
    """
    if isinstance(beta, Array):
        inside = (beta > 0) & (beta < 1)
        between = _jsd(teacher, student, jnp.where(inside, beta, 0.5))
        limit = jnp.where(beta > 0, _kl(student, teacher), _kl(teacher, student))
        return jnp.where(inside, between, limit)
    if beta in (0, 1):
        return _kl(student, teacher) if beta else _kl(teacher, student)
    return _jsd(teacher, student, beta)


def _jsd(teacher: Array, student: Array, beta: float | Array) -> Array:
    m = _mix(beta, teacher, student)
    return beta * _kl(teacher, m) + (1 - beta) * _kl(student, m)


@pointwise
def skew_kl(teacher: Array, student: Array, alpha: float = 0.1) -> Array:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM): at most -log alpha."""
    return _kl(teacher, _mix(alpha, teacher, student))


@pointwise
def skew_reverse_kl(teacher: Array, student: Array, alpha: float = 0.1) -> Array:
    """KL(q || alpha q + (1 - alpha) p) (DistiLLM): at most -log alpha."""
    return _kl(student, _mix(alpha, student, teacher))


@pointwise
def total_variation(teacher: Array, student: Array) -> Array:
    """Half the L1 distance: at most 1, and at most sqrt(KL / 2)."""
    return 0.5 * jnp.abs(jnp.exp(teacher) - jnp.exp(student))


def adaptive_kl(teacher: Array, student: Array, mass: float = 0.5) -> Array:
    """w KL(p || q) + (1 - w) KL(q || p), w the share of sum |p - q| that lies in the teacher's head
    (AKL, arXiv:2404.02657).

    The head is the smallest set of most likely tokens with at least `mass`; w is under
    stop_gradient.
    """
    log_p = _log_softmax(teacher)
    log_q = _log_softmax(student)
    p = jnp.exp(log_p)
    order = jnp.argsort(-p, axis=-1)
    p_sorted, gap = (jnp.take_along_axis(a, order, -1) for a in (p, jnp.abs(p - jnp.exp(log_q))))
    head = jnp.cumsum(p_sorted, -1) - p_sorted < mass
    total = jnp.sum(gap, -1)
    w = jax.lax.stop_gradient(jnp.sum(gap * head, -1) / jnp.where(total > 0, total, 1.0))
    return w * jnp.sum(_kl(log_p, log_q), -1) + (1 - w) * jnp.sum(_kl(log_q, log_p), -1)


SUMS = {
    f.__name__: f for f in (forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, total_variation)
}
KINDS = {**SUMS, "adaptive_kl": adaptive_kl}


def common(*logits: Array) -> tuple[Array, ...]:
    """The ids that all have: logits [..., V], V each its own, without the columns from the smallest
    V on.

    Models of one tokenizer have tables padded to different lengths (Qwen2.5: 152,064 rows of 7B,
    151,936 of 0.5B): what lies beyond the shorter is padding. That the tokenizer is one is for
    `models.language.lm.same_vocabulary` to say.
    """
    least = min(z.shape[-1] for z in logits)
    return tuple(z if z.shape[-1] == least else z[..., :least] for z in logits)


def token_divergence(
    kind: str,
    teacher: Array,
    student: Array,
    *,
    temperature: float | Array = 1.0,
    **params,
) -> Array:
    """The divergence called `kind` (a key of KINDS) of softmax(logits / T), times T^2 so that
    gradients keep their scale.

    Logits [..., V] -> [...], of tables of different lengths over their `common` ids; `params` are
    the kind's own (beta, alpha, mass). Raises Refused on an unknown kind.
    """
    teacher, student = common(teacher, student)
    kind = lookup(KINDS, kind, "kind")
    return temperature**2 * by_rows(
        lambda *logits: kind(*(_wide(z) / temperature for z in logits), **params), teacher, student
    )


def sorted_distance(teacher: Array, student: Array, *, temperature: float = 1.0) -> Array:
    """sum_i |p_(i) - q_(i)| of the probabilities in falling order, the shorter law filled up with
    zeros (ULD, arXiv:2402.12030).

    Logits [..., V] and [..., W] over any two vocabularies -> [...], at most 2; 0 wherever one law
    is the other renamed.
    """
    size = max(teacher.shape[-1], student.shape[-1])

    def ranked(logits):
        law = jnp.sort(jax.nn.softmax(_wide(logits) / temperature), descending=True)
        return jnp.pad(law, [(0, 0)] * (law.ndim - 1) + [(0, size - law.shape[-1])])

    return jnp.sum(jnp.abs(ranked(teacher) - ranked(student)), -1)


def topk_log_probs(
    teacher: Array, k: int, *, temperature: float = 1.0
) -> tuple[Array, Array, Array]:
    """What is kept of the teacher's logits [..., V]: ids int32 [..., k], their log-probabilities,
    and the others' log mass [...].

    Raises Refused unless 0 < k < V.
    """
    vocab = teacher.shape[-1]
    if not 0 < k < vocab:
        raise Refused(
            f"k={k}: expected 1 to {vocab - 1}, fewer than the {vocab} tokens of the vocabulary"
        )
    log_p = _log_softmax(_wide(teacher) / temperature)
    ids = jax.lax.top_k(log_p, k)[1]
    return ids, *_buckets(log_p, ids)


def _buckets(log_p: Array, ids: Array) -> tuple[Array, Array]:
    """Log-probabilities of `ids` [..., k] and the log mass of all others [...], `_present` where
    there is none.
    """
    rest = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
    empty = jnp.max(rest, -1, keepdims=True) == -jnp.inf
    tail = jax.nn.logsumexp(jnp.where(empty, 0.0, rest), -1)
    return jnp.take_along_axis(log_p, ids, -1), jnp.where(empty[..., 0], _least(log_p), tail)


def _least(x: Array) -> Array:
    """log of the smallest normal number: a mass that counts nothing in any sum, and whose logarithm
    is finite.
    """
    return jnp.log(jnp.finfo(x.dtype).tiny).astype(x.dtype)


def _present(log_mass: Array) -> Array:
    """The same with the least number for a mass of 0, whose logarithm would make values infinite
    and gradients NaN.
    """
    return jnp.where(log_mass > -jnp.inf, log_mass, _least(log_mass))


def topk_divergence(
    kind: str,
    ids: Array,
    log_probs: Array,
    log_tail: Array | None,
    student: Array,
    *,
    temperature: float | Array = 1.0,
    **params,
) -> Array:
    """`token_divergence` between laws over k + 1 buckets: the teacher's k tokens, and all others
    together.

    `ids`, `log_probs` [..., k] and `log_tail` [...] come from `topk_log_probs` at the same
    temperature; `student` are logits [..., V]. A KL is never negative, and never above that of the
    full laws (data processing). Without `log_tail` (None) both laws are those of the k tokens
    alone, renormalised, and what the student gives to others is not seen.
    """
    log_q = _log_softmax(_wide(student) / temperature)
    if log_tail is None:
        laws = (_wide(log_probs), jnp.take_along_axis(log_q, ids, -1))
    else:
        join = lambda log_k, log_rest: jnp.concatenate([log_k, log_rest[..., None]], -1)
        laws = (join(_wide(log_probs), _present(_wide(log_tail))), join(*_buckets(log_q, ids)))
    return temperature**2 * token_divergence(kind, *laws, **params)


SUPPORTS = ("teacher", "student")  # whose likeliest tokens are compared one by one
TAILS = ("bucket", "dropped")  # all other tokens: one more outcome | none, both laws renormalised


def restricted_divergence(
    kind: str,
    teacher: Array,
    student: Array,
    k: int,
    *,
    support: str = "teacher",
    tail: str = "bucket",
    temperature: float | Array = 1.0,
    **params,
) -> Array:
    """`topk_divergence` of logits [..., V] -> [...] on the k likeliest tokens of the one or the
    other (SUPPORTS, TAILS).

    Which tokens these are is a constant. The teacher's support suits the forward KL, whose summands
    it weighs, and the student's the reverse. Raises Refused unless 0 < k < V.
    """
    teacher, student = common(teacher, student)
    if support == "teacher":
        ids, kept, rest = topk_log_probs(teacher, k, temperature=temperature)
    else:
        ids = topk_log_probs(jax.lax.stop_gradient(student), k)[0]
        kept, rest = _buckets(_log_softmax(_wide(teacher) / temperature), ids)
    rest = rest if tail == "bucket" else None
    return topk_divergence(kind, ids, kept, rest, student, temperature=temperature, **params)


def chunked_divergence(
    kind: str,
    teacher_hidden: Array,
    teacher_head: Array,
    student_hidden: Array,
    student_head: Array,
    *,
    chunk: int,
    temperature: float = 1.0,
    **params,
) -> Array:
    """`token_divergence` of hidden @ head without logits over the whole vocabulary: at most [...,
    chunk] lives at a time.

    Hidden [..., D] and head [D, V] of either model, D its own; returns [...]. A first pass over the
    vocabulary gives both normalisers, a second the divergence; the backward projects again. A chunk
    takes every n-th column, so that a vocabulary split over devices stays where it is. Heads of
    different lengths are compared on their `common` ids. Raises Refused on an unknown kind, and one
    that is no sum over tokens (adaptive_kl, which sorts the vocabulary).
    """
    summand = getattr(lookup(KINDS, kind, "kind"), "summand", None)
    if summand is None:
        raise Refused(
            f"kind={kind!r} sorts the whole vocabulary: expected one of {', '.join(SUMS)}"
        )
    teacher_head, student_head = common(teacher_head, student_head)
    real, teacher_columns = _columns(teacher_head, chunk)
    hidden = (teacher_hidden, student_hidden)
    heads = (teacher_columns, _columns(student_head, chunk)[1])
    logits = lambda hidden, head: _project(hidden, head) / temperature
    norms = [_log_norm(h, real, head, temperature)[..., None] for h, head in zip(hidden, heads)]

    def add(total, inp):
        real, heads = inp
        log_p, log_q = (z - norm for z, norm in zip(map(logits, hidden, heads), norms))
        return total + jnp.sum(jnp.where(real, summand(log_p, log_q, **params), 0.0), -1), None

    total, _ = jax.lax.scan(_recompute(add), jnp.zeros_like(norms[1][..., 0]), (real, heads))
    return temperature**2 * total


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log q(label) per token: logits [... V], labels int [...] -> float32 [...]."""
    return -jnp.take_along_axis(_log_softmax(logits), labels[..., None], -1)[..., 0]


def chunked_cross_entropy(hidden: Array, head: Array, labels: Array, *, chunk: int) -> Array:
    """-log softmax(hidden @ head)[label] without logits over the whole vocabulary: [..., D], [D,
    V], int [...] -> [...].
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    label = jnp.einsum(
        "...d,...d->...", hidden, jnp.take(head.T, labels, axis=0), preferred_element_type=wide
    )
    return _log_norm(hidden, *_columns(head, chunk)) - label


def log_mass(logits: Array, members: Array) -> Array:
    """log of the probability that softmax(logits) gives to the tokens of `members` bool [V], one at
    least: [..., V] -> [...].
    """
    return jax.nn.logsumexp(_log_softmax(logits), -1, where=members)


def chunked_log_mass(hidden: Array, head: Array, members: Array, *, chunk: int) -> Array:
    """`log_mass` of hidden [..., D] @ head [D, V] without logits over the whole vocabulary: [...]."""
    real, columns = _columns(head, chunk)
    inside = _columns(members[None].astype(head.dtype), chunk)[1][:, 0] > 0
    return _log_norm(hidden, real & inside, columns) - _log_norm(hidden, real, columns)


def chunked_likelihood(
    hidden: Array, head: Array, labels: Array, *, chunk: int
) -> tuple[Array, Array]:
    """(-log softmax(hidden @ head)[label], whether the label is the likeliest token), [...] each,
    without logits over the whole vocabulary; [..., D], [D, V], int [...]. The first has a gradient.
    Of equal logits the lower id is the likeliest.
    """
    nll = chunked_cross_entropy(hidden, head, labels, chunk=chunk)
    hidden, head = jax.lax.stop_gradient((hidden, head))
    real, columns = _columns(head, chunk)
    count = len(real)

    def best(found, inp):
        i, real, columns = inp
        logits = jnp.where(real, _project(hidden, columns), -jnp.inf)
        # a chunk has every count-th id
        top = jnp.max(logits, -1)
        at = jnp.argmax(logits, -1) * count + i
        better = (top > found[0]) | ((top == found[0]) & (at < found[1]))
        return (jnp.where(better, top, found[0]), jnp.where(better, at, found[1])), None

    none = (jnp.full(labels.shape, -jnp.inf, nll.dtype), jnp.full(labels.shape, head.shape[-1]))
    (_, likeliest), _ = jax.lax.scan(best, none, (jnp.arange(count), real, columns))
    return nll, likeliest == labels


_recompute = functools.partial(jax.checkpoint, prevent_cse=False)


def _columns(head: Array, chunk: int) -> tuple[Array, Array]:
    """head [D, V] in n chunks: (which columns are real [n, chunk], columns [n, D, chunk])."""
    if chunk < 1:
        raise Refused(f"chunk={chunk}: expected at least 1")
    dim, vocab = head.shape
    n = -(-vocab // chunk)
    padded = jnp.pad(head, ((0, 0), (0, n * chunk - vocab)))
    return (jnp.arange(n * chunk) < vocab).reshape(chunk, n).T, jnp.moveaxis(
        padded.reshape(dim, chunk, n), -1, 0
    )


def _project(hidden: Array, head: Array) -> Array:
    return project(hidden, head, jnp.promote_types(hidden.dtype, jnp.float32))


def _log_norm(hidden: Array, real: Array, columns: Array, temperature: float = 1.0) -> Array:
    """log sum exp(logits / temperature) over all chunks, [...]."""
    part = lambda _, inp: (
        None,
        jax.nn.logsumexp(_project(hidden, inp[1]) / temperature, -1, where=inp[0]),
    )
    return jax.nn.logsumexp(jax.lax.scan(_recompute(part), None, (real, columns))[1], 0)


def masked_sum(per_token: Array, mask: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """(sum over tokens where `mask` holds, their number), the loss and count of `core.types.Out`.

    `weights` multiply the summands and leave the count alone. What is masked out may be infinite or
    NaN.
    """
    kept = jnp.where(mask, per_token, 0.0)
    return jnp.sum(kept if weights is None else kept * weights), jnp.sum(mask.astype(jnp.float32))


def sequence_mean(per_token: Array, mask: Array) -> Array:
    """Mean over each row's tokens where `mask` [B T] holds, [B]; 0 for a row without any. What is
    masked out may be infinite or NaN.
    """
    count = jnp.sum(mask.astype(jnp.float32), -1)
    return jnp.sum(jnp.where(mask, per_token, 0.0), -1) / jnp.maximum(count, 1.0)
