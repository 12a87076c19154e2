"""Reductions and roots that most objectives share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from jaxdistill.core.types import Array


def wide(x: Shaped[Array, "*B"]) -> Float[Array, "*B"]:
    """`x` in float32, or in its own type where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def teacher_and_student(
    teacher: Shaped[Array, "*T"], student: Shaped[Array, "*S"]
) -> tuple[Float[Array, "*T"], Float[Array, "*S"]]:
    """Both in float32 or wider, the teacher's under stop_gradient."""
    return jax.lax.stop_gradient(wide(teacher)), wide(student)


def sum_per_sample(x: Shaped[Array, "B ..."]) -> Shaped[Array, " B"]:
    """Sum over all axes but the first."""
    return jnp.sum(x, axis=range(1, x.ndim))


def mean_per_sample(x: Shaped[Array, "B ..."]) -> Shaped[Array, " B"]:
    """Mean over all axes but the first."""
    return jnp.mean(x, axis=range(1, x.ndim))


def root(square: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Square root with gradient 0 at 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """`x` over its norm along the last axis; a vector of zeros stays as it is."""
    norm = root(jnp.sum(x**2, -1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)
