"""Which tokens of a text a loss applies to, by the entropies of two models' next-token
distributions (TSD-KD, arXiv:2603.13260).

Entropies are in nats; `mask` says which tokens count. No gradient flows through the results but
through `entropy`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from jaxdistill.core.types import Array
from jaxdistill.objectives.numerics import wide


def entropy(logits: Shaped[Array, "*B V"]) -> Float[Array, "*B"]:
    """- sum p log p of softmax(logits), in float32 or wider."""
    log_p = jax.nn.log_softmax(wide(logits))
    return -jnp.sum(jnp.exp(log_p) * jnp.where(log_p > -jnp.inf, log_p, 0.0), -1)


def opener(
    entropies: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    share: float,
    *,
    slack: float = 1e-5,
) -> Bool[Array, "B T"]:
    """Each sample's shortest beginning that holds `share` - `slack` of the sample's entropy.

    It has at least one token. Without slack, rounding would add a token where entropies are equal
    and share times their number is an integer.
    """
    kept = jax.lax.stop_gradient(jnp.where(mask, entropies, 0.0))
    total = jnp.sum(kept, -1, keepdims=True)
    before = jnp.pad(jnp.cumsum(kept, -1), ((0, 0), (1, 0)))[:, :-1]
    first = jnp.cumsum(mask, -1) == 1
    chosen = jnp.where(total < 1e-8, first, before < (share - slack) * total)
    return chosen & (mask > 0)


def most_uncertain(
    entropies: Float[Array, "B T"], mask: Shaped[Array, "B T"], share: float
) -> Bool[Array, "B T"]:
    """The tokens of the batch whose entropy is at least the (1 - share) quantile.

    The quantile is interpolated linearly.
    """
    h = jax.lax.stop_gradient(entropies)
    count = jnp.sum(mask > 0)
    ordered = jnp.sort(jnp.where(mask > 0, h, jnp.inf).ravel())
    place = jnp.maximum((count - 1) * (1 - share), 0.0)
    index = jnp.floor(place).astype(jnp.int32)
    below = ordered[index]
    above = ordered[jnp.minimum(index + 1, jnp.maximum(count - 1, 0))]
    threshold = below + (place - index) * jnp.where(
        above > below, above - below, 0.0
    )
    return (h >= threshold) & (mask > 0)


def confidence_gate(
    teacher: Float[Array, "*B"], student: Float[Array, "*B"], temperature: float
) -> Float[Array, "*B"]:
    """sigmoid((H(student) - H(teacher)) / temperature) of two entropies.

    It is near 1 where only the student is uncertain.
    """
    return jax.lax.stop_gradient(jax.nn.sigmoid((student - teacher) / temperature))
