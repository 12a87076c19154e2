"""Frozen networks that judge samples: random features, rewards, and the identity as a decoder.

Feature networks are called (x, taps=taps) -> (last features, features [B N C] of those layers).
Their weights are He-normal and their biases N(0, 1), and a role of init="random" keeps both as
drawn. Any pretrained network with taps takes their place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float, Shaped

from jaxdistill.core.fields import Depth, Dtype
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array
from jaxdistill.models.layers import dense, fourier

HE = nnx.initializers.he_normal()
UNIT = nnx.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointFeatures:
    """Random ReLU layers over points [B, dim]."""

    dim: int = 2
    width: int = 128
    depth: Depth = 3
    scale: float = 1.0  # factor on the points: the larger, the finer the features

    def __call__(self, rngs: nnx.Rngs) -> PointFeaturesModule:
        return PointFeaturesModule(self, rngs)


class PointFeaturesModule(nnx.Module):
    def __init__(self, cfg: PointFeatures, rngs: nnx.Rngs):
        self.scale = cfg.scale
        sizes = [cfg.dim] + [cfg.width] * cfg.depth
        kernel = nnx.with_partitioning(HE, (None, "mlp"))
        bias = nnx.with_partitioning(UNIT, ("mlp",))
        layers = []
        for i, o in zip(sizes, sizes[1:]):
            layers.append(
                nnx.Linear(i, o, rngs=rngs, kernel_init=kernel, bias_init=bias)
            )
        self.layers = nnx.List(layers)

    def __call__(
        self, x: Float[Array, "B D"], *, taps: tuple[int, ...] = ()
    ) -> tuple[Float[Array, "B 1 C"], tuple[Float[Array, "B 1 C"], ...]]:
        """(features of the last layer, those of the layers in `taps`)."""
        h = self.scale * x
        features = []
        for layer in self.layers:
            h = constrain(nnx.relu(layer(h)), "batch", None)
            features.append(h[:, None])
        return features[-1], tuple(features[i] for i in taps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvFeatures:
    """Random ReLU convolutions over images [B H W channels] in -1 to 1.

    Each halves the resolution; the first divides it by `patch`.
    """

    channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512)
    # stride of the first; H and W are multiples of patch 2^(layers - 1)
    patch: int = 4
    dtype: Dtype = "float32"  # arithmetic

    def __call__(self, rngs: nnx.Rngs) -> ConvFeaturesModule:
        return ConvFeaturesModule(self, rngs)


class ConvFeaturesModule(nnx.Module):
    def __init__(self, cfg: ConvFeatures, rngs: nnx.Rngs):
        sizes = [cfg.channels, *cfg.widths]
        strides = [cfg.patch] + [2] * (len(cfg.widths) - 1)
        self.dtype = jnp.dtype(cfg.dtype)
        layers = []
        for i, o, stride in zip(sizes, sizes[1:], strides):
            layer = nnx.Conv(
                i,
                o,
                (max(stride, 3),) * 2,
                stride,
                rngs=rngs,
                dtype=self.dtype,
                kernel_init=nnx.with_partitioning(HE, (None, None, None, "mlp")),
                bias_init=nnx.with_partitioning(UNIT, ("mlp",)),
            )
            layers.append(layer)
        self.layers = nnx.List(layers)

    def __call__(
        self, x: Float[Array, "B H W C"], *, taps: tuple[int, ...] = ()
    ) -> tuple[Float[Array, "B h w D"], tuple[Float[Array, "B _ _"], ...]]:
        """(features of the last layer, those of the layers in `taps`, pixels by rows)."""
        h = x.astype(self.dtype)
        features = []
        for layer in self.layers:
            h = constrain(nnx.relu(layer(h)), "batch", None, None, None)
            features.append(h)
        return h, tuple(
            rearrange(features[i], "b h w c -> b (h w) c") for i in taps
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentReward:
    """A reward of noisy latents and their time.

    A convolutional trunk, the mean over its pixels, the time added, SiLU, and a linear map.
    """

    trunk: ConvFeatures = ConvFeatures(channels=4, patch=2)
    time_scale: float = 1000.0

    def __call__(self, rngs: nnx.Rngs) -> LatentRewardModule:
        return LatentRewardModule(self, rngs)


class LatentRewardModule(nnx.Module):
    def __init__(self, cfg: LatentReward, rngs: nnx.Rngs):
        width = cfg.trunk.widths[-1]
        self.time_scale = cfg.time_scale
        self.trunk = cfg.trunk(rngs)
        self.time = dense(32, width, (None, "mlp"), rngs=rngs)
        self.out = dense(width, 1, ("mlp", None), rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], t: Float[Array, " B"], cond: Any = None
    ) -> Float[Array, " B"]:
        """The reward in float32; `cond` is not read."""
        pooled = self.trunk(x)[0].astype(jnp.float32).mean((1, 2))
        time = self.time(fourier(self.time_scale * t, 32))
        return self.out(nnx.silu(pooled + time))[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """The decoder of a student that works on the data itself. No weights."""

    def __call__(self, rngs: nnx.Rngs) -> IdentityModule:
        return IdentityModule()


class IdentityModule(nnx.Module):
    def __call__(self, x: Shaped[Array, "*B"]) -> Shaped[Array, "*B"]:
        return x

    def denormalise(self, x0: Shaped[Array, "*B"]) -> Shaped[Array, "*B"]:
        return x0

    def decode(self, z: Shaped[Array, "*B"]) -> Shaped[Array, "*B"]:
        return z


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """A reward of points, noisy or not: the cosine of the angle to a direction.

    It is smoothed at the origin, and has no weights.
    """

    angle: float = 0.0  # of the direction, radians
    core: float = 0.1  # radius within which it fades

    def __call__(self, rngs: nnx.Rngs) -> DirectionModule:
        return DirectionModule(self)


class DirectionModule(nnx.Module):
    def __init__(self, cfg: Direction):
        self.angle = cfg.angle
        self.core = cfg.core

    def __call__(
        self, x: Float[Array, "B 2"], t: Float[Array, " B"], cond: Any = None
    ) -> Float[Array, " B"]:
        """The reward in -1 to 1; neither `t` nor `cond` is read."""
        along = x[:, 0] * jnp.cos(self.angle) + x[:, 1] * jnp.sin(self.angle)
        return along / jnp.sqrt(jnp.sum(x**2, -1) + self.core**2)
