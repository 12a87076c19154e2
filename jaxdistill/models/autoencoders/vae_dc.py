"""The deep-compression autoencoder (DC-AE, arXiv:2410.10733) of SANA (arXiv:2410.10629), with the
weights of diffusers' `AutoencoderDC`.

Residual convolution blocks at the high resolutions, EfficientViT blocks (linear attention at
several scales, then a gated convolution, arXiv:2205.14756) at the low ones. Every change of
resolution learns the difference to a shortcut without weights that moves pixels to channels and
averages, or duplicates channels and moves them to pixels. The code is deterministic.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused, lookup
from jaxdistill.models.attention import TINY, linear_attention
from jaxdistill.models.layers import ACTIVATIONS, ZEROS, GatedConv, as_program, conv, dense

EPS = 1e-5  # of every norm
EXPAND = 4  # hidden channels of a gated convolution, in widths
ACTS = {name: ACTIVATIONS[name] for name in ("gelu", "relu", "silu")}  # diffusers' names
SHRINKS = ("conv", "pixel_unshuffle")
GROWS = ("interpolate", "pixel_shuffle")


class LevelSizes(NamedTuple):
    """A level of one half."""

    width: int
    layers: int
    attention: bool
    scales: tuple[int, ...]
    act: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCAE:
    """Sizes. Defaults are a toy's. SANA's f32c32: latents 32, head_dim 32, widths 128 256 512 512
    1024 1024 and attention in the last three levels with scales (5,) in both halves, encoder_layers
    2 2 2 3 3 3, decoder_layers 3 in each level, decoder_acts silu; the rest as here. Tuples give
    the levels from the pixels on; resolution halves from each to the next.
    """

    channels: int = 3
    latents: int = 4  # channels of z, at 1 / 2^(levels - 1) of the resolution
    head_dim: int = 8  # channels of an attention head
    encoder_widths: tuple[int, ...] = (8, 16)  # channels
    encoder_layers: tuple[int, ...] = (
        1,
        1,
    )  # blocks; 0, of the first level only: pixels go to the second level at once
    encoder_attention: tuple[bool, ...] = (
        False,
        True,
    )  # EfficientViT blocks, else residual convolution blocks
    encoder_scales: tuple[tuple[int, ...], ...] = (
        (),
        (5,),
    )  # attention adds queries, keys and values of neighbourhoods this wide
    decoder_widths: tuple[int, ...] = (8, 16)
    decoder_layers: tuple[int, ...] = (1, 1)
    decoder_attention: tuple[bool, ...] = (False, True)
    decoder_scales: tuple[tuple[int, ...], ...] = ((), (5,))
    decoder_acts: tuple[str, ...] = (
        "silu",
        "silu",
    )  # gelu | relu | silu, of convolution blocks; the encoder's have silu
    shrink: str = "conv"  # of stride 2 | pixel_unshuffle after the convolution
    grow: str = (
        "interpolate"  # to the nearest pixel before the convolution | pixel_shuffle after it
    )
    shortcut_out: bool = True  # averages of the encoder's last channels are added to z
    shortcut_in: bool = True  # duplicates of z's channels are added to the decoder's first
    act_out: str = "relu"  # before the decoder's last convolution
    scale: float = 0.41407  # denoisers work on z scale
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"  # of each block

    def __post_init__(self):
        for name in ("encoder_scales", "decoder_scales"):  # a resumed run has them from JSON
            object.__setattr__(self, name, tuple(map(tuple, getattr(self, name))))

    @property
    def down(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(self.encoder_widths) - 1)

    def __call__(self, rngs: nnx.Rngs) -> DCAEModule:
        return DCAEModule(self, rngs)

    def levels(self, half: str) -> list[LevelSizes]:
        """The levels of "encoder" or "decoder", from the pixels on. Raises Refused where their
        numbers differ.
        """
        count = len(self.encoder_widths)
        given = {
            name: getattr(self, f"{half}_{name}")
            for name in ("widths", "layers", "attention", "scales")
        }
        given["acts"] = self.decoder_acts if half == "decoder" else ("silu",) * count
        for name, levels in given.items():
            if len(levels) != count:
                raise Refused(
                    f"model: {half}_{name}={levels}, expected one for each of the {count} levels of encoder_widths"
                )
        return [LevelSizes(*level) for level in zip(*given.values())]


class Norm(nnx.Module):
    """Root-mean-square norm over the channels (last axis) with gain and bias, in float32."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        make = lambda init: nnx.Param(nnx.with_partitioning(init, (None,))(rngs.params(), (dim,)))
        self.scale = make(nnx.initializers.ones_init())
        self.bias = make(ZEROS)

    def __call__(self, x: Array) -> Array:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + EPS)
        return (h * self.scale[...] + self.bias[...]).astype(x.dtype)


class ResBlock(nnx.Module):
    """3x3 convolution, activation, 3x3 convolution, norm, as a residual branch of [B H W C]."""

    def __init__(self, dim: int, act: str, rngs: nnx.Rngs, dtype):
        self.act = lookup(ACTS, act, "model: act")
        self.conv1 = conv(dim, dim, (3, 3), rngs=rngs, dtype=dtype)
        self.conv2 = conv(dim, dim, (3, 3), ("mlp", "embed"), rngs=rngs, bias=False, dtype=dtype)
        self.norm = Norm(dim, rngs)

    def __call__(self, x: Array) -> Array:
        return constrain(
            x + self.norm(self.conv2(self.act(self.conv1(x)))), "batch", None, None, None
        )


def quadratic_attention(q: Array, k: Array, v: Array) -> Array:
    """`linear_attention` through all scores, in O(N^2 K), in v's dtype but for the float32
    division.
    """
    scores = jnp.einsum("btgk,bsgk->bgts", q, k, preferred_element_type=jnp.float32)
    scores = scores / (scores.sum(-1, keepdims=True) + TINY)
    return jnp.einsum("bgts,bsgd->btgd", scores.astype(v.dtype), v)


class Scale(nnx.Module):
    """Queries, keys and values [B H W 3D] of neighbourhoods: a depthwise convolution, then a matrix
    for each K channels.
    """

    def __init__(self, dim: int, head_dim: int, size: int, rngs: nnx.Rngs, dtype):
        if size % 2 == 0:
            raise Refused(f"model: attention scale {size}, expected an odd number of pixels")
        matrices = nnx.initializers.lecun_normal(batch_axis=0)
        self.depth = conv(
            3 * dim,
            3 * dim,
            (size, size),
            (None, "heads"),
            rngs=rngs,
            groups=3 * dim,
            bias=False,
            dtype=dtype,
        )
        self.point = nnx.Param(
            nnx.with_partitioning(matrices, ("heads", None, None))(
                rngs.params(), (3 * dim // head_dim, head_dim, head_dim)
            )
        )

    def __call__(self, qkv: Array) -> Array:
        x = self.depth(qkv)
        groups = x.reshape(*x.shape[:-1], *self.point.shape[:2])
        return jnp.einsum("bhwgi,gio->bhwgo", groups, self.point[...].astype(x.dtype)).reshape(
            x.shape
        )


class Attention(nnx.Module):
    """ReLU attention over all pixels, at the scale of a pixel and those of `sizes`, as a residual
    branch of [B H W C].

    As released, the channels of to_q, to_k and to_v and then of every scale stand in one row that
    is cut into heads of K queries, K keys and K values: what `to_q` makes becomes keys and values
    of some heads too.
    """

    def __init__(self, dim: int, head_dim: int, sizes: tuple[int, ...], rngs: nnx.Rngs, dtype):
        inner = dim // head_dim * head_dim
        if not inner:
            raise Refused(
                f"model: width {dim} of a level with attention, expected at least head_dim={head_dim}"
            )
        make = lambda i, o, names: dense(i, o, names, rngs=rngs, bias=False, dtype=dtype)
        self.head_dim = head_dim
        self.norm_out = Norm(dim, rngs)
        self.to_q, self.to_k, self.to_v = (make(dim, inner, ("embed", "heads")) for _ in range(3))
        self.scales = nnx.List([Scale(inner, head_dim, size, rngs, dtype) for size in sizes])
        self.to_out = make(inner * (1 + len(sizes)), dim, ("heads", "embed"))

    def __call__(self, x: Array) -> Array:
        qkv = jnp.concatenate([self.to_q(x), self.to_k(x), self.to_v(x)], -1)
        qkv = jnp.concatenate([qkv, *(scale(qkv) for scale in self.scales)], -1)
        q, k, v = jnp.split(
            rearrange(qkv, "b h w (g c) -> b (h w) g c", c=3 * self.head_dim), 3, -1
        )
        attend = (
            linear_attention if x.shape[1] * x.shape[2] > self.head_dim else quadratic_attention
        )
        out = attend(nnx.relu(q), nnx.relu(k), v).astype(x.dtype)
        return x + self.norm_out(self.to_out(out.reshape(*x.shape[:-1], -1)))


class GatedBranch(GatedConv):
    """A gated convolution and a norm, as a residual branch of [B H W C]."""

    def __init__(self, dim: int, rngs: nnx.Rngs, dtype):
        super().__init__(dim, EXPAND * dim, rngs=rngs, dtype=dtype)
        self.norm = Norm(dim, rngs)

    def __call__(self, x: Array) -> Array:
        return constrain(x + self.norm(super().__call__(x)), "batch", None, None, None)


class EfficientViTBlock(nnx.Module):
    """Attention over all pixels, then a gated convolution."""

    def __init__(self, dim: int, head_dim: int, sizes: tuple[int, ...], rngs: nnx.Rngs, dtype):
        self.attention = Attention(dim, head_dim, sizes, rngs, dtype)
        self.gated = GatedBranch(dim, rngs, dtype)

    def __call__(self, x: Array) -> Array:
        return self.gated(self.attention(x))


def pixels_to_channels(x: Array) -> Array:
    """[B 2H 2W C] -> [B H W 4C], the channel outermost (PyTorch's pixel_unshuffle)."""
    return rearrange(x, "b (h p) (w q) c -> b h w (c p q)", p=2, q=2)


def channels_to_pixels(x: Array) -> Array:
    """[B H W 4C] -> [B 2H 2W C], the inverse of `pixels_to_channels`."""
    return rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=2, q=2)


def average(x: Array, out: int) -> Array:
    """[... C] -> [... out], means of C / out neighbouring channels."""
    return x.reshape(*x.shape[:-1], out, -1).mean(-1)


def duplicate(x: Array, out: int) -> Array:
    """[... C] -> [... out], every channel out / C times in a row."""
    return jnp.repeat(x, out // x.shape[-1], -1)


def divides(small: int, large: int, what: str) -> None:
    if large % small:
        raise Refused(f"model: {what}: {large} channels are not a multiple of {small}")


class Down(nnx.Module):
    """[B 2H 2W i] -> [B H W o]: a 3x3 convolution, and averages of the pixels if there is a
    shortcut.
    """

    def __init__(self, cfg: DCAE, i: int, o: int, rngs: nnx.Rngs, *, shortcut: bool = True):
        self.out = o
        self.shortcut = shortcut
        self.unshuffle = cfg.shrink == "pixel_unshuffle"
        if shortcut:
            divides(o, 4 * i, "averages on the way down")
        if self.unshuffle:
            divides(4, o, "pixel_unshuffle")
        size, stride = (o // 4, 1) if self.unshuffle else (o, 2)
        self.conv = conv(
            i,
            size,
            (3, 3),
            rngs=rngs,
            strides=stride,
            padding=[(1, 1)] * 2,
            dtype=jnp.dtype(cfg.dtype),
        )

    def __call__(self, x: Array) -> Array:
        h = pixels_to_channels(self.conv(x)) if self.unshuffle else self.conv(x)
        return h + average(pixels_to_channels(x), self.out) if self.shortcut else h


class Up(nnx.Module):
    """[B H W i] -> [B 2H 2W o]: a 3x3 convolution, and duplicates of the channels if there is a
    shortcut.
    """

    def __init__(self, cfg: DCAE, i: int, o: int, rngs: nnx.Rngs, *, shortcut: bool = True):
        self.out = o
        self.shortcut = shortcut
        self.shuffle = cfg.grow == "pixel_shuffle"
        if shortcut:
            divides(i, 4 * o, "duplicates on the way up")
        self.conv = conv(
            i, 4 * o if self.shuffle else o, (3, 3), rngs=rngs, dtype=jnp.dtype(cfg.dtype)
        )

    def __call__(self, x: Array) -> Array:
        h = (
            channels_to_pixels(self.conv(x))
            if self.shuffle
            else self.conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))
        )
        return h + channels_to_pixels(duplicate(x, 4 * self.out)) if self.shortcut else h


class Level(nnx.Module):
    """Blocks of one width, and what leads to the next level of the encoder or from it in the
    decoder.
    """

    def __init__(self, cfg: DCAE, sizes: LevelSizes, resample: Down | Up | None, rngs: nnx.Rngs):
        self.remat = cfg.remat
        dtype = jnp.dtype(cfg.dtype)
        if sizes.attention:
            make = lambda: EfficientViTBlock(sizes.width, cfg.head_dim, sizes.scales, rngs, dtype)
        else:
            make = lambda: ResBlock(sizes.width, sizes.act, rngs, dtype)
        self.blocks = nnx.List([make() for _ in range(sizes.layers)])
        if resample is not None:
            self.resample = resample

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = as_program(block, self.remat)(x)
        return x


def first(levels: list[LevelSizes]) -> LevelSizes:
    """The level of highest resolution that has blocks. Raises Refused where it is not the first or
    the second.
    """
    if not all(level.layers for level in levels[1:]) or not (levels[0].layers or levels[1:]):
        raise Refused(
            f"model: layers={tuple(level.layers for level in levels)}: only the first of several levels may be empty"
        )
    return levels[0] if levels[0].layers else levels[1]


class Encoder(nnx.Module):
    def __init__(self, cfg: DCAE, rngs: nnx.Rngs):
        levels = cfg.levels("encoder")
        dtype = jnp.dtype(cfg.dtype)
        self.cfg = cfg
        start = first(levels)
        last = levels[-1].width
        if levels[0].layers:
            self.conv_in = conv(
                cfg.channels, start.width, (3, 3), (None, "embed"), rngs=rngs, dtype=dtype
            )
        else:
            self.conv_in = Down(cfg, cfg.channels, start.width, rngs, shortcut=False)
        down = lambda one, after: (
            Down(cfg, one.width, after.width, rngs) if after and one.layers else None
        )
        self.levels = nnx.List(
            [
                Level(cfg, one, down(one, after), rngs)
                for one, after in zip(levels, [*levels[1:], None])
            ]
        )
        self.conv_out = conv(last, cfg.latents, (3, 3), ("embed", None), rngs=rngs, dtype=dtype)
        if cfg.shortcut_out:
            divides(cfg.latents, last, "averages for z")

    def __call__(self, x: Array) -> Array:
        x = constrain(self.conv_in(x), "batch", None, None, None)
        for level in self.levels:
            x = level(x)
            x = level.resample(x) if hasattr(level, "resample") else x
        return (
            self.conv_out(x) + average(x, self.cfg.latents)
            if self.cfg.shortcut_out
            else self.conv_out(x)
        )


class Decoder(nnx.Module):
    def __init__(self, cfg: DCAE, rngs: nnx.Rngs):
        levels = cfg.levels("decoder")
        dtype = jnp.dtype(cfg.dtype)
        self.cfg = cfg
        start = first(levels)
        last = levels[-1].width
        self.conv_in = conv(cfg.latents, last, (3, 3), (None, "embed"), rngs=rngs, dtype=dtype)
        if cfg.shortcut_in:
            divides(cfg.latents, last, "duplicates of z")
        up = lambda one, before: (
            Up(cfg, before.width, one.width, rngs) if before and one.layers else None
        )
        self.levels = nnx.List(
            [
                Level(cfg, one, up(one, before), rngs)
                for one, before in zip(levels, [*levels[1:], None])
            ]
        )
        self.norm_out = Norm(start.width, rngs)
        self.act = lookup(ACTS, cfg.act_out, "model: act_out")
        if levels[0].layers:
            self.conv_out = conv(
                start.width, cfg.channels, (3, 3), ("embed", None), rngs=rngs, dtype=dtype
            )
        else:
            self.conv_out = Up(cfg, start.width, cfg.channels, rngs, shortcut=False)

    def __call__(self, z: Array) -> Array:
        x = self.conv_in(z)
        x = x + duplicate(z, x.shape[-1]) if self.cfg.shortcut_in else x
        x = constrain(x, "batch", None, None, None)
        for level in list(self.levels)[::-1]:
            x = level(level.resample(x) if hasattr(level, "resample") else x)
        return self.conv_out(self.act(self.norm_out(x)))


class DCAEModule(nnx.Module):
    def __init__(self, cfg: DCAE, rngs: nnx.Rngs):
        for name, known in (("shrink", SHRINKS), ("grow", GROWS)):
            lookup(dict.fromkeys(known), getattr(cfg, name), f"model: {name}")
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.encoder = Encoder(cfg, rngs)
        self.decoder = Decoder(cfg, rngs)

    def __call__(self, x: Array) -> Array:
        """The reconstruction of x [B H W C]."""
        return self.decode(self.encode(x)[0]).astype(x.dtype)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Images [B H W C] in -1 to 1 -> z and, as other autoencoders have one, its standard
        deviation, which is 0; each [B h w latents], float32. Raises Refused where the resolution
        does not divide.
        """
        pixels = 2 ** (len(self.cfg.encoder_widths) - 1)
        if any(n % pixels for n in x.shape[1:3]):
            raise Refused(f"x {list(x.shape)}: height and width must be multiples of {pixels}")
        z = self.encoder(x.astype(self.dtype)).astype(jnp.float32)
        return z, jnp.zeros_like(z)

    def decode(self, z: Array) -> Array:
        """z [B h w latents] -> images [B H W C], float32."""
        return self.decoder(z.astype(self.dtype)).astype(jnp.float32)

    def normalise(self, z: Array) -> Array:
        """What a denoiser is trained on: z scaled to about unit variance."""
        return z * self.cfg.scale

    def denormalise(self, x0: Array) -> Array:
        """The inverse of `normalise`, for `decode`."""
        return x0 / self.cfg.scale
