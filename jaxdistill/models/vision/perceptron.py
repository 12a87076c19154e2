"""A multi-layer perceptron that classifies: the student and teacher of small experiments with
labels.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdistill.core.fields import Dtype, Range
from jaxdistill.core.types import Array
from jaxdistill.models.layers import dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptron:
    """Sizes; inputs are flattened."""

    inputs: int = 64  # numbers in a sample
    width: int = 64
    layers: Annotated[int, Range(0, 1000)] = 1  # hidden
    classes: int = 10
    dtype: Dtype = "float32"

    def __call__(self, rngs: nnx.Rngs) -> PerceptronModule:
        return PerceptronModule(self, rngs)


class PerceptronModule(nnx.Module):
    def __init__(self, cfg: Perceptron, rngs: nnx.Rngs):
        make = lambda i, o, names: dense(i, o, names, rngs=rngs, dtype=jnp.dtype(cfg.dtype))
        sizes = [cfg.inputs] + [cfg.width] * cfg.layers
        self.hidden = nnx.List([make(i, o, ("embed", "mlp")) for i, o in zip(sizes, sizes[1:])])
        self.out = make(sizes[-1], cfg.classes, ("mlp", None))

    def __call__(self, x: Array) -> Array:
        """x [B ...] -> logits float32 [B classes]."""
        h = x.reshape(len(x), -1)
        for layer in self.hidden:
            h = nnx.relu(layer(h))
        return self.out(h).astype(jnp.float32)

    def norms(self) -> Array:
        """Sum of the weight arrays' L2 norms, not squared; at an array of zeros its gradient is 0."""
        squares = [
            jnp.sum(w**2) for w in jax.tree.leaves(nnx.to_pure_dict(nnx.state(self, nnx.Param)))
        ]
        return sum(jnp.sqrt(jnp.maximum(s, 1e-12)) for s in squares)
