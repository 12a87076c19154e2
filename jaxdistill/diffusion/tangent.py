"""The derivative of a network along a direction of its inputs, which continuous-time objectives
regress on.

For y = fn(x, t, ...) along a path with tangents (dx/dt, 1, ...) it is the total derivative dy/dt
(MeanFlow arXiv:2505.13447, sCM arXiv:2410.11081). Value and derivative together cost less than two
evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.core.net import forward_mode
from jaxdistill.core.types import Array


def total_derivative(
    fn: Callable,
    primals: tuple[float | Array, ...],
    tangents: tuple[float | Array, ...],
) -> tuple[Any, Any]:
    """(fn(*primals), its derivative along `tangents`) by forward-mode differentiation, exactly.

    The inputs should be float32.
    """
    with forward_mode():
        return jax.jvp(fn, primals, tangents)


def central_difference(
    fn: Callable,
    primals: tuple[float | Array, ...],
    tangents: tuple[float | Array, ...],
) -> tuple[Any, Any]:
    """`total_derivative` by a central difference, for networks whose kernels have no JVP.

    It costs two more evaluations. With its step of eps^(1/3), by which times may leave their range,
    the relative error is about eps^(2/3) for tangents of order 1.
    """
    step = float(jnp.finfo(primals[0].dtype).eps) ** (1 / 3)

    def moved(sign: int) -> Any:
        return fn(*(p + sign * step * d for p, d in zip(primals, tangents)))

    return fn(*primals), (moved(1) - moved(-1)) / (2 * step)


def backward_difference(step: float) -> Callable:
    """`total_derivative` by a difference over `step` against the tangents, as a function like it.

    It costs one more evaluation and keeps times from rising. Its error is step / 2 times the second
    derivative: where the step is not small, this is another target, not an approximation
    (MDT-dist, arXiv:2509.04406, has .01).
    """

    def derivative(
        fn: Callable,
        primals: tuple[float | Array, ...],
        tangents: tuple[float | Array, ...],
    ) -> tuple[Any, Any]:
        value = fn(*primals)
        before = fn(*(p - step * d for p, d in zip(primals, tangents)))
        return value, (value - before) / step

    return derivative


DERIVATIVES = {"jvp": total_derivative, "central": central_difference}
