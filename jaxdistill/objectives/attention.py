"""Losses between attention maps (TinyBERT arXiv:1909.10351, ERNIE-Tiny arXiv:2106.02241).

Scores are the logits of attention before masking, for N heads, T queries and S keys; the teacher's
are under stop_gradient. Both losses give one value for each query, the mean over heads, computed in
float32, or in float64 where that is given.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from jaxdistill.core.types import Array, Refused
from jaxdistill.objectives.numerics import teacher_and_student


def attention_kl(
    teacher: Shaped[Array, "B N T S"],
    student: Shaped[Array, "B M T S"],
    mask: Shaped[Array, "B S"],
) -> Float[Array, "B T"]:
    """KL(A_teacher || A_student) of the attention over the keys where `mask` holds."""
    t, s = _scores(teacher, student)
    seen = mask[:, None, None, :].astype(bool)
    # finite, so that the gradient is finite where all keys are padding
    masked = -1e30
    log_t = jax.nn.log_softmax(jnp.where(seen, t, masked))
    log_s = jax.nn.log_softmax(jnp.where(seen, s, masked))
    summands = jnp.where(seen, jnp.exp(log_t) * (log_t - log_s), 0.0)
    return jnp.mean(jnp.sum(summands, -1), 1)


def attention_mse(
    teacher: Shaped[Array, "B N T S"],
    student: Shaped[Array, "B M T S"],
    mask: Shaped[Array, "B S"],
) -> Float[Array, "B T"]:
    """Mean squared difference of the scores over the keys where `mask` holds (TinyBERT)."""
    t, s = _scores(teacher, student)
    seen = mask[:, None, None, :].astype(t.dtype)
    total = jnp.sum((t - s) ** 2 * seen, -1)
    return jnp.mean(total / jnp.maximum(seen.sum(-1), 1.0), 1)


def _scores(teacher: Array, student: Array) -> tuple[Array, Array]:
    if teacher.shape[1] != student.shape[1]:
        found = f"the student has {student.shape[1]} heads"
        raise Refused(
            f"attention: {found}, expected the teacher's {teacher.shape[1]}"
        )
    return teacher_and_student(teacher, student)


KINDS = {"kl": attention_kl, "mse": attention_mse}


def layer_map(student: int, teacher: int) -> tuple[int, ...]:
    """The teacher's layer that each of `student` layers follows, counted from 0.

    g(m) = ceil(m N / M), counted from 1, so that the last follows the last.
    """
    return tuple(-(-m * teacher // student) - 1 for m in range(1, student + 1))
