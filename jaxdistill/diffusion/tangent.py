"""The derivative of a network along a direction of its inputs: what continuous-time objectives
regress on.

For y = fn(x, t, ...) along a path with tangents (dx/dt, 1, ...) it is the total derivative dy/dt
(MeanFlow arXiv:2505.13447, sCM arXiv:2410.11081). Differentiating the value as well costs a forward
pass less than a second call.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.core.net import forward_mode
from jaxdistill.core.types import Array


def total_derivative(
    fn: Callable, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    """(fn(*primals), its derivative along `tangents`) by forward-mode differentiation: exact. Give
    it float32.
    """
    with forward_mode():
        return jax.jvp(fn, primals, tangents)


def central_difference(
    fn: Callable, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    """The same by a central difference, for networks whose kernels have no JVP: two more
    evaluations, relative error about eps^(2/3) for tangents of order 1. The step is eps^(1/3);
    times may leave their range by as much.
    """
    step = float(jnp.finfo(primals[0].dtype).eps) ** (1 / 3)
    move = lambda sign: fn(*(p + sign * step * d for p, d in zip(primals, tangents)))
    return fn(*primals), (move(1) - move(-1)) / (2 * step)


DERIVATIVES = {"jvp": total_derivative, "central": central_difference}
