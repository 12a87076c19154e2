"""Losses that use nothing of the teacher but the order of its preferences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from jaxdistill.core.types import Array


def plackett_luce(scores: Shaped[Array, "*B K"]) -> Shaped[Array, "*B"]:
    """-log of the probability that items drawn one by one come in the order given.

    An item is drawn with odds exp(score): sum_j (log sum_{l >= j} exp s_l - s_j). For K = 1 it is
    0, for K = 2 Bradley-Terry's softplus(s_2 - s_1), and for equal scores log K!.
    """
    remaining = jax.lax.cumlogsumexp(scores, axis=scores.ndim - 1, reverse=True)
    return jnp.sum(remaining - scores, -1)


def reranked(
    teacher: Shaped[Array, "*B V"], student: Shaped[Array, "*B V"], k: int
) -> Shaped[Array, "*B K"]:
    """The student's k largest logits in the order of the teacher's, the teacher's favourite first.

    No gradient flows through the choice of tokens or their order. A k above V counts as V.
    """
    _, ids = jax.lax.top_k(
        jax.lax.stop_gradient(student), min(k, student.shape[-1])
    )
    preferences = jax.lax.stop_gradient(jnp.take_along_axis(teacher, ids, -1))
    order = jnp.argsort(-preferences, -1)
    return jnp.take_along_axis(student, jnp.take_along_axis(ids, order, -1), -1)
