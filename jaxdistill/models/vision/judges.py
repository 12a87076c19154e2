"""Frozen networks that judge samples: random features with taps, rewards, and the decoder of what
needs none.

Features called `(x, taps=taps) -> (last state, states after those layers [B N C])`. Weights are
He-normal, biases N(0, 1), both as they were drawn: a role of init="random" keeps them. Any
pretrained network with taps takes their place.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

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
    scale: float = 1.0  # that points are multiplied by: the larger, the finer the features

    def __call__(self, rngs: nnx.Rngs) -> PointFeaturesModule:
        return PointFeaturesModule(self, rngs)


class PointFeaturesModule(nnx.Module):
    def __init__(self, cfg: PointFeatures, rngs: nnx.Rngs):
        self.scale = cfg.scale
        sizes = [cfg.dim] + [cfg.width] * cfg.depth
        named = nnx.with_partitioning
        make = lambda i, o: nnx.Linear(
            i, o, rngs=rngs, kernel_init=named(HE, (None, "mlp")), bias_init=named(UNIT, ("mlp",))
        )
        self.layers = nnx.List([make(i, o) for i, o in zip(sizes, sizes[1:])])

    def __call__(self, x: Array, *, taps: tuple[int, ...] = ()):
        """x [B dim] -> (last state [B 1 width], states after the layers in `taps`)."""
        h = self.scale * x
        states = []
        for layer in self.layers:
            h = constrain(nnx.relu(layer(h)), "batch", None)
            states.append(h[:, None])
        return states[-1], tuple(states[i] for i in taps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvFeatures:
    """Random ReLU convolutions over images [B H W channels] in -1 to 1; each halves the resolution,
    the first more.
    """

    channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512)
    patch: int = 4  # stride of the first; H and W are multiples of patch 2^(layers - 1)
    dtype: Dtype = "float32"  # arithmetic

    def __call__(self, rngs: nnx.Rngs) -> ConvFeaturesModule:
        return ConvFeaturesModule(self, rngs)


class ConvFeaturesModule(nnx.Module):
    def __init__(self, cfg: ConvFeatures, rngs: nnx.Rngs):
        named = nnx.with_partitioning
        sizes = [cfg.channels, *cfg.widths]
        self.dtype = jnp.dtype(cfg.dtype)

        def make(i, o, stride):
            kernel = named(HE, (None, None, None, "mlp"))
            bias = named(UNIT, ("mlp",))
            return nnx.Conv(
                i,
                o,
                (max(stride, 3),) * 2,
                stride,
                rngs=rngs,
                dtype=self.dtype,
                kernel_init=kernel,
                bias_init=bias,
            )

        self.layers = nnx.List(
            [make(i, o, 2 if n else cfg.patch) for n, (i, o) in enumerate(zip(sizes, sizes[1:]))]
        )

    def __call__(self, x: Array, *, taps: tuple[int, ...] = ()):
        """x [B H W C] -> (last state [B h w width], states [B N width] after the layers in
        `taps`).
        """
        h = x.astype(self.dtype)
        states = []
        for layer in self.layers:
            h = constrain(nnx.relu(layer(h)), "batch", None, None, None)
            states.append(h)
        return h, tuple(rearrange(states[i], "b h w c -> b (h w) c") for i in taps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentReward:
    """A scalar of noisy latents [B H W channels] and their time: a convolutional trunk, its mean,
    and a hidden layer.
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

    def __call__(self, x: Array, t: Array, cond=None) -> Array:
        """x [B H W C], t [B] -> [B], float32."""
        pooled = self.trunk(x)[0].astype(jnp.float32).mean((1, 2))
        return self.out(nnx.silu(pooled + self.time(fourier(self.time_scale * t, 32))))[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """The decoder of a student that works on the data itself. No weights."""

    def __call__(self, rngs: nnx.Rngs) -> IdentityModule:
        return IdentityModule()


class IdentityModule(nnx.Module):
    def __call__(self, x: Array) -> Array:
        return x

    def denormalise(self, x0: Array) -> Array:
        return x0

    def decode(self, z: Array) -> Array:
        return z


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """A reward on points, noisy or not: the cosine of the angle to a direction, smoothed at the
    origin. No weights.
    """

    angle: float = 0.0  # of the direction, radians
    core: float = 0.1  # radius within which it fades

    def __call__(self, rngs: nnx.Rngs) -> DirectionModule:
        return DirectionModule(self)


class DirectionModule(nnx.Module):
    def __init__(self, cfg: Direction):
        self.angle = cfg.angle
        self.core = cfg.core

    def __call__(self, x: Array, t: Array, cond: Array | None = None) -> Array:
        """x [B 2], t [B] -> [B] in -1 to 1."""
        along = x[:, 0] * jnp.cos(self.angle) + x[:, 1] * jnp.sin(self.angle)
        return along / jnp.sqrt(jnp.sum(x**2, -1) + self.core**2)
