"""Losses between attention maps (TinyBERT arXiv:1909.10351, ERNIE-Tiny arXiv:2106.02241).

Scores are attention's logits [B H T S] (query, key) before masking, the teacher's under
stop_gradient; mask [B S] is False on padding. One value for each query, mean over heads: [B T].
Inside all is float32 (or float64, if given).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Refused
from jaxdistill.objectives.features import _pair


def attention_kl(teacher: Array, student: Array, mask: Array) -> Array:
    """KL(A_teacher || A_student) of the rows of both softmaxes, summed over real keys."""
    t, s = _scores(teacher, student)
    seen = mask[:, None, None, :].astype(bool)
    log_t, log_s = (
        jax.nn.log_softmax(jnp.where(seen, z, -1e30)) for z in (t, s)
    )  # finite: so is the gradient where all is padding
    return jnp.mean(jnp.sum(jnp.where(seen, jnp.exp(log_t) * (log_t - log_s), 0.0), -1), 1)


def attention_mse(teacher: Array, student: Array, mask: Array) -> Array:
    """Mean squared difference of the scores themselves over real keys (TinyBERT)."""
    t, s = _scores(teacher, student)
    seen = mask[:, None, None, :].astype(t.dtype)
    return jnp.mean(jnp.sum((t - s) ** 2 * seen, -1) / jnp.maximum(seen.sum(-1), 1.0), 1)


def _scores(teacher: Array, student: Array) -> tuple[Array, Array]:
    if teacher.shape[1] != student.shape[1]:
        raise Refused(
            f"attention: the student has {student.shape[1]} heads, expected the teacher's {teacher.shape[1]}"
        )
    return _pair(teacher, student)


KINDS = {"kl": attention_kl, "mse": attention_mse}


def layer_map(student: int, teacher: int) -> tuple[int, ...]:
    """For each of `student` layers the teacher's layer that it follows, from 0: g(m) = ceil(m N /
    M), 1-based, last to last.
    """
    return tuple(-(-m * teacher // student) - 1 for m in range(1, student + 1))
