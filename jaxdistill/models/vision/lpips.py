"""LPIPS (arXiv:1801.03924): a perceptual distance between pictures in the features of VGG-16.

Weights are those of the package `lpips` (version 0.1 of its heads), net "vgg".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxdistill.core.fields import Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.layers import as_program, conv

HE = nnx.initializers.he_normal()
SHIFT = (-0.030, -0.088, -0.188)  # mean and standard deviation of pixels in -1..1
SCALE = (0.458, 0.448, 0.450)
# under the root of the features' norm: where all are 0, so is the gradient
TINY = 1e-20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPIPS:
    """Sizes of the levels, each at half the resolution of the one before. Defaults are VGG-16's."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    layers: tuple[int, ...] = (2, 2, 3, 3, 3)  # convolutions of a level
    # arithmetic of the convolutions; weights and distances are float32
    dtype: Dtype = "float32"
    remat: Remat = "none"  # of each level

    def __call__(self, rngs: nnx.Rngs) -> LPIPSModule:
        return LPIPSModule(self, rngs)


class Level(nnx.List):
    """Convolutions of one resolution."""

    def __init__(self, layers: Iterable[nnx.Conv]):
        super().__init__(layers)

    def __call__(self, h: Float[Array, "B H W i"]) -> Float[Array, "B H W o"]:
        for layer in self:
            h = constrain(nnx.relu(layer(h)), "batch", None, None, None)
        return h


class LPIPSModule(nnx.Module):
    def __init__(self, cfg: LPIPS, rngs: nnx.Rngs):
        if len(cfg.widths) != len(cfg.layers):
            raise Refused(
                f"model: {len(cfg.widths)} widths and {len(cfg.layers)} layers, "
                "expected one of each for every level"
            )
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(
            conv, size=(3, 3), names=(None, "mlp"), rngs=rngs, init=HE
        )
        levels = []
        channels = 3
        for width, count in zip(cfg.widths, cfg.layers):
            ins = [channels] + [width] * (count - 1)
            levels.append(Level([make(i, width, dtype=self.dtype) for i in ins]))
            channels = width
        self.levels = nnx.List(levels)
        ones = nnx.with_partitioning(nnx.initializers.ones_init(), (None,))
        heads = [ones(rngs.params(), (width,)) for width in cfg.widths]
        self.heads = nnx.List([nnx.Param(head) for head in heads])

    def __call__(
        self, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]
    ) -> Float[Array, " B"]:
        """Distances of pictures in -1..1, in float32: symmetric, and 0 where they are equal.

        H and W are at least 2^(levels - 1).
        """
        pair = jnp.concatenate([a, b])
        h = (pair - jnp.array(SHIFT, pair.dtype)) / jnp.array(SCALE, pair.dtype)
        h = h.astype(self.dtype)
        total = 0.0
        for i, (level, head) in enumerate(zip(self.levels, self.heads)):
            if i:
                h = nnx.max_pool(h, (2, 2), (2, 2))
            h = as_program(level, self.cfg.remat)(h)
            f = h.astype(jnp.float32)
            f = f / jnp.sqrt(jnp.sum(f**2, -1, keepdims=True) + TINY)
            first, second = jnp.split(f, 2)
            total = total + jnp.mean((first - second) ** 2 @ head[...], (1, 2))
        return total
