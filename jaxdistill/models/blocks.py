"""Residual blocks and changes of resolution of the U-Nets and autoencoders of latent diffusion."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array
from jaxdistill.models.layers import conv, dense, group_norm


class ResBlock(nnx.Module):
    """Norm, SiLU, 3x3 convolution, twice, as a residual branch.

    The shortcut is a 1x1 convolution where the channels change. With `emb`, an embedding of so many
    channels is added between the convolutions.
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
        self.norm1 = group_norm(i, groups, rngs=rngs, eps=eps, dtype=dtype)
        self.norm2 = group_norm(o, groups, rngs=rngs, eps=eps, dtype=dtype)
        self.conv1 = conv(i, o, (3, 3), rngs=rngs, dtype=dtype)
        self.conv2 = conv(o, o, (3, 3), ("mlp", "embed"), rngs=rngs, dtype=dtype)
        if emb:
            self.emb = dense(emb, o, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        if i != o:
            self.shortcut = conv(i, o, (1, 1), rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B H W i"], emb: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B H W o"]:
        """`emb` is given after its SiLU."""
        h = self.conv1(nnx.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.emb(emb)[:, None, None]
        h = self.conv2(nnx.silu(self.norm2(h)))
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        return constrain(shortcut + h, "batch", None, None, None)


class Down(nnx.Module):
    """A 3x3 convolution of stride 2.

    Each axis is padded with `low` zeros before and one after; `low` is 1 in U-Nets, 0 in
    autoencoders.
    """

    def __init__(self, dim: int, *, low: int = 1, rngs: nnx.Rngs, dtype=None):
        padding = [(low, 1)] * 2
        self.conv = conv(
            dim, dim, (3, 3), rngs=rngs, strides=2, padding=padding, dtype=dtype
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 C"]:
        return self.conv(x)


class Up(nnx.Module):
    """Every pixel twice along each axis, then a 3x3 convolution to `out` channels (0: as many)."""

    def __init__(self, dim: int, out: int = 0, *, rngs: nnx.Rngs, dtype=None):
        self.conv = conv(dim, out or dim, (3, 3), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W o"]:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))
