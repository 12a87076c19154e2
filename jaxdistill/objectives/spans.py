"""Models with different tokenizers, compared on pieces of text that are whole tokens to both
(arXiv:2503.20083).

A piece's probability is the product of its tokens'. The law over all pieces cannot be listed, but
that of the event "this piece comes next" can: two buckets, the piece and everything else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array
from jaxdistill.objectives.divergence import token_divergence


def span_sum(values: Array, span: Array, count: int) -> tuple[Array, Array]:
    """(sum of values [B T] over each row's spans, [B count]; which spans have a token, bool [B
    count]).

    span int [B T] is the number of a token's span, -1 for none.
    """
    inside = (span >= 0) & (span < count)
    where = jnp.where(inside, span, count)
    add = jax.vmap(lambda v, at: jax.ops.segment_sum(v, at, count + 1)[:count])
    return add(jnp.where(inside, values, 0.0), where), add(inside.astype(jnp.int32), where) > 0


def ends(span: Array, following: Array) -> Array:
    """Which tokens are the last of their span with more of the text to come, bool [B T]: span int
    and following, whether the next token is one of the text's, bool [B T].
    """
    after = jnp.pad(span[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return (span >= 0) & (after != span) & following


def unpacked(bits: Array, count: int) -> Array:
    """The first `count` bits of uint8 [N], as `numpy.packbits` packs them, bool [count]; False
    beyond their end.
    """
    flags = jnp.unpackbits(bits)[:count] > 0
    return jnp.pad(flags, (0, count - flags.shape[0]))


def event_divergence(
    kind: str, log_p: Array, log_q: Array, *, temperature: float = 1.0, **params
) -> Array:
    """`kind` between the laws (p^(1/tau), 1 - p^(1/tau)) and the same of q, times tau, from
    log-probabilities [...] -> [...].

    For tau -> inf the forward KL becomes x log(x / y) - x + y, x = -log p, y = -log q, which is as
    sensitive to improbable events as to probable ones. Probabilities above 1 - 1e-7 (float32) count
    as that.
    """

    def law(log):
        log = jnp.minimum(log / temperature, -jnp.finfo(log.dtype).eps)
        return jnp.stack([log, jnp.log(-jnp.expm1(log))], -1)

    return temperature * token_divergence(kind, law(log_p), law(log_q), **params)
