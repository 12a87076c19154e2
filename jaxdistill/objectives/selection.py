"""Which tokens of a text a loss looks at, by the entropies of two models' next-token laws (TSD-KD,
arXiv:2603.13260).

Entropies are float32 [B T], in nats; `mask` [B T] says which tokens count; all results are
constants.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array


def entropy(logits: Array) -> Array:
    """- sum p log p of softmax(logits): [..., V] -> float32 [...]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return -jnp.sum(jnp.exp(log_p) * jnp.where(log_p > -jnp.inf, log_p, 0.0), -1)


def opener(entropies: Array, mask: Array, share: float, *, slack: float = 1e-5) -> Array:
    """bool [B T]: each row's shortest beginning that holds `share` - `slack` of the row's entropy;
    one token at least.

    With slack 0, rounding would take one token more where entropies are equal and share times their
    number is whole.
    """
    kept = jax.lax.stop_gradient(jnp.where(mask, entropies, 0.0))
    total = jnp.sum(kept, -1, keepdims=True)
    before = jnp.pad(jnp.cumsum(kept, -1), ((0, 0), (1, 0)))[:, :-1]
    first = jnp.cumsum(mask, -1) == 1
    return jnp.where(total < 1e-8, first, before < (share - slack) * total) & (mask > 0)


def most_uncertain(entropies: Array, mask: Array, share: float) -> Array:
    """bool [B T]: the tokens of the whole batch whose entropy is at least the (1 - share) quantile,
    linear between two.
    """
    h = jax.lax.stop_gradient(entropies)
    count = jnp.sum(mask > 0)
    ordered = jnp.sort(jnp.where(mask > 0, h, jnp.inf).ravel())
    at = jnp.maximum((count - 1) * (1 - share), 0.0)
    low = jnp.floor(at).astype(jnp.int32)
    a = ordered[low]
    b = ordered[jnp.minimum(low + 1, jnp.maximum(count - 1, 0))]
    threshold = a + (at - low) * jnp.where(b > a, b - a, 0.0)
    return (h >= threshold) & (mask > 0)


def confidence_gate(teacher: Array, student: Array, temperature: float) -> Array:
    """sigmoid((H(student) - H(teacher)) / temperature) of two entropies: near 1 where only the
    student is uncertain.
    """
    return jax.lax.stop_gradient(jax.nn.sigmoid((student - teacher) / temperature))
