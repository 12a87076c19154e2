"""The video autoencoder of Wan 2.1 (arXiv:2503.20314), and Qwen-Image's fine-tuned from it.

Weights are those of diffusers' `AutoencoderKLWan` and `AutoencoderKLQwenImage`. Every convolution
along time looks back only, and the first frame has a latent of its own, so that pictures are videos
of one frame. A clip is encoded and decoded at once; PyTorch goes through it piece by piece with
caches, to the same result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.blocks import Down, Up
from jaxdistill.models.layers import as_program, attention, conv, dense, rms_norm

EPS = 1e-24  # of the norms, which divide by the norm itself unless it is 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanVAE:
    """Sizes. Defaults are a toy's.

    Wan 2.1 (also 2.2 A14B) and Qwen-Image: width 96, multiples 1 2 4 4, blocks 2, temporal False
    True True, latents 16, with the mean and std of their config.json.
    """

    channels: int = 3
    latents: int = 4  # channels of z, at 1 / 2^(levels - 1) of the resolution
    width: int = 8
    decoder_width: int = 0  # 0: as the encoder's
    multiples: tuple[int, ...] = (1, 2)  # of width: channels of the levels
    # residual blocks of a level of the encoder; one more in the decoder
    blocks: Depth = 1
    # which changes of resolution, from the pixels on, change the number of frames too
    temporal: tuple[bool, ...] = (True,)
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
    """A convolution that sees no later frame.

    Along time it is padded with k - 1 empty frames before the first and none after the last.
    """

    def __call__(self, x: Float[Array, "B T H W i"]) -> Float[Array, "B T H W o"]:
        kernel = self.kernel[...].astype(self.dtype)
        bias = self.bias[...].astype(self.dtype)
        if x.shape[1] == 1:  # empty frames contribute nothing
            kernel = kernel[-1:]
        frames, rows, cols = kernel.shape[:3]
        pads = [(frames - 1, 0), (rows // 2, rows // 2), (cols // 2, cols // 2)]
        out = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel,
            (1, 1, 1),
            pads,
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
        return out + bias


def causal(
    i: int,
    o: int,
    rngs: nnx.Rngs,
    dtype,
    *,
    size: tuple[int, int, int] = (3, 3, 3),
    names=("embed", "mlp"),
) -> Causal:
    """A causal convolution from i to o channels."""
    return conv(i, o, size, names, rngs=rngs, dtype=dtype, kind=Causal)


class ResBlock(nnx.Module):
    """Norm, SiLU, causal convolution, twice, as a residual branch.

    The shortcut is a 1x1x1 convolution where the channels change.
    """

    def __init__(self, i: int, o: int, rngs: nnx.Rngs, dtype):
        self.norm1 = rms_norm(i, rngs=rngs, eps=EPS, dtype=dtype)
        self.norm2 = rms_norm(o, rngs=rngs, eps=EPS, dtype=dtype)
        self.conv1 = causal(i, o, rngs, dtype)
        self.conv2 = causal(o, o, rngs, dtype, names=("mlp", "embed"))
        if i != o:
            self.shortcut = causal(i, o, rngs, dtype, size=(1, 1, 1))

    def __call__(self, x: Float[Array, "B T H W i"]) -> Float[Array, "B T H W o"]:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        return constrain(shortcut + h, "batch", None, None, None, None)


class PixelAttention(nnx.Module):
    """One attention head over the pixels of each frame, as a residual branch."""

    def __init__(self, dim: int, rngs: nnx.Rngs, dtype):
        self.norm = rms_norm(dim, rngs=rngs, eps=EPS, dtype=dtype)
        self.qkv = dense(dim, 3 * dim, ("embed", "heads"), rngs=rngs, dtype=dtype)
        self.proj = dense(dim, dim, ("heads", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        qkv = rearrange(self.qkv(self.norm(x)), "b t h w c -> (b t) (h w) 1 c")
        q, k, v = jnp.split(qkv, 3, -1)
        return x + self.proj(attention(q, k, v)).reshape(x.shape)


class Middle(nnx.Module):
    """Residual block, attention over the pixels, residual block."""

    def __init__(self, dim: int, rngs: nnx.Rngs, dtype):
        self.before = ResBlock(dim, dim, rngs, dtype)
        self.after = ResBlock(dim, dim, rngs, dtype)
        self.attention = PixelAttention(dim, rngs, dtype)


class Level(nnx.Module):
    """Residual blocks from i to o channels, then a change of resolution.

    With `time` the number of frames changes too.
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
        ins = [i] + [o] * (count - 1)
        self.blocks = nnx.List(
            [ResBlock(channels, o, rngs, dtype) for channels in ins]
        )
        if resample is not None:
            self.resample = resample
        if time is not None:
            self.time = time

    def resampled(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B _ _ _ o"]:
        """x at half or twice the resolution.

        With `time`, 1 + 2 n frames become 1 + n on the way down, and 1 + n become 1 + 2 n on the
        way up: the first frame stays alone.
        """
        temporal = hasattr(self, "time") and x.shape[1] > 1
        if isinstance(self.resample, Down):
            x = self._spatial(x)
            return jnp.concatenate([x[:, :1], self.time(x)], 1) if temporal else x
        if temporal:  # the first frame is not seen by those after it
            later = rearrange(
                self.time(x[:, 1:]), "b t h w (s c) -> b (t s) h w c", s=2
            )
            x = jnp.concatenate([x[:, :1], later], 1)
        return self._spatial(x)

    def _spatial(self, x: Array) -> Array:
        """Each frame of [B T H W C] at the other resolution."""
        frames = self.resample(rearrange(x, "b t h w c -> (b t) h w c"))
        return rearrange(frames, "(b t) h w c -> b t h w c", b=x.shape[0])


class Encoder(nnx.Module):
    def __init__(self, cfg: WanVAE, rngs: nnx.Rngs):
        w = [cfg.width * m for m in (1, *cfg.multiples)]
        last = len(cfg.multiples) - 1
        dtype = jnp.dtype(cfg.dtype)
        shrink_time = functools.partial(
            conv, size=(3, 1, 1), strides=(2, 1, 1), padding="VALID"
        )
        self.remat = cfg.remat
        self.conv_in = causal(
            cfg.channels, w[0], rngs, dtype, names=(None, "embed")
        )
        levels = []
        for i, o in enumerate(w[1:]):
            time = None
            resample = None
            if i < last and cfg.temporal[i]:
                time = shrink_time(o, o, rngs=rngs, dtype=dtype)
            if i < last:
                resample = Down(o, low=0, rngs=rngs, dtype=dtype)
            levels.append(Level(w[i], o, cfg.blocks, resample, time, rngs, dtype))
        self.levels = nnx.List(levels)
        self.mid = Middle(w[-1], rngs, dtype)
        self.norm_out = rms_norm(w[-1], rngs=rngs, eps=EPS, dtype=dtype)
        self.conv_out = causal(
            w[-1], 2 * cfg.latents, rngs, dtype, names=("embed", None)
        )

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w z"]:
        x = run_levels(self.levels, self.conv_in(x), self.remat)
        x = run_middle(self.mid, x, self.remat)
        return self.conv_out(nnx.silu(self.norm_out(x)))


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
        now = w[0]
        for i, o in enumerate(w):
            time = None
            resample = None
            if i < last and temporal[i]:
                time = causal(o, 2 * o, rngs, dtype, size=(3, 1, 1))
            if i < last:
                resample = Up(o, o // 2, rngs=rngs, dtype=dtype)
            levels.append(
                Level(now, o, cfg.blocks + 1, resample, time, rngs, dtype)
            )
            now = o // 2
        self.levels = nnx.List(levels)
        self.norm_out = rms_norm(w[-1], rngs=rngs, eps=EPS, dtype=dtype)
        self.conv_out = causal(
            w[-1], cfg.channels, rngs, dtype, names=("embed", None)
        )

    def __call__(self, z: Float[Array, "B t h w z"]) -> Float[Array, "B T H W C"]:
        x = run_middle(self.mid, self.conv_in(z), self.remat)
        x = run_levels(self.levels, x, self.remat)
        return self.conv_out(nnx.silu(self.norm_out(x)))


def run_middle(
    mid: Middle, x: Float[Array, "B T H W C"], remat: str
) -> Float[Array, "B T H W C"]:
    """The output of a middle, its residual blocks rematerialised by the policy `remat`."""
    x = mid.attention(as_program(mid.before, remat)(x))
    return as_program(mid.after, remat)(x)


def run_levels(
    levels: Sequence[Level], x: Float[Array, "B _ _ _ i"], remat: str
) -> Float[Array, "B _ _ _ o"]:
    """The output of the last level, residual blocks rematerialised by the policy `remat`."""
    for level in levels:
        for block in level.blocks:
            x = as_program(block, remat)(x)
        if hasattr(level, "resample"):
            x = level.resampled(x)
    return x


class WanVAEModule(nnx.Module):
    def __init__(self, cfg: WanVAE, rngs: nnx.Rngs):
        if len(cfg.temporal) != len(cfg.multiples) - 1:
            raise Refused(
                f"model: temporal={cfg.temporal}, "
                f"expected one for each of the {len(cfg.multiples) - 1} changes of resolution"
            )
        if not len(cfg.mean) == len(cfg.std) == cfg.latents:
            raise Refused(
                f"model: {len(cfg.mean)} means and {len(cfg.std)} stds, "
                f"expected {cfg.latents} each, one a latent channel"
            )
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.encoder = Encoder(cfg, rngs)
        self.decoder = Decoder(cfg, rngs)
        z = cfg.latents
        point = functools.partial(causal, size=(1, 1, 1), names=(None, None))
        self.quant = point(2 * z, 2 * z, rngs, self.dtype)
        self.post_quant = point(z, z, rngs, self.dtype)

    def __call__(self, x: Float[Array, "B *T H W C"]) -> Float[Array, "B *T H W C"]:
        """The reconstruction of videos or pictures from the mean of their latents."""
        return self.decode(self.encode(x)[0]).astype(x.dtype)

    def encode(
        self, x: Float[Array, "B *T H W C"]
    ) -> tuple[Float[Array, "B *t h w z"], Float[Array, "B *t h w z"]]:
        """Mean and standard deviation of the latents of videos or pictures in -1 to 1, in float32.

        T = 1 + 2^n (t - 1), where n is the number of temporal changes; pictures have no axis T.

        Raises:
            Refused: on another number of frames, and where the resolution does not divide.
        """
        if x.ndim == 4:
            mean, std = self.encode(x[:, None])
            return mean[:, 0], std[:, 0]
        frames = 2 ** sum(self.cfg.temporal)
        pixels = 2 ** len(self.cfg.temporal)
        if (x.shape[1] - 1) % frames:
            raise Refused(
                f"x {list(x.shape)}: expected 1 + a multiple of {frames} frames"
            )
        if any(n % pixels for n in x.shape[2:4]):
            raise Refused(
                f"x {list(x.shape)}: height and width must be multiples of {pixels}"
            )
        h = self.quant(self.encoder(x.astype(self.dtype)))
        mean, log_var = jnp.split(h.astype(jnp.float32), 2, -1)
        return mean, jnp.exp(0.5 * jnp.clip(log_var, -30.0, 20.0))

    def decode(self, z: Float[Array, "B *t h w z"]) -> Float[Array, "B *T H W C"]:
        """Videos or pictures of latents, clipped to -1 to 1, in float32."""
        if z.ndim == 4:
            return self.decode(z[:, None])[:, 0]
        x = self.decoder(self.post_quant(z.astype(self.dtype)))
        return jnp.clip(x.astype(jnp.float32), -1.0, 1.0)

    def normalise(self, z: Float[Array, "*B z"]) -> Float[Array, "*B z"]:
        """Latents as denoisers are trained on them: mean 0 and deviation 1 in each channel."""
        mean = jnp.asarray(self.cfg.mean, z.dtype)
        std = jnp.asarray(self.cfg.std, z.dtype)
        return (z - mean) / std

    def denormalise(self, x0: Float[Array, "*B z"]) -> Float[Array, "*B z"]:
        """The inverse of `normalise`, for `decode`."""
        mean = jnp.asarray(self.cfg.mean, x0.dtype)
        std = jnp.asarray(self.cfg.std, x0.dtype)
        return x0 * std + mean
