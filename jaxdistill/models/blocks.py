"""Residual convolution blocks and changes of resolution, shared by the U-Nets and autoencoders of
latent diffusion.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array
from jaxdistill.models.layers import conv, dense, group_norm


class ResBlock(nnx.Module):
    """Norm, SiLU, 3x3 convolution, twice, on a shortcut (1x1 where the channels change); an
    embedding is added between.
    """

    def __init__(
        self,
        i: int,
        o: int,
        *,
        emb: int = 0,
        groups: int = 32,
        eps: float = 1e-5,
        rngs: nnx.Rngs,
        dtype=None,
    ):
        self.norm1, self.norm2 = (
            group_norm(n, groups, rngs=rngs, eps=eps, dtype=dtype) for n in (i, o)
        )
        self.conv1 = conv(i, o, (3, 3), rngs=rngs, dtype=dtype)
        self.conv2 = conv(o, o, (3, 3), ("mlp", "embed"), rngs=rngs, dtype=dtype)
        if emb:
            self.emb = dense(emb, o, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        if i != o:
            self.shortcut = conv(i, o, (1, 1), rngs=rngs, dtype=dtype)

    def __call__(self, x: Array, emb: Array | None = None) -> Array:
        """x [B H W i], emb [B E] after its SiLU -> [B H W o]."""
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = h if emb is None else h + self.emb(emb)[:, None, None]
        h = self.conv2(nnx.silu(self.norm2(h)))
        return constrain(
            (self.shortcut(x) if hasattr(self, "shortcut") else x) + h, "batch", None, None, None
        )


class Down(nnx.Module):
    """A 3x3 convolution of stride 2; `low` zeros before each axis and one after: 1 in U-Nets, 0 in
    autoencoders.
    """

    def __init__(self, dim: int, *, low: int = 1, rngs: nnx.Rngs, dtype=None):
        self.conv = conv(
            dim, dim, (3, 3), rngs=rngs, strides=2, padding=[(low, 1)] * 2, dtype=dtype
        )

    def __call__(self, x: Array) -> Array:
        """[B 2H 2W C] -> [B H W C]."""
        return self.conv(x)


class Up(nnx.Module):
    """Every pixel twice along each axis, then a 3x3 convolution to `out` channels (0: as many as
    before).
    """

    def __init__(self, dim: int, out: int = 0, *, rngs: nnx.Rngs, dtype=None):
        self.conv = conv(dim, out or dim, (3, 3), rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """[B H W C] -> [B 2H 2W out]."""
        return self.conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))
