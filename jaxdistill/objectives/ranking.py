"""Losses that know the teacher by the order of its preferences only."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array


def plackett_luce(scores: Array) -> Array:
    """-log of the probability that items drawn one by one, with odds exp(score), come in the order
    given: [..., k] -> [...].

    sum_j (log sum_{l >= j} exp s_l - s_j). k = 1: 0. k = 2: Bradley-Terry, softplus(s_2 - s_1).
    Equal scores: log k!.
    """
    return jnp.sum(jax.lax.cumlogsumexp(scores, axis=scores.ndim - 1, reverse=True) - scores, -1)


def reranked(teacher: Array, student: Array, k: int) -> Array:
    """The student's k largest logits of [..., V], in the order of the teacher's, its favourite
    first: [..., k].

    Which tokens these are and their order are constants; k is at most V.
    """
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(student), min(k, student.shape[-1]))
    order = jnp.argsort(-jax.lax.stop_gradient(jnp.take_along_axis(teacher, ids, -1)), -1)
    return jnp.take_along_axis(student, jnp.take_along_axis(ids, order, -1), -1)
