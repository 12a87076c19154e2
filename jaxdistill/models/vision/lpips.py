"""LPIPS (arXiv:1801.03924): a distance between pictures in the features of VGG-16, weighted as
people see them.

Weights are those of the package `lpips` (version 0.1 of its heads), net "vgg".
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from jaxdistill.core.fields import Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.layers import as_program, conv

HE = nnx.initializers.he_normal()
# of pixels in -1..1
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPIPS:
    """Sizes of the levels, each at half the resolution of the one before. Defaults are VGG-16's."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    layers: tuple[int, ...] = (2, 2, 3, 3, 3)  # convolutions of a level
    dtype: Dtype = "float32"  # arithmetic of the convolutions; weights and distances are float32
    remat: Remat = "none"  # of each level

    def __call__(self, rngs: nnx.Rngs) -> LPIPSModule:
        return LPIPSModule(self, rngs)


class Level(nnx.List):
    """Convolutions of one resolution."""

    def __call__(self, h: Array) -> Array:
        for layer in self:
            h = constrain(nnx.relu(layer(h)), "batch", None, None, None)
        return h


class LPIPSModule(nnx.Module):
    def __init__(self, cfg: LPIPS, rngs: nnx.Rngs):
        if len(cfg.widths) != len(cfg.layers):
            raise Refused(
                f"model: {len(cfg.widths)} widths and {len(cfg.layers)} layers, expected one of each for every level"
            )
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        before = (3, *cfg.widths)
        make = lambda i, o: conv(i, o, (3, 3), (None, "mlp"), rngs=rngs, init=HE, dtype=self.dtype)
        sizes = lambda level: [
            (before[level] if j == 0 else before[level + 1], before[level + 1])
            for j in range(cfg.layers[level])
        ]
        self.levels = nnx.List(
            [Level([make(*pair) for pair in sizes(level)]) for level in range(len(cfg.widths))]
        )
        ones = nnx.with_partitioning(nnx.initializers.ones_init(), (None,))
        self.heads = nnx.List([nnx.Param(ones(rngs.params(), (width,))) for width in cfg.widths])

    def __call__(self, a: Array, b: Array) -> Array:
        """Pictures in -1..1 [B H W 3], H and W at least 2^(levels - 1) -> [B], float32; symmetric,
        0 where they are equal.
        """
        pair = jnp.concatenate([a, b])
        h = ((pair - jnp.array(SHIFT, pair.dtype)) / jnp.array(SCALE, pair.dtype)).astype(
            self.dtype
        )
        total = 0.0
        for i, (level, head) in enumerate(zip(self.levels, self.heads)):
            h = as_program(level, self.cfg.remat)(nnx.max_pool(h, (2, 2), (2, 2)) if i else h)
            f = h.astype(jnp.float32)
            f = f / jnp.sqrt(
                jnp.sum(f**2, -1, keepdims=True) + 1e-20
            )  # where all are 0, so is the gradient
            first, second = jnp.split(f, 2)
            total = total + jnp.mean((first - second) ** 2 @ head[...], (1, 2))
        return total
