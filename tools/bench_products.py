"""The matrix products of a train step, run alone: a lower bound of the time of the step.

The products are read from the traced step: forward, backward and forward-mode, those of a scan as
often as it runs, without what no result needs and without what rematerialisation computes again.
Each runs as a plain product [B M K] x [B K N]; a convolution runs as the product of its patches.
Nothing is transposed, copied or kept, and operands stay in the cache where they fit. The body of a
loop whose length is not known before it runs counts once.
"""

from __future__ import annotations

import collections
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from jaxdistill.run import flops
from launch._command import main, no_command


class Shape(NamedTuple):
    """The sizes of a product [batch rows inner] x [batch inner columns]."""

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: str

    @property
    def operations(self) -> int:
        """Its floating-point operations."""
        return 2 * self.batch * self.rows * self.inner * self.columns


def shapes(jaxpr: jax.core.Jaxpr) -> dict[Shape, int]:
    """The products of a traced program: shape -> how many there are, in order of appearance."""
    everything = [True] * len(jaxpr.outvars)
    needed, _ = partial_eval.dce_jaxpr(jaxpr, everything)
    found: dict[Shape, int] = collections.Counter()
    for product in flops.products(needed):
        found[_READERS[product.eqn.primitive.name](product.eqn)] += product.times
    return dict(found)


def _of_dot(eqn: Any) -> Shape:
    (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
    left, right = (operand.aval for operand in eqn.invars)
    inner = math.prod(left.shape[axis] for axis in contracted)
    batch = math.prod(left.shape[axis] for axis in batched)
    rows = left.size // (batch * inner)
    columns = right.size // (batch * inner)
    return Shape(batch, rows, inner, columns, left.dtype.name)


def _of_convolution(eqn: Any) -> Shape:
    kernel = eqn.invars[1].aval
    groups = eqn.params["feature_group_count"]
    channels = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    inner = kernel.size // channels // eqn.params["batch_group_count"]
    rows = eqn.outvars[0].aval.size // channels
    return Shape(groups, rows, inner, channels // groups, kernel.dtype.name)


_READERS = {"dot_general": _of_dot, "conv_general_dilated": _of_convolution}


def operations(found: Mapping[Shape, int]) -> int:
    """Floating-point operations of all these products."""
    return sum(shape.operations * count for shape, count in found.items())


def operands(found: Mapping[Shape, int]) -> list[tuple[list, list]]:
    """Left and right matrices of each shape, so many that every product has a pair of its own."""
    rng = np.random.default_rng(0)

    def draw(count: int, *sizes: int, dtype: str) -> list[jax.Array]:
        drawn = [rng.standard_normal(sizes, np.float32) for _ in range(count)]
        return [jnp.asarray(matrix, dtype) for matrix in drawn]

    pools = []
    for (batch, rows, inner, columns, dtype), count in found.items():
        side = math.isqrt(count - 1) + 1  # side^2 pairs, at least `count`
        left = draw(side, batch, rows, inner, dtype=dtype)
        right = draw(side, batch, inner, columns, dtype=dtype)
        pools.append((left, right))
    return pools


def alone(found: Mapping[Shape, int]) -> Callable[[], jax.Array]:
    """A call that runs these products in one compiled program, and returns one number of each."""
    pools = operands(found)

    def run(pools: list[tuple[list, list]]) -> jax.Array:
        firsts = []
        for (left, right), count in zip(pools, found.values(), strict=True):
            for i in range(count):
                a = left[i % len(left)]
                b = right[i // len(left)]
                # the barrier keeps XLA from computing only what is returned
                product = jax.lax.optimization_barrier(_multiplied(a, b))
                firsts.append(product.ravel()[0].astype(jnp.float32))
        return jnp.stack(firsts)

    compiled = jax.jit(run).lower(pools).compile()
    return lambda: compiled(pools)


def _multiplied(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [B M K] times b [B K N]; one product is no batch of products."""
    if a.shape[0] == 1:
        return a[0] @ b[0]
    return a @ b


if __name__ == "__main__":
    main(no_command, __doc__)
