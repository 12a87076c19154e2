"""The image autoencoder of latent diffusion (arXiv:2112.10752), diffusers' `AutoencoderKL`.

ResNet levels lead down to latents of a diagonal Gaussian, and ResNet levels lead up again; each
half has a middle with one attention head over all pixels.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array
from jaxdistill.models.blocks import Down, ResBlock, Up
from jaxdistill.models.layers import as_program, attention, conv, dense, group_norm

EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAE:
    """Sizes. Defaults are a toy's.

    Stable Diffusion 1 and 2: size 512, latents 4, widths 128 256 512 512, groups 32, scale 0.18215.
    SDXL: size 1024, scale 0.13025. Stable Diffusion 3 and FLUX.1: latents 16, scale 1.5305 and
    0.3611, shift 0.0609 and 0.1159, quant False.
    """

    size: int = 16  # images are [size, size, channels] in training; others work
    channels: int = 3
    latents: int = 4  # channels of z, at 1 / 2^(levels - 1) of the resolution
    widths: tuple[int, ...] = (16, 32)  # channels of the levels
    # ResNet blocks of a level of the encoder; one more in the decoder
    layers: Depth = 1
    groups: int = 8  # of the group norms
    attention: bool = True  # in the middle of both halves
    quant: bool = True  # a 1x1 convolution after the encoder
    post_quant: bool = True  # and one before the decoder
    scale: float = 0.18215  # denoisers work on (z - shift) scale
    shift: float = 0.0
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"  # of each ResNet block

    @property
    def down(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(self.widths) - 1)

    def __call__(self, rngs: nnx.Rngs) -> VAEModule:
        return VAEModule(self, rngs)


class PixelAttention(nnx.Module):
    """One attention head over the pixels, as a residual branch."""

    def __init__(self, cfg: VAE, dim: int, rngs: nnx.Rngs):
        make = functools.partial(
            dense, dim, dim, rngs=rngs, dtype=jnp.dtype(cfg.dtype)
        )
        self.norm = norm(cfg, dim, rngs)
        self.to_q = make(("embed", "heads"))
        self.to_k = make(("embed", "heads"))
        self.to_v = make(("embed", "heads"))
        self.to_out = make(("heads", "embed"))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        h = rearrange(self.norm(x), "b h w c -> b (h w) 1 c")
        out = self.to_out(attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + out.reshape(x.shape)


def norm(cfg: VAE, dim: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return group_norm(
        dim, cfg.groups, rngs=rngs, eps=EPS, dtype=jnp.dtype(cfg.dtype)
    )


def resnet(cfg: VAE, i: int, o: int, rngs: nnx.Rngs) -> ResBlock:
    """A residual block of the autoencoder from i to o channels."""
    return ResBlock(
        i, o, groups=cfg.groups, eps=EPS, rngs=rngs, dtype=jnp.dtype(cfg.dtype)
    )


class Level(nnx.Module):
    """`count` ResNet blocks from i to o channels, then a change of resolution."""

    def __init__(
        self,
        cfg: VAE,
        i: int,
        o: int,
        count: int,
        resample: nnx.Module | None,
        rngs: nnx.Rngs,
    ):
        self.remat = cfg.remat
        ins = [i] + [o] * (count - 1)
        self.resnets = nnx.List(
            [resnet(cfg, channels, o, rngs) for channels in ins]
        )
        if resample:
            self.resample = resample

    def __call__(self, x: Float[Array, "B _ _ i"]) -> Float[Array, "B _ _ o"]:
        for block in self.resnets:
            x = as_program(block, self.remat)(x)
        return self.resample(x) if hasattr(self, "resample") else x


class Middle(nnx.Module):
    """ResNet block, attention over the pixels, ResNet block."""

    def __init__(self, cfg: VAE, rngs: nnx.Rngs):
        self.remat = cfg.remat
        dim = cfg.widths[-1]
        self.before = resnet(cfg, dim, dim, rngs)
        self.after = resnet(cfg, dim, dim, rngs)
        if cfg.attention:
            self.attention = PixelAttention(cfg, dim, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = as_program(self.before, self.remat)(x)
        if hasattr(self, "attention"):
            x = self.attention(x)
        return as_program(self.after, self.remat)(x)


class Encoder(nnx.Module):
    def __init__(self, cfg: VAE, rngs: nnx.Rngs):
        w = cfg.widths
        dtype = jnp.dtype(cfg.dtype)
        convolution = functools.partial(conv, size=(3, 3), rngs=rngs, dtype=dtype)
        self.conv_in = convolution(cfg.channels, w[0], names=(None, "embed"))
        levels = []
        for i, width in enumerate(w):
            last = i == len(w) - 1
            resample = None if last else Down(width, low=0, rngs=rngs, dtype=dtype)
            levels.append(
                Level(cfg, w[max(i - 1, 0)], width, cfg.layers, resample, rngs)
            )
        self.levels = nnx.List(levels)
        self.mid = Middle(cfg, rngs)
        self.norm_out = norm(cfg, w[-1], rngs)
        self.conv_out = convolution(w[-1], 2 * cfg.latents, names=("embed", None))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w z"]:
        x = constrain(self.conv_in(x), "batch", None, None, None)
        for level in self.levels:
            x = level(x)
        return self.conv_out(nnx.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    def __init__(self, cfg: VAE, rngs: nnx.Rngs):
        w = cfg.widths[::-1]
        dtype = jnp.dtype(cfg.dtype)
        convolution = functools.partial(conv, size=(3, 3), rngs=rngs, dtype=dtype)
        self.conv_in = convolution(cfg.latents, w[0], names=(None, "embed"))
        self.mid = Middle(cfg, rngs)
        levels = []
        for i, width in enumerate(w):
            last = i == len(w) - 1
            resample = None if last else Up(width, rngs=rngs, dtype=dtype)
            levels.append(
                Level(cfg, w[max(i - 1, 0)], width, cfg.layers + 1, resample, rngs)
            )
        self.levels = nnx.List(levels)
        self.norm_out = norm(cfg, w[-1], rngs)
        self.conv_out = convolution(w[-1], cfg.channels, names=("embed", None))

    def __call__(self, z: Float[Array, "B h w z"]) -> Float[Array, "B H W C"]:
        x = self.mid(constrain(self.conv_in(z), "batch", None, None, None))
        for level in self.levels:
            x = level(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class VAEModule(nnx.Module):
    def __init__(self, cfg: VAE, rngs: nnx.Rngs):
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.encoder = Encoder(cfg, rngs)
        self.decoder = Decoder(cfg, rngs)
        point = functools.partial(
            conv, names=(None, None), rngs=rngs, dtype=self.dtype
        )
        if cfg.quant:
            self.quant = point(2 * cfg.latents, 2 * cfg.latents, (1, 1))
        if cfg.post_quant:
            self.post_quant = point(cfg.latents, cfg.latents, (1, 1))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The reconstruction from the mean of the latents."""
        return self.decode(self.encode(x)[0]).astype(x.dtype)

    def encode(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B h w z"], Float[Array, "B h w z"]]:
        """Mean and standard deviation of the latents of images in -1 to 1, in float32."""
        h = self.encoder(x.astype(self.dtype))
        if self.cfg.quant:
            h = self.quant(h)
        mean, log_var = jnp.split(h.astype(jnp.float32), 2, -1)
        return mean, jnp.exp(0.5 * jnp.clip(log_var, -30.0, 20.0))

    def decode(self, z: Float[Array, "B h w z"]) -> Float[Array, "B H W C"]:
        """Images of latents, in float32."""
        z = z.astype(self.dtype)
        if self.cfg.post_quant:
            z = self.post_quant(z)
        return self.decoder(z).astype(jnp.float32)

    def normalise(self, z: Float[Array, "*B z"]) -> Float[Array, "*B z"]:
        """Latents as denoisers are trained on them: of about unit variance."""
        return (z - self.cfg.shift) * self.cfg.scale

    def denormalise(self, x0: Float[Array, "*B z"]) -> Float[Array, "*B z"]:
        """The inverse of `normalise`, for `decode`."""
        return x0 / self.cfg.scale + self.cfg.shift
