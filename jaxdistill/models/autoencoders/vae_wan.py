"""The video autoencoder of Wan 2.1 (arXiv:2503.20314), and Qwen-Image's fine-tuned from it, with
the weights of diffusers' `AutoencoderKLWan` and `AutoencoderKLQwenImage`.

Every convolution along time looks back only, and the first frame has a latent of its own, so that
pictures are videos of one frame. A clip is encoded and decoded at once; PyTorch goes through it
piece by piece with caches, to the same result.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.blocks import Down, Up
from jaxdistill.models.layers import as_program, attention, conv, dense, rms_norm

EPS = 1e-24  # of the norms, which divide by the norm itself unless it is 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanVAE:
    """Sizes. Defaults are a toy's. Wan 2.1 (also 2.2 A14B) and Qwen-Image: width 96, multiples 1 2
    4 4, blocks 2, temporal False True True, latents 16, with the mean and std of their config.json.
    """

    channels: int = 3
    latents: int = 4  # channels of z, at 1 / 2^(levels - 1) of the resolution
    width: int = 8
    decoder_width: int = 0  # 0: as the encoder's
    multiples: tuple[int, ...] = (1, 2)  # of width: channels of the levels
    blocks: Depth = 1  # residual blocks of a level of the encoder; one more in the decoder
    temporal: tuple[bool, ...] = (
        True,
    )  # which changes of resolution, from the pixels on, change the number of frames too
    mean: tuple[float, ...] = (0.0,) * 4  # denoisers work on (z - mean) / std
    std: tuple[float, ...] = (1.0,) * 4
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"  # of each residual block

    @property
    def down(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(self.multiples) - 1)

    def __call__(self, rngs: nnx.Rngs) -> WanVAEModule:
        return WanVAEModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenImageVAE(WanVAE):
    """The same network under the class and names that Qwen-Image's has in diffusers."""


class Causal(nnx.Conv):
    """A convolution of [B T H W C] that sees no later frame: k - 1 empty frames before the first,
    none after the last.
    """

    def __call__(self, x: Array) -> Array:
        kernel, bias = (w.astype(self.dtype) for w in (self.kernel[...], self.bias[...]))
        kernel = kernel[-1:] if x.shape[1] == 1 else kernel  # of empty frames nothing comes
        pads = [(kernel.shape[0] - 1, 0), *((n // 2, n // 2) for n in kernel.shape[1:3])]
        return (
            jax.lax.conv_general_dilated(
                x.astype(self.dtype),
                kernel,
                (1, 1, 1),
                pads,
                dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            )
            + bias
        )


def causal(
    i: int,
    o: int,
    rngs: nnx.Rngs,
    dtype,
    *,
    size: tuple[int, int, int] = (3, 3, 3),
    names=("embed", "mlp"),
) -> Causal:
    return conv(i, o, size, names, rngs=rngs, dtype=dtype, kind=Causal)


class ResBlock(nnx.Module):
    """Norm, SiLU, causal convolution, twice, on a shortcut (1x1x1 where the channels change)."""

    def __init__(self, i: int, o: int, rngs: nnx.Rngs, dtype):
        self.norm1, self.norm2 = (rms_norm(n, rngs=rngs, eps=EPS, dtype=dtype) for n in (i, o))
        self.conv1 = causal(i, o, rngs, dtype)
        self.conv2 = causal(o, o, rngs, dtype, names=("mlp", "embed"))
        if i != o:
            self.shortcut = causal(i, o, rngs, dtype, size=(1, 1, 1))

    def __call__(self, x: Array) -> Array:
        h = self.conv2(nnx.silu(self.norm2(self.conv1(nnx.silu(self.norm1(x))))))
        return constrain(
            (self.shortcut(x) if hasattr(self, "shortcut") else x) + h,
            "batch",
            None,
            None,
            None,
            None,
        )


class PixelAttention(nnx.Module):
    """One attention head over the pixels of each frame, as a residual branch of [B T H W C]."""

    def __init__(self, dim: int, rngs: nnx.Rngs, dtype):
        self.norm = rms_norm(dim, rngs=rngs, eps=EPS, dtype=dtype)
        self.qkv = dense(dim, 3 * dim, ("embed", "heads"), rngs=rngs, dtype=dtype)
        self.proj = dense(dim, dim, ("heads", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        q, k, v = jnp.split(
            rearrange(self.qkv(self.norm(x)), "b t h w c -> (b t) (h w) 1 c"), 3, -1
        )
        return x + self.proj(attention(q, k, v)).reshape(x.shape)


class Middle(nnx.Module):
    def __init__(self, dim: int, rngs: nnx.Rngs, dtype):
        self.before, self.after = (ResBlock(dim, dim, rngs, dtype) for _ in range(2))
        self.attention = PixelAttention(dim, rngs, dtype)


class Level(nnx.Module):
    """Residual blocks from i to o channels, then a change of resolution, with `time` of the frames'
    number too.
    """

    def __init__(
        self,
        i: int,
        o: int,
        count: int,
        resample: Down | Up | None,
        time: nnx.Conv | None,
        rngs: nnx.Rngs,
        dtype,
    ):
        self.blocks = nnx.List([ResBlock(i if j == 0 else o, o, rngs, dtype) for j in range(count)])
        if resample is not None:
            self.resample = resample
        if time is not None:
            self.time = time

    def move(self, x: Array) -> Array:
        """x [B T H W C] at half or twice the resolution. 1 + 2 n frames become 1 + n on the way
        down, and n of the 1 + n frames two each on the way up: the first stays alone.
        """
        spatial = lambda x: rearrange(
            self.resample(rearrange(x, "b t h w c -> (b t) h w c")),
            "(b t) h w c -> b t h w c",
            b=x.shape[0],
        )
        temporal = hasattr(self, "time")
        several = x.shape[1] > 1
        if isinstance(self.resample, Down):
            x = spatial(x)
            return jnp.concatenate([x[:, :1], self.time(x)], 1) if temporal and several else x
        if temporal and several:  # the first frame is not seen by those after it
            x = jnp.concatenate(
                [x[:, :1], rearrange(self.time(x[:, 1:]), "b t h w (s c) -> b (t s) h w c", s=2)], 1
            )
        return spatial(x)


class Encoder(nnx.Module):
    def __init__(self, cfg: WanVAE, rngs: nnx.Rngs):
        w = [cfg.width * m for m in (1, *cfg.multiples)]
        last = len(cfg.multiples) - 1
        dtype = jnp.dtype(cfg.dtype)
        self.remat = cfg.remat
        self.conv_in = causal(cfg.channels, w[0], rngs, dtype, names=(None, "embed"))
        levels = []
        for i in range(last + 1):
            o = w[i + 1]
            moves = i < last
            time = (
                conv(o, o, (3, 1, 1), rngs=rngs, strides=(2, 1, 1), padding="VALID", dtype=dtype)
                if moves and cfg.temporal[i]
                else None
            )
            levels.append(
                Level(
                    w[i],
                    o,
                    cfg.blocks,
                    Down(o, low=0, rngs=rngs, dtype=dtype) if moves else None,
                    time,
                    rngs,
                    dtype,
                )
            )
        self.levels = nnx.List(levels)
        self.mid = Middle(w[-1], rngs, dtype)
        self.norm_out = rms_norm(w[-1], rngs=rngs, eps=EPS, dtype=dtype)
        self.conv_out = causal(w[-1], 2 * cfg.latents, rngs, dtype, names=("embed", None))

    def __call__(self, x: Array) -> Array:
        x = walk(self.levels, self.conv_in(x), self.remat)
        return self.conv_out(nnx.silu(self.norm_out(middle(self.mid, x, self.remat))))


class Decoder(nnx.Module):
    def __init__(self, cfg: WanVAE, rngs: nnx.Rngs):
        width = cfg.decoder_width or cfg.width
        last = len(cfg.multiples) - 1
        dtype = jnp.dtype(cfg.dtype)
        w = [width * m for m in cfg.multiples[::-1]]
        temporal = cfg.temporal[::-1]
        self.remat = cfg.remat
        self.conv_in = causal(cfg.latents, w[0], rngs, dtype, names=(None, "embed"))
        self.mid = Middle(w[0], rngs, dtype)
        levels = []
        for i, o in enumerate(w):
            moves = i < last  # to half of the channels
            time = causal(o, 2 * o, rngs, dtype, size=(3, 1, 1)) if moves and temporal[i] else None
            resample = Up(o, o // 2, rngs=rngs, dtype=dtype) if moves else None
            levels.append(
                Level(w[i - 1] // 2 if i else w[0], o, cfg.blocks + 1, resample, time, rngs, dtype)
            )
        self.levels = nnx.List(levels)
        self.norm_out = rms_norm(w[-1], rngs=rngs, eps=EPS, dtype=dtype)
        self.conv_out = causal(w[-1], cfg.channels, rngs, dtype, names=("embed", None))

    def __call__(self, z: Array) -> Array:
        x = walk(self.levels, middle(self.mid, self.conv_in(z), self.remat), self.remat)
        return self.conv_out(nnx.silu(self.norm_out(x)))


def middle(mid: Middle, x: Array, remat: str) -> Array:
    return as_program(mid.after, remat)(mid.attention(as_program(mid.before, remat)(x)))


def walk(levels: nnx.List, x: Array, remat: str) -> Array:
    for level in levels:
        for block in level.blocks:
            x = as_program(block, remat)(x)
        x = level.move(x) if hasattr(level, "resample") else x
    return x


class WanVAEModule(nnx.Module):
    def __init__(self, cfg: WanVAE, rngs: nnx.Rngs):
        if len(cfg.temporal) != len(cfg.multiples) - 1:
            raise Refused(
                f"model: temporal={cfg.temporal}, expected one for each of the {len(cfg.multiples) - 1} changes of resolution"
            )
        if not len(cfg.mean) == len(cfg.std) == cfg.latents:
            raise Refused(
                f"model: {len(cfg.mean)} means and {len(cfg.std)} stds, expected {cfg.latents} each, one a latent channel"
            )
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.encoder = Encoder(cfg, rngs)
        self.decoder = Decoder(cfg, rngs)
        point = lambda n: causal(n, n, rngs, self.dtype, size=(1, 1, 1), names=(None, None))
        self.quant = point(2 * cfg.latents)
        self.post_quant = point(cfg.latents)

    def __call__(self, x: Array) -> Array:
        """The reconstruction of x [B T H W C] from the mean of its latents."""
        return self.decode(self.encode(x)[0]).astype(x.dtype)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Videos [B T H W C] in -1 to 1 -> mean and standard deviation of z, each [B t h w
        latents], float32.

        T = 1 + 2^n (t - 1), n the number of temporal changes. Pictures [B H W C] give [B h w
        latents]. Raises Refused on another number of frames and where the resolution does not
        divide.
        """
        if x.ndim == 4:
            mean, std = self.encode(x[:, None])
            return mean[:, 0], std[:, 0]
        frames = 2 ** sum(self.cfg.temporal)
        pixels = 2 ** len(self.cfg.temporal)
        if (x.shape[1] - 1) % frames:
            raise Refused(f"x {list(x.shape)}: expected 1 + a multiple of {frames} frames")
        if any(n % pixels for n in x.shape[2:4]):
            raise Refused(f"x {list(x.shape)}: height and width must be multiples of {pixels}")
        mean, log_var = jnp.split(
            self.quant(self.encoder(x.astype(self.dtype))).astype(jnp.float32), 2, -1
        )
        return mean, jnp.exp(0.5 * jnp.clip(log_var, -30.0, 20.0))

    def decode(self, z: Array) -> Array:
        """z [B t h w latents] -> videos [B T H W C], clipped to -1 to 1, float32; z [B h w latents]
        -> pictures [B H W C].
        """
        if z.ndim == 4:
            return self.decode(z[:, None])[:, 0]
        return jnp.clip(
            self.decoder(self.post_quant(z.astype(self.dtype))).astype(jnp.float32), -1.0, 1.0
        )

    def normalise(self, z: Array) -> Array:
        """What a denoiser is trained on: z with mean 0 and standard deviation 1 in each channel."""
        return (z - jnp.asarray(self.cfg.mean, z.dtype)) / jnp.asarray(self.cfg.std, z.dtype)

    def denormalise(self, x0: Array) -> Array:
        """The inverse of `normalise`, for `decode`."""
        return x0 * jnp.asarray(self.cfg.std, x0.dtype) + jnp.asarray(self.cfg.mean, x0.dtype)
