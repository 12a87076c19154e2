"""The deep-compression autoencoder (DC-AE, arXiv:2410.10733) of SANA, diffusers' `AutoencoderDC`.

Residual convolution blocks at the high resolutions, EfficientViT blocks (linear attention at
several scales, then a gated convolution, arXiv:2205.14756) at the low ones. Every change of
resolution learns the difference to a shortcut without weights, which moves pixels to channels and
averages them, or duplicates channels and moves them to pixels. The code is deterministic.

Source: arXiv:2410.10733; SANA, arXiv:2410.10629.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from jaxdistill.core.fields import Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused, lookup
from jaxdistill.models.attention import TINY, linear_attention
from jaxdistill.models.layers import (
    ACTIVATIONS,
    ZEROS,
    GatedConv,
    as_program,
    conv,
    dense,
)

EPS = 1e-5  # of every norm
EXPAND = 4  # hidden channels of a gated convolution, in widths
# diffusers' names
ACTS = {name: ACTIVATIONS[name] for name in ("gelu", "relu", "silu")}
SHRINKS = ("conv", "pixel_unshuffle")
GROWS = ("interpolate", "pixel_shuffle")


class LevelSizes(NamedTuple):
    """Sizes of a level of the encoder or the decoder."""

    width: int
    layers: int
    attention: bool
    scales: tuple[int, ...]
    act: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCAE:
    """Sizes. Defaults are a toy's.

    Tuples give the levels from the pixels on; the resolution halves from each to the next. SANA's
    f32c32: latents 32, head_dim 32, widths 128 256 512 512 1024 1024 and attention in the last
    three levels with scales (5,) in both halves, encoder_layers 2 2 2 3 3 3, decoder_layers 3 in
    each level, decoder_acts silu, all else as here.
    """

    channels: int = 3
    latents: int = 4  # channels of z, at 1 / 2^(levels - 1) of the resolution
    head_dim: int = 8  # channels of an attention head
    encoder_widths: tuple[int, ...] = (8, 16)  # channels
    # blocks; 0, in the first level only: the pixels enter the second level directly
    encoder_layers: tuple[int, ...] = (1, 1)
    # True: EfficientViT blocks; False: residual convolution blocks
    encoder_attention: tuple[bool, ...] = (False, True)
    # widths of neighbourhoods whose queries, keys and values attention adds
    encoder_scales: tuple[tuple[int, ...], ...] = ((), (5,))
    decoder_widths: tuple[int, ...] = (8, 16)
    decoder_layers: tuple[int, ...] = (1, 1)
    decoder_attention: tuple[bool, ...] = (False, True)
    decoder_scales: tuple[tuple[int, ...], ...] = ((), (5,))
    # gelu | relu | silu, of convolution blocks; those of the encoder have silu
    decoder_acts: tuple[str, ...] = ("silu", "silu")
    shrink: str = "conv"  # of stride 2 | pixel_unshuffle after the convolution
    # interpolate (to the nearest pixel, before the convolution) | pixel_shuffle (after it)
    grow: str = "interpolate"
    # averages of the encoder's last channels are added to z
    shortcut_out: bool = True
    # duplicates of z's channels are added to the decoder's first
    shortcut_in: bool = True
    act_out: str = "relu"  # before the decoder's last convolution
    scale: float = 0.41407  # denoisers work on z scale
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"  # of each block

    def __post_init__(self):
        for name in (
            "encoder_scales",
            "decoder_scales",
        ):  # a resumed run has them from JSON
            object.__setattr__(self, name, tuple(map(tuple, getattr(self, name))))

    @property
    def down(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(self.encoder_widths) - 1)

    def __call__(self, rngs: nnx.Rngs) -> DCAEModule:
        return DCAEModule(self, rngs)

    def levels(self, half: str) -> list[LevelSizes]:
        """The levels of "encoder" or "decoder", from the pixels on.

        Raises:
            Refused: where the fields have different numbers of levels.
        """
        count = len(self.encoder_widths)
        names = ("widths", "layers", "attention", "scales")
        given = {name: getattr(self, f"{half}_{name}") for name in names}
        given["acts"] = (
            self.decoder_acts if half == "decoder" else ("silu",) * count
        )
        for name, levels in given.items():
            if len(levels) != count:
                raise Refused(
                    f"model: {half}_{name}={levels}, "
                    f"expected one for each of the {count} levels of encoder_widths"
                )
        return [LevelSizes(*level) for level in zip(*given.values())]


class Norm(nnx.Module):
    """Root-mean-square norm over the channels (last axis) with gain and bias, in float32."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        def make(init) -> nnx.Param:
            return nnx.Param(
                nnx.with_partitioning(init, (None,))(rngs.params(), (dim,))
            )

        self.scale = make(nnx.initializers.ones_init())
        self.bias = make(ZEROS)

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + EPS)
        return (h * self.scale[...] + self.bias[...]).astype(x.dtype)


class ResBlock(nnx.Module):
    """3x3 convolution, activation, 3x3 convolution, norm, as a residual branch."""

    def __init__(self, dim: int, act: str, rngs: nnx.Rngs, dtype):
        self.act = lookup(ACTS, act, "model: act")
        self.conv1 = conv(dim, dim, (3, 3), rngs=rngs, dtype=dtype)
        self.conv2 = conv(
            dim, dim, (3, 3), ("mlp", "embed"), rngs=rngs, bias=False, dtype=dtype
        )
        self.norm = Norm(dim, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        h = self.norm(self.conv2(self.act(self.conv1(x))))
        return constrain(x + h, "batch", None, None, None)


def quadratic_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
) -> Float[Array, "B T H K"]:
    """`linear_attention` through all scores, in O(T S K).

    The scores are divided in float32; the rest is in v's dtype.
    """
    scores = jnp.einsum("btgk,bsgk->bgts", q, k, preferred_element_type=jnp.float32)
    scores = scores / (scores.sum(-1, keepdims=True) + TINY)
    return jnp.einsum("bgts,bsgd->btgd", scores.astype(v.dtype), v)


class Scale(nnx.Module):
    """Queries, keys and values of neighbourhoods, from those of pixels.

    A depthwise convolution, then a matrix for each group of `head_dim` channels.
    """

    def __init__(self, dim: int, head_dim: int, size: int, rngs: nnx.Rngs, dtype):
        if size % 2 == 0:
            raise Refused(
                f"model: attention scale {size}, expected an odd number of pixels"
            )
        matrices = nnx.initializers.lecun_normal(batch_axis=0)
        channels = 3 * dim
        self.depth = conv(
            channels,
            channels,
            (size, size),
            (None, "heads"),
            rngs=rngs,
            groups=channels,
            bias=False,
            dtype=dtype,
        )
        shape = (channels // head_dim, head_dim, head_dim)
        named = nnx.with_partitioning(matrices, ("heads", None, None))
        self.point = nnx.Param(named(rngs.params(), shape))

    def __call__(self, qkv: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = self.depth(qkv)
        groups = x.reshape(*x.shape[:-1], *self.point.shape[:2])
        matrices = self.point[...].astype(x.dtype)
        return jnp.einsum("bhwgi,gio->bhwgo", groups, matrices).reshape(x.shape)


class Attention(nnx.Module):
    """ReLU attention over all pixels, at the scale of a pixel and those of `sizes`, as a branch.

    As in the released networks, the channels of to_q, to_k and to_v and then of every scale are
    concatenated and cut into heads of K queries, K keys and K values each: what `to_q` computes
    becomes keys and values of some heads too.
    """

    def __init__(
        self, dim: int, head_dim: int, sizes: tuple[int, ...], rngs: nnx.Rngs, dtype
    ):
        inner = dim // head_dim * head_dim
        if not inner:
            raise Refused(
                f"model: width {dim} of a level with attention, "
                f"expected at least head_dim={head_dim}"
            )
        make = functools.partial(dense, rngs=rngs, bias=False, dtype=dtype)
        self.head_dim = head_dim
        self.norm_out = Norm(dim, rngs)
        self.to_q = make(dim, inner, ("embed", "heads"))
        self.to_k = make(dim, inner, ("embed", "heads"))
        self.to_v = make(dim, inner, ("embed", "heads"))
        self.scales = nnx.List(
            [Scale(inner, head_dim, size, rngs, dtype) for size in sizes]
        )
        self.to_out = make(inner * (1 + len(sizes)), dim, ("heads", "embed"))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        qkv = jnp.concatenate([self.to_q(x), self.to_k(x), self.to_v(x)], -1)
        qkv = jnp.concatenate([qkv, *(scale(qkv) for scale in self.scales)], -1)
        heads = rearrange(qkv, "b h w (g c) -> b (h w) g c", c=3 * self.head_dim)
        q, k, v = jnp.split(heads, 3, -1)
        many = x.shape[1] * x.shape[2] > self.head_dim
        attend = linear_attention if many else quadratic_attention
        out = attend(nnx.relu(q), nnx.relu(k), v).astype(x.dtype)
        return x + self.norm_out(self.to_out(out.reshape(*x.shape[:-1], -1)))


class GatedBranch(GatedConv):
    """A gated convolution and a norm, as a residual branch."""

    def __init__(self, dim: int, rngs: nnx.Rngs, dtype):
        super().__init__(dim, EXPAND * dim, rngs=rngs, dtype=dtype)
        self.norm = Norm(dim, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return constrain(
            x + self.norm(super().__call__(x)), "batch", None, None, None
        )


class EfficientViTBlock(nnx.Module):
    """Attention over all pixels, then a gated convolution."""

    def __init__(
        self, dim: int, head_dim: int, sizes: tuple[int, ...], rngs: nnx.Rngs, dtype
    ):
        self.attention = Attention(dim, head_dim, sizes, rngs, dtype)
        self.gated = GatedBranch(dim, rngs, dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.gated(self.attention(x))


def pixels_to_channels(
    x: Float[Array, "B H W C"],
) -> Float[Array, "B H//2 W//2 4*C"]:
    """Squares of 2x2 pixels as channels, the channel outermost (PyTorch's pixel_unshuffle)."""
    return rearrange(x, "b (h p) (w q) c -> b h w (c p q)", p=2, q=2)


def channels_to_pixels(
    x: Float[Array, "B H W C"],
) -> Float[Array, "B 2*H 2*W C//4"]:
    """The inverse of `pixels_to_channels`."""
    return rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=2, q=2)


def average(x: Float[Array, "*B C"], out: int) -> Float[Array, "*B {out}"]:
    """Means of C / `out` neighbouring channels."""
    return x.reshape(*x.shape[:-1], out, -1).mean(-1)


def duplicate(x: Float[Array, "*B C"], out: int) -> Float[Array, "*B {out}"]:
    """Every channel `out` / C times, one after the other."""
    return jnp.repeat(x, out // x.shape[-1], -1)


def divides(small: int, large: int, what: str) -> None:
    """Raises Refused where `small` channels do not divide `large` ones."""
    if large % small:
        raise Refused(
            f"model: {what}: {large} channels are not a multiple of {small}"
        )


class Down(nnx.Module):
    """Half the resolution: a 3x3 convolution, and averages of the pixels if there is a shortcut."""

    def __init__(
        self, cfg: DCAE, i: int, o: int, rngs: nnx.Rngs, *, shortcut: bool = True
    ):
        self.out = o
        self.shortcut = shortcut
        self.unshuffle = cfg.shrink == "pixel_unshuffle"
        if shortcut:
            divides(o, 4 * i, "averages on the way down")
        if self.unshuffle:
            divides(4, o, "pixel_unshuffle")
        self.conv = conv(
            i,
            o // 4 if self.unshuffle else o,
            (3, 3),
            rngs=rngs,
            strides=1 if self.unshuffle else 2,
            padding=[(1, 1)] * 2,
            dtype=jnp.dtype(cfg.dtype),
        )

    def __call__(self, x: Float[Array, "B H W i"]) -> Float[Array, "B H//2 W//2 o"]:
        h = self.conv(x)
        if self.unshuffle:
            h = pixels_to_channels(h)
        if self.shortcut:
            h = h + average(pixels_to_channels(x), self.out)
        return h


class Up(nnx.Module):
    """Twice the resolution: a 3x3 convolution, and duplicated channels if there is a shortcut."""

    def __init__(
        self, cfg: DCAE, i: int, o: int, rngs: nnx.Rngs, *, shortcut: bool = True
    ):
        self.out = o
        self.shortcut = shortcut
        self.shuffle = cfg.grow == "pixel_shuffle"
        if shortcut:
            divides(i, 4 * o, "duplicates on the way up")
        channels = 4 * o if self.shuffle else o
        self.conv = conv(i, channels, (3, 3), rngs=rngs, dtype=jnp.dtype(cfg.dtype))

    def __call__(self, x: Float[Array, "B H W i"]) -> Float[Array, "B 2*H 2*W o"]:
        if self.shuffle:
            h = channels_to_pixels(self.conv(x))
        else:
            h = self.conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))
        if self.shortcut:
            h = h + channels_to_pixels(duplicate(x, 4 * self.out))
        return h


class Level(nnx.Module):
    """Blocks of one width, and the change of resolution between this level and the next."""

    def __init__(
        self,
        cfg: DCAE,
        sizes: LevelSizes,
        resample: Down | Up | None,
        rngs: nnx.Rngs,
    ):
        self.remat = cfg.remat
        dtype = jnp.dtype(cfg.dtype)
        blocks = []
        for _ in range(sizes.layers):
            if sizes.attention:
                block = EfficientViTBlock(
                    sizes.width, cfg.head_dim, sizes.scales, rngs, dtype
                )
            else:
                block = ResBlock(sizes.width, sizes.act, rngs, dtype)
            blocks.append(block)
        self.blocks = nnx.List(blocks)
        if resample is not None:
            self.resample = resample

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        for block in self.blocks:
            x = as_program(block, self.remat)(x)
        return x


def first(levels: list[LevelSizes]) -> LevelSizes:
    """The level of highest resolution that has blocks.

    Raises:
        Refused: where it is not the first or the second.
    """
    if not all(level.layers for level in levels[1:]) or not (
        levels[0].layers or levels[1:]
    ):
        layers = tuple(level.layers for level in levels)
        raise Refused(
            f"model: layers={layers}: only the first of several levels may be empty"
        )
    return levels[0] if levels[0].layers else levels[1]


class Encoder(nnx.Module):
    def __init__(self, cfg: DCAE, rngs: nnx.Rngs):
        levels = cfg.levels("encoder")
        dtype = jnp.dtype(cfg.dtype)
        self.cfg = cfg
        start = first(levels)
        last = levels[-1].width
        convolution = functools.partial(conv, size=(3, 3), rngs=rngs, dtype=dtype)
        if levels[0].layers:
            self.conv_in = convolution(
                cfg.channels, start.width, names=(None, "embed")
            )
        else:
            self.conv_in = Down(
                cfg, cfg.channels, start.width, rngs, shortcut=False
            )
        made = []
        for one, after in zip(levels, [*levels[1:], None]):
            down = None
            if after and one.layers:
                down = Down(cfg, one.width, after.width, rngs)
            made.append(Level(cfg, one, down, rngs))
        self.levels = nnx.List(made)
        self.conv_out = convolution(last, cfg.latents, names=("embed", None))
        if cfg.shortcut_out:
            divides(cfg.latents, last, "averages for z")

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w z"]:
        x = constrain(self.conv_in(x), "batch", None, None, None)
        for level in self.levels:
            x = level(x)
            if hasattr(level, "resample"):
                x = level.resample(x)
        z = self.conv_out(x)
        return z + average(x, self.cfg.latents) if self.cfg.shortcut_out else z


class Decoder(nnx.Module):
    def __init__(self, cfg: DCAE, rngs: nnx.Rngs):
        levels = cfg.levels("decoder")
        dtype = jnp.dtype(cfg.dtype)
        self.cfg = cfg
        start = first(levels)
        last = levels[-1].width
        convolution = functools.partial(conv, size=(3, 3), rngs=rngs, dtype=dtype)
        self.conv_in = convolution(cfg.latents, last, names=(None, "embed"))
        if cfg.shortcut_in:
            divides(cfg.latents, last, "duplicates of z")
        made = []
        for one, before in zip(levels, [*levels[1:], None]):
            up = None
            if before and one.layers:
                up = Up(cfg, before.width, one.width, rngs)
            made.append(Level(cfg, one, up, rngs))
        self.levels = nnx.List(made)
        self.norm_out = Norm(start.width, rngs)
        self.act = lookup(ACTS, cfg.act_out, "model: act_out")
        if levels[0].layers:
            self.conv_out = convolution(
                start.width, cfg.channels, names=("embed", None)
            )
        else:
            self.conv_out = Up(cfg, start.width, cfg.channels, rngs, shortcut=False)

    def __call__(self, z: Float[Array, "B h w z"]) -> Float[Array, "B H W C"]:
        x = self.conv_in(z)
        if self.cfg.shortcut_in:
            x = x + duplicate(z, x.shape[-1])
        x = constrain(x, "batch", None, None, None)
        for level in list(self.levels)[::-1]:
            if hasattr(level, "resample"):
                x = level.resample(x)
            x = level(x)
        return self.conv_out(self.act(self.norm_out(x)))


class DCAEModule(nnx.Module):
    def __init__(self, cfg: DCAE, rngs: nnx.Rngs):
        for name, known in (("shrink", SHRINKS), ("grow", GROWS)):
            lookup(dict.fromkeys(known), getattr(cfg, name), f"model: {name}")
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.encoder = Encoder(cfg, rngs)
        self.decoder = Decoder(cfg, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The reconstruction."""
        return self.decode(self.encode(x)[0]).astype(x.dtype)

    def encode(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B h w z"], Float[Array, "B h w z"]]:
        """Latents of images in -1 to 1, and zeros: the standard deviation that others have.

        Both are float32.

        Raises:
            Refused: where the resolution does not divide.
        """
        pixels = 2 ** (len(self.cfg.encoder_widths) - 1)
        if any(n % pixels for n in x.shape[1:3]):
            raise Refused(
                f"x {list(x.shape)}: height and width must be multiples of {pixels}"
            )
        z = self.encoder(x.astype(self.dtype)).astype(jnp.float32)
        return z, jnp.zeros_like(z)

    def decode(self, z: Float[Array, "B h w z"]) -> Float[Array, "B H W C"]:
        """Images of latents, in float32."""
        return self.decoder(z.astype(self.dtype)).astype(jnp.float32)

    def normalise(self, z: Float[Array, "*B z"]) -> Float[Array, "*B z"]:
        """Latents as denoisers are trained on them: of about unit variance."""
        return z * self.cfg.scale

    def denormalise(self, x0: Float[Array, "*B z"]) -> Float[Array, "*B z"]:
        """The inverse of `normalise`, for `decode`."""
        return x0 / self.cfg.scale
