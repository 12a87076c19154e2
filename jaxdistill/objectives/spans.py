"""Comparison of models with different tokenizers on spans of text that are a sequence of complete
tokens to both (arXiv:2503.20083).

The probability of a span is the product of its tokens'. The distribution over all spans cannot be
listed, but that of the event "this span comes next" can: it has two outcomes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from jaxdistill.core.types import Array
from jaxdistill.objectives.divergence import Divergence, token_divergence


def span_sum(
    values: Shaped[Array, "B T"], span: Int[Array, "B T"], count: int
) -> tuple[Shaped[Array, "B {count}"], Bool[Array, "B {count}"]]:
    """Sum of `values` over each of `count` spans, and which spans have a token.

    `span` is the number of each token's span, -1 for none.
    """
    inside = (span >= 0) & (span < count)
    where = jnp.where(inside, span, count)

    @jax.vmap
    def add(values: Array, where: Array) -> Array:
        return jax.ops.segment_sum(values, where, count + 1)[:count]

    total = add(jnp.where(inside, values, 0.0), where)
    return total, add(inside.astype(jnp.int32), where) > 0


def ends(
    span: Int[Array, "B T"], following: Bool[Array, "B T"]
) -> Bool[Array, "B T"]:
    """Which tokens are the last of their span with more of the text after it.

    `following` says whether the next token belongs to the text.
    """
    after = jnp.pad(span[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return (span >= 0) & (after != span) & following


def unpacked(bits: UInt8[Array, " N"], count: int) -> Bool[Array, " {count}"]:
    """The first `count` of the bits that `numpy.packbits` has packed; False beyond their end."""
    flags = jnp.unpackbits(bits)[:count] > 0
    return jnp.pad(flags, (0, count - flags.shape[0]))


def event_divergence(
    divergence: Divergence,
    log_p: Float[Array, "*B"],
    log_q: Float[Array, "*B"],
    *,
    temperature: float | Array = 1.0,
) -> Float[Array, "*B"]:
    """tau D((p^(1/tau), 1 - p^(1/tau)), (q^(1/tau), 1 - q^(1/tau))) from log-probabilities.

    For tau -> inf the forward KL becomes x log(x / y) - x + y with x = -log p and y = -log q, which
    is as sensitive to improbable events as to probable ones. In float32, probabilities above
    1 - 1e-7 are taken as 1 - 1e-7.
    """

    def outcomes(log: Array) -> Array:
        log = jnp.minimum(log / temperature, -jnp.finfo(log.dtype).eps)
        return jnp.stack([log, jnp.log(-jnp.expm1(log))], -1)

    return temperature * token_divergence(
        divergence, outcomes(log_p), outcomes(log_q)
    )
