"""The image autoencoder of latent diffusion (arXiv:2112.10752) with the weights of diffusers'
`AutoencoderKL`.

ResNet levels on the way down to latents of a diagonal Gaussian, ResNet levels on the way up, each
with a middle of one attention head over all pixels.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array
from jaxdistill.models.blocks import Down, ResBlock, Up
from jaxdistill.models.layers import as_program, attention, conv, dense, group_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAE:
    """Sizes. Defaults are a toy's. Stable Diffusion 1 and 2: size 512, latents 4, widths 128 256
    512 512, groups 32, scale 0.18215; SDXL: size 1024, scale 0.13025; Stable Diffusion 3 and
    FLUX.1: latents 16, scale 1.5305 and 0.3611, shift 0.0609 and 0.1159, quant False.
    """

    size: int = 16  # images are [size, size, channels] in training; others work
    channels: int = 3
    latents: int = 4  # channels of z, at 1 / 2^(levels - 1) of the resolution
    widths: tuple[int, ...] = (16, 32)  # channels of the levels
    layers: Depth = 1  # ResNet blocks of a level of the encoder; one more in the decoder
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
    """One attention head over the pixels, as a residual branch of [B H W C]."""

    def __init__(self, cfg: VAE, dim: int, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        self.norm = group_norm(dim, cfg.groups, rngs=rngs, eps=1e-6, dtype=dtype)
        self.to_q, self.to_k, self.to_v = (
            dense(dim, dim, ("embed", "heads"), rngs=rngs, dtype=dtype) for _ in range(3)
        )
        self.to_out = dense(dim, dim, ("heads", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        h = rearrange(self.norm(x), "b h w c -> b (h w) 1 c")
        return x + self.to_out(attention(self.to_q(h), self.to_k(h), self.to_v(h))).reshape(x.shape)


class Level(nnx.Module):
    """`count` ResNet blocks from i to o channels, then a change of resolution."""

    def __init__(
        self, cfg: VAE, i: int, o: int, count: int, resample: nnx.Module | None, rngs: nnx.Rngs
    ):
        self.remat = cfg.remat
        make = lambda i: ResBlock(
            i, o, groups=cfg.groups, eps=1e-6, rngs=rngs, dtype=jnp.dtype(cfg.dtype)
        )
        self.resnets = nnx.List([make(i if j == 0 else o) for j in range(count)])
        if resample:
            self.resample = resample

    def __call__(self, x: Array) -> Array:
        for block in self.resnets:
            x = as_program(block, self.remat)(x)
        return self.resample(x) if hasattr(self, "resample") else x


class Middle(nnx.Module):
    def __init__(self, cfg: VAE, rngs: nnx.Rngs):
        self.remat = cfg.remat
        dim = cfg.widths[-1]
        make = lambda: ResBlock(
            dim, dim, groups=cfg.groups, eps=1e-6, rngs=rngs, dtype=jnp.dtype(cfg.dtype)
        )
        self.before = make()
        self.after = make()
        if cfg.attention:
            self.attention = PixelAttention(cfg, dim, rngs)

    def __call__(self, x: Array) -> Array:
        x = as_program(self.before, self.remat)(x)
        return as_program(self.after, self.remat)(
            self.attention(x) if hasattr(self, "attention") else x
        )


class Encoder(nnx.Module):
    def __init__(self, cfg: VAE, rngs: nnx.Rngs):
        w = cfg.widths
        dtype = jnp.dtype(cfg.dtype)
        shrink = lambda i: Down(w[i], low=0, rngs=rngs, dtype=dtype) if i < len(w) - 1 else None
        self.conv_in = conv(cfg.channels, w[0], (3, 3), (None, "embed"), rngs=rngs, dtype=dtype)
        self.levels = nnx.List(
            [Level(cfg, w[max(i - 1, 0)], w[i], cfg.layers, shrink(i), rngs) for i in range(len(w))]
        )
        self.mid = Middle(cfg, rngs)
        self.norm_out = group_norm(w[-1], cfg.groups, rngs=rngs, eps=1e-6, dtype=dtype)
        self.conv_out = conv(
            w[-1], 2 * cfg.latents, (3, 3), ("embed", None), rngs=rngs, dtype=dtype
        )

    def __call__(self, x: Array) -> Array:
        x = constrain(self.conv_in(x), "batch", None, None, None)
        for level in self.levels:
            x = level(x)
        return self.conv_out(nnx.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    def __init__(self, cfg: VAE, rngs: nnx.Rngs):
        w = cfg.widths[::-1]
        dtype = jnp.dtype(cfg.dtype)
        grow = lambda i: Up(w[i], rngs=rngs, dtype=dtype) if i < len(w) - 1 else None
        self.conv_in = conv(cfg.latents, w[0], (3, 3), (None, "embed"), rngs=rngs, dtype=dtype)
        self.mid = Middle(cfg, rngs)
        self.levels = nnx.List(
            [
                Level(cfg, w[max(i - 1, 0)], w[i], cfg.layers + 1, grow(i), rngs)
                for i in range(len(w))
            ]
        )
        self.norm_out = group_norm(w[-1], cfg.groups, rngs=rngs, eps=1e-6, dtype=dtype)
        self.conv_out = conv(w[-1], cfg.channels, (3, 3), ("embed", None), rngs=rngs, dtype=dtype)

    def __call__(self, z: Array) -> Array:
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
        point = lambda n: conv(n, n, (1, 1), (None, None), rngs=rngs, dtype=self.dtype)
        if cfg.quant:
            self.quant = point(2 * cfg.latents)
        if cfg.post_quant:
            self.post_quant = point(cfg.latents)

    def __call__(self, x: Array) -> Array:
        """The reconstruction of x [B H W C] from the mean of its latents."""
        return self.decode(self.encode(x)[0]).astype(x.dtype)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Images [B H W C] in -1 to 1 -> mean and standard deviation of z, each [B h w latents],
        float32.
        """
        h = self.encoder(x.astype(self.dtype))
        h = self.quant(h) if self.cfg.quant else h
        mean, log_var = jnp.split(h.astype(jnp.float32), 2, -1)
        return mean, jnp.exp(0.5 * jnp.clip(log_var, -30.0, 20.0))

    def decode(self, z: Array) -> Array:
        """z [B h w latents] -> images [B H W C], float32."""
        z = z.astype(self.dtype)
        return self.decoder(self.post_quant(z) if self.cfg.post_quant else z).astype(jnp.float32)

    def normalise(self, z: Array) -> Array:
        """What a denoiser is trained on: z shifted and scaled to about unit variance."""
        return (z - self.cfg.shift) * self.cfg.scale

    def denormalise(self, x0: Array) -> Array:
        """The inverse of `normalise`, for `decode`."""
        return x0 / self.cfg.scale + self.cfg.shift
