"""A perceptron that classifies: the student and teacher of small experiments with labels."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Num

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
        make = functools.partial(dense, rngs=rngs, dtype=jnp.dtype(cfg.dtype))
        sizes = [cfg.inputs] + [cfg.width] * cfg.layers
        pairs = zip(sizes, sizes[1:])
        self.hidden = nnx.List([make(i, o, ("embed", "mlp")) for i, o in pairs])
        self.out = make(sizes[-1], cfg.classes, ("mlp", None))

    def __call__(self, x: Num[Array, "B ..."]) -> Float[Array, "B K"]:
        """Logits of the classes, in float32."""
        h = x.reshape(len(x), -1)
        for layer in self.hidden:
            h = nnx.relu(layer(h))
        return self.out(h).astype(jnp.float32)

    def norms(self) -> Float[Array, ""]:
        """The sum of the weight arrays' L2 norms, not squared.

        At an array of zeros its gradient is 0.
        """
        weights = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        squares = [jnp.sum(w**2) for w in jax.tree.leaves(weights)]
        return sum(jnp.sqrt(jnp.maximum(s, 1e-12)) for s in squares)
