"""The pixel-space U-Nets of EDM (arXiv:2206.00364) with the weights of its repository.

`SongUNet` is DDPM++ and NCSN++ (arXiv:2011.13456), `DhariwalUNet` is ADM (arXiv:2105.05233). Levels
of residual blocks, some with attention over the pixels; all activations of the way down are
concatenated on the way up. These are the raw networks F: the preconditioning is
`diffusion.denoiser.EDMPrecond`, which feeds them c_in x and t = ln(sigma) / 4. Neither dropout nor
label dropout is built in; biases of fresh weights are zero.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Float, Key, Num

from jaxdistill.core.fields import Depth, Dropout, Dtype, Remat
from jaxdistill.core.needs import Condition, Spec, check_condition
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.layers import (
    ZEROS,
    as_program,
    attention,
    conv,
    dense,
    drop,
    fourier,
    group_norm,
    merge_heads,
)


def uniform(scale: float, fan: str):
    """The initialiser of variance scale / fan, uniform."""
    return nnx.initializers.variance_scaling(scale, fan, "uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMUNet:
    """The sizes that both have."""

    size: int = 8  # samples are [size, size, channels]; `attention` is in its terms
    channels: int = 3  # of x and of the output
    # labels; label `classes` is the null condition; 0: unconditional
    classes: int = 0
    # channels of cond["augment"], the parameters of the augmentation (9 in EDM); 0: not read
    augment_dim: int = 0
    width: int = 16
    # channels of the levels in `width`, each level at half the resolution of the one before
    multiples: tuple[int, ...] = (1, 2)
    # residual blocks of a level on the way down; one more on the way up
    blocks: Depth = 1
    # resolutions whose blocks attend; the middle always does
    attention: tuple[int, ...] = (4,)
    emb_multiple: int = 4  # the embedding has emb_multiple * width channels
    # rate of dropout in every block (EDM's DDPM++ .13, ADM .10); only losses that pass a key drop
    dropout: Dropout = 0.0
    dtype: Dtype = "float32"  # arithmetic; weights and embedding are float32
    remat: Remat = "none"  # of each block

    eps: ClassVar[float]  # of the group norms
    # True: the embedding scales and shifts the second norm; False: it is added before that norm
    adaptive: ClassVar[bool]
    # factor on the sum of a block's branch and its shortcut
    damping: ClassVar[float]
    # whether blocks that change the resolution have a 1x1 convolution on the shortcut
    project: ClassVar[bool]
    # every block on the way up attends, not just the last of a level
    all_up: ClassVar[bool]
    filter: ClassVar[tuple[int, ...]] = (1, 1)  # of every change of resolution

    def heads(self, width: int) -> int:
        """Attention heads of a block of so many channels."""
        raise NotImplementedError

    def inits(self) -> tuple:
        """Initialisers of (maps, last maps of a branch, queries keys and values)."""
        raise NotImplementedError

    def attends(self, level: int) -> bool:
        """Whether the blocks of a level attend."""
        return self.size >> level in self.attention

    @property
    def null_label(self) -> int | None:
        """The label that stands for none; None where the network takes no label."""
        return self.classes or None

    @property
    def condition(self) -> Condition:
        label = Num[Spec, "B *classes"]  # labels, or weights of the classes
        optional = {"label": label}
        if self.augment_dim:
            optional["augment"] = Num[Spec, f"B {self.augment_dim}"]
        return Condition(optional=optional, array=label, required=False)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the levels."""
        return tuple(m * self.width for m in self.multiples)

    @property
    def emb(self) -> int:
        """Channels of the embedding."""
        return self.emb_multiple * self.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class SongUNet(EDMUNet):
    """Defaults are a toy's.

    EDM's DDPM++ of CIFAR-10: size 32, width 128, multiples 2 2 2, blocks 4, attention 16,
    augment_dim 9, classes 10 (or 0); of FFHQ and AFHQv2: size 64, multiples 1 2 2 2. Its NCSN++
    beside these: time_embedding "fourier", noise_multiple 2, residual True, filter 1 3 3 1.
    """

    # features of the time: positional | fourier (random frequencies, stored and never trained)
    time_embedding: str = "positional"
    # the features of the time have noise_multiple * width channels
    noise_multiple: int = 1
    # on the way down x, shrunk, is added to the activations of each level
    residual: bool = False
    filter: tuple[int, ...] = (1, 1)

    renamed = {"waves": "time_embedding"}
    eps = 1e-6
    adaptive = False
    damping = math.sqrt(0.5)
    project = True
    all_up = False

    def heads(self, width: int) -> int:
        return 1

    def inits(self) -> tuple:
        return (
            uniform(1.0, "fan_avg"),
            uniform(1e-10, "fan_avg"),
            uniform(0.2, "fan_avg"),
        )

    def __call__(self, rngs: nnx.Rngs) -> SongModule:
        return SongModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DhariwalUNet(EDMUNet):
    """Defaults are a toy's.

    EDM's ADM of ImageNet-64: size 64, width 192, multiples 1 2 3 4, blocks 3, attention 32 16 8,
    head_dim 64, classes 1000.
    """

    head_dim: int = 8  # channels of an attention head; 64 in every released network

    eps = 1e-5
    adaptive = True
    damping = 1.0
    project = False
    all_up = True

    def heads(self, width: int) -> int:
        return width // self.head_dim

    def inits(self) -> tuple:
        return uniform(1 / 3, "fan_in"), ZEROS, uniform(1 / 3, "fan_in")

    def __call__(self, rngs: nnx.Rngs) -> DhariwalModule:
        return DhariwalModule(self, rngs)


def resample(
    x: Float[Array, "B H W C"],
    way: str,
    filter: tuple[int, ...],
    pad: int | None = None,
) -> Float[Array, "B _ _ C"]:
    """x at half ("down") or twice ("up") the resolution.

    Args:
        x: activations or pictures.
        way: "down" or "up".
        filter: separable and symmetric; it is normalised.
        pad: zeros around x on the way down; None: those that keep the result centred.
    """
    n = len(filter)
    channels = x.shape[-1]
    up = way == "up"
    pad = (n - 1) // 2 if pad is None else pad
    if (n, pad, filter[0]) == (2, 0, filter[1]):  # a box
        if up:
            return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        return rearrange(x, "b (h i) (w j) c -> b h w (i j) c", i=2, j=2).mean(3)
    weights = np.outer(filter, filter) / sum(filter) ** 2 * (4 if up else 1)
    kernel = jnp.asarray(weights, x.dtype)[:, :, None, None]
    return jax.lax.conv_general_dilated(
        x,
        jnp.broadcast_to(kernel, (n, n, 1, channels)),
        window_strides=(1, 1) if up else (2, 2),
        padding=[(n - 1 - pad,) * 2 if up else (pad,) * 2] * 2,
        lhs_dilation=(2, 2) if up else None,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


def norm(cfg: EDMUNet, dim: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group norm with 32 groups, fewer where a group would have less than four channels."""
    groups = min(32, dim // 4)
    return group_norm(
        dim, groups, rngs=rngs, eps=cfg.eps, dtype=jnp.dtype(cfg.dtype)
    )


class Block(nnx.Module):
    """A residual block: norm, SiLU, 3x3 convolution, twice, with the embedding at the second norm.

    With `heads`, attention over the pixels follows. `way` is a change of resolution, "down" or
    "up".
    """

    def __init__(
        self,
        cfg: EDMUNet,
        i: int,
        o: int,
        rngs: nnx.Rngs,
        *,
        heads: int = 0,
        way: str = "",
    ):
        dtype = jnp.dtype(cfg.dtype)
        init, last, attend = cfg.inits()
        convolution = functools.partial(conv, rngs=rngs, dtype=dtype)
        self.cfg = cfg
        self.heads = heads
        self.way = way
        self.norm0 = norm(cfg, i, rngs)
        self.norm1 = norm(cfg, o, rngs)
        self.conv0 = convolution(i, o, (3, 3), init=init)
        self.conv1 = convolution(o, o, (3, 3), ("mlp", "embed"), init=last)
        affine = 2 * o if cfg.adaptive else o
        self.affine = dense(cfg.emb, affine, ("embed", "mlp"), rngs=rngs, init=init)
        if i != o or (way and cfg.project):
            self.skip = convolution(i, o, (1, 1), init=init)
        if heads:
            linear = functools.partial(dense, rngs=rngs, dtype=dtype)
            self.norm2 = norm(cfg, o, rngs)
            # its output channels are (head, channel, one of q k v)
            self.qkv = linear(o, 3 * o, ("embed", "heads"), init=attend)
            self.proj = linear(o, o, ("heads", "embed"), init=last)

    def __call__(
        self,
        x: Float[Array, "B H W i"],
        emb: Float[Array, "B E"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B _ _ o"]:
        """`emb` is given after its SiLU; `key` is that of dropout."""
        cfg = self.cfg
        h = self.conv0(self._resampled(nnx.silu(self.norm0(x))))
        params = self.affine(emb)[:, None, None].astype(h.dtype)
        if cfg.adaptive:
            scale, shift = jnp.split(params, 2, -1)
            h = nnx.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = nnx.silu(self.norm1(h + params))
        x = self._resampled(x)
        shortcut = self.skip(x) if hasattr(self, "skip") else x
        h = drop(h, cfg.dropout, key)
        x = (self.conv1(h) + shortcut) * cfg.damping
        if self.heads:
            x = (self._attended(self.norm2(x)) + x) * cfg.damping
        return constrain(x, "batch", None, None, None)

    def _resampled(self, x: Array) -> Array:
        return resample(x, self.way, self.cfg.filter) if self.way else x

    def _attended(self, x: Array) -> Array:
        """Attention over the pixels [B H W C]."""
        qkv = rearrange(
            self.qkv(x), "b i j (h k s) -> s b (i j) h k", h=self.heads, s=3
        )
        out = merge_heads(attention(qkv[0], qkv[1], qkv[2]))
        return self.proj(out.reshape(x.shape))


class Level(nnx.Module):
    """A change of resolution (`move`), then blocks.

    On the way down NCSN++ adds the shrunk image (`image`) between.
    """

    def __init__(
        self,
        blocks: list[Block],
        move: Block | None = None,
        image: nnx.Conv | None = None,
    ):
        self.blocks = nnx.List(blocks)
        if move is not None:
            self.move = move
        if image is not None:
            self.image = image


class EDMModule(nnx.Module):
    """The way down and up; subclasses embed the time and the condition."""

    def __init__(self, cfg: EDMUNet, rngs: nnx.Rngs, first: int):
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        init, last, _ = cfg.inits()
        convolution = functools.partial(
            conv, size=(3, 3), rngs=rngs, dtype=self.dtype
        )
        self.conv_in = convolution(
            cfg.channels, first, names=(None, "embed"), init=init
        )
        down, skips = self._way_down(first, rngs)
        bottom = cfg.widths[-1]
        self.mid = nnx.List(
            [
                self._block(bottom, bottom, rngs, attend=True),
                self._block(bottom, bottom, rngs),
            ]
        )
        up = self._way_up(skips, rngs)
        self.down = nnx.List(down)
        self.up = nnx.List(up)
        self.norm_out = norm(cfg, cfg.widths[0], rngs)
        self.conv_out = convolution(
            cfg.widths[0], cfg.channels, names=("embed", None), init=last
        )

    def _block(
        self, i: int, o: int, rngs: nnx.Rngs, *, attend: bool = False, way: str = ""
    ) -> Block:
        heads = self.cfg.heads(o) if attend else 0
        return Block(self.cfg, i, o, rngs, heads=heads, way=way)

    def _way_down(
        self, first: int, rngs: nnx.Rngs
    ) -> tuple[list[Level], list[int]]:
        """(levels, channels of all activations that are concatenated on the way up)."""
        cfg = self.cfg
        residual = getattr(cfg, "residual", False)
        # of the convolution and of the filter behind it
        pad = 1 + (len(cfg.filter) - 1) // 2
        levels = []
        now = first
        image_channels = cfg.channels
        skips = [first]
        for i, width in enumerate(cfg.widths):
            move = self._block(now, now, rngs, way="down") if i else None
            image = None
            if i:
                skips.append(now)
            if i and residual:
                image = conv(
                    image_channels,
                    now,
                    (3, 3),
                    rngs=rngs,
                    padding=[(pad, pad)] * 2,
                    init=cfg.inits()[0],
                    dtype=self.dtype,
                )
                image_channels = now
            blocks = []
            for _ in range(cfg.blocks):
                blocks.append(self._block(now, width, rngs, attend=cfg.attends(i)))
                now = width
                skips.append(now)
            levels.append(Level(blocks, move, image))
        return levels, skips

    def _way_up(self, skips: list[int], rngs: nnx.Rngs) -> list[Level]:
        cfg = self.cfg
        levels = []
        skips = list(skips)
        now = cfg.widths[-1]
        for i, width in reversed(list(enumerate(cfg.widths))):
            move = (
                self._block(now, now, rngs, way="up")
                if i < len(cfg.widths) - 1
                else None
            )
            blocks = []
            for j in range(cfg.blocks + 1):
                attend = cfg.attends(i) and (cfg.all_up or j == cfg.blocks)
                blocks.append(
                    self._block(now + skips.pop(), width, rngs, attend=attend)
                )
                now = width
            levels.append(Level(blocks, move))
        return levels

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        cond: Any = None,
        *,
        taps: tuple[int, ...] = (),
        dropout: Key[Array, ""] | None = None,
    ) -> Float[Array, "B H W C"] | tuple[Float[Array, "B H W C"], tuple]:
        """The raw prediction F in x's dtype; with `taps`, (raw, features [B N D] of those levels).

        Args:
            x: c_in times the noisy samples; H and W are multiples of 2^(levels - 1).
            t: ln(sigma) / 4.
            cond: labels, int [B] (`classes` is the null one), or weights of the classes [B
              classes];
              None: the null label; or a dict with any of "label" and "augment" [B augment_dim]. An
              unconditional network ignores labels.
            taps: 0, 1, ... on the way down, the last of which is the bottleneck, then the middle,
              then the way up.
            dropout: the key of dropout; None: nothing is dropped.

        Raises:
            Refused: where x, cond or taps are not this.
        """
        self._check(x, taps)
        label, augment = self._condition(cond, t.shape[0])
        emb = self.embed(t, label, augment)
        image = x.astype(self.dtype)
        run = self._runner(emb, dropout)
        h, skips, features = self._descend(image, run)
        for block in self.mid:
            h = run(block, h)
        features.append(h)
        h, features_up = self._ascend(h, skips, run)
        features += features_up
        out = self.conv_out(nnx.silu(self.norm_out(h))).astype(x.dtype)
        if not taps:
            return out
        return out, tuple(
            rearrange(features[tap], "b h w c -> b (h w) c") for tap in taps
        )

    def _check(self, x: Array, taps: tuple[int, ...]) -> None:
        levels = len(self.cfg.multiples)
        if any(n % 2 ** (levels - 1) for n in x.shape[1:3]):
            raise Refused(
                f"x: {x.shape[1]} by {x.shape[2]} pixels, expected multiples of {2 ** (levels - 1)}"
            )
        if any(not 0 <= tap <= 2 * levels for tap in taps):
            raise Refused(
                f"taps={tuple(taps)}: levels are numbered 0 to {2 * levels}, {levels} is the middle"
            )

    def _runner(self, emb: Array, dropout: Array | None) -> Callable:
        """run(block, h) -> the block's output; each block has a key of dropout of its own."""
        numbers = itertools.count()
        drops = dropout is not None and self.cfg.dropout > 0

        def run(block: Block, h: Array) -> Array:
            program = as_program(block, self.cfg.remat)
            if not drops:
                return program(h, emb)
            return program(h, emb, jax.random.fold_in(dropout, next(numbers)))

        return run

    def _descend(self, image: Array, run: Callable) -> tuple[Array, list, list]:
        """(output, all activations for the way up, outputs of the levels)."""
        cfg = self.cfg
        h = self.conv_in(image)
        skips = [h]
        features = []
        for level in self.down:
            if hasattr(level, "move"):
                h = run(level.move, h)
                if hasattr(level, "image"):
                    shrunk = resample(level.image(image), "down", cfg.filter, pad=0)
                    h = (h + shrunk) * math.sqrt(0.5)
                    image = h
                skips.append(h)
            for block in level.blocks:
                h = run(block, h)
                skips.append(h)
            features.append(h)
        return h, skips, features

    def _ascend(self, h: Array, skips: list, run: Callable) -> tuple[Array, list]:
        """(output, outputs of the levels)."""
        skips = list(skips)
        features = []
        for level in self.up:
            if hasattr(level, "move"):
                h = run(level.move, h)
            for block in level.blocks:
                h = run(block, jnp.concatenate([h, skips.pop()], -1))
            features.append(h)
        return h, features

    def _condition(
        self, cond: Any, batch: int
    ) -> tuple[Array | None, Array | None]:
        """(weights of the classes [B classes], augmentation [B augment_dim]).

        Each is None where it is not read or not given.
        """
        check_condition(cond, self.cfg.condition, type(self.cfg).__name__)
        if cond is None:
            given = {}
        elif isinstance(cond, dict):
            given = cond
        else:
            given = {"label": cond}
        reads = ["label", "augment"] if self.cfg.augment_dim else ["label"]
        stray = sorted(given.keys() - set(reads))
        if stray:
            raise Refused(
                f"cond: {stray[0]!r} is not read by this network, expected {' and '.join(reads)}"
            )
        return self._class_weights(given.get("label"), batch), given.get("augment")

    def _class_weights(self, label: Array | None, batch: int) -> Array | None:
        classes = self.cfg.classes
        if not classes:
            return None
        if label is None:
            return jnp.zeros((batch, classes))
        if jnp.issubdtype(label.dtype, jnp.integer):
            return jax.nn.one_hot(label, classes)  # zeros for the null label
        return label.astype(jnp.float32)

    def embed(
        self,
        t: Num[Array, " B"],
        label: Float[Array, "B K"] | None,
        augment: Num[Array, "B A"] | None,
    ) -> Float[Array, "B E"]:
        """What the blocks read, after its SiLU, in float32.

        Args:
            t: times.
            label: weights of the classes.
            augment: parameters of the augmentation.
        """
        raise NotImplementedError


class SongModule(EDMModule):
    def __init__(self, cfg: SongUNet, rngs: nnx.Rngs):
        if cfg.time_embedding not in ("positional", "fourier"):
            raise Refused(
                f"model: time_embedding={cfg.time_embedding!r}, expected 'positional' or 'fourier'"
            )
        super().__init__(cfg, rngs, first=cfg.width)
        noise = cfg.noise_multiple * cfg.width
        make = functools.partial(dense, rngs=rngs, init=cfg.inits()[0])
        if cfg.time_embedding == "fourier":
            named = nnx.with_partitioning(nnx.initializers.normal(16.0), (None,))
            self.frequencies = nnx.Param(named(rngs.params(), (noise // 2,)))
        if cfg.classes:
            self.label = make(cfg.classes, noise, ("index", "embed"))
        if cfg.augment_dim:
            self.augment = make(cfg.augment_dim, noise, (None, "embed"), bias=False)
        self.layer0 = make(noise, cfg.emb, (None, "embed"))
        self.layer1 = make(cfg.emb, cfg.emb, ("embed", "mlp"))

    def embed(
        self,
        t: Num[Array, " B"],
        label: Float[Array, "B K"] | None,
        augment: Num[Array, "B A"] | None,
    ) -> Float[Array, "B E"]:
        h = self._time_features(t)
        if label is not None:
            h = h + self.label(label * math.sqrt(self.cfg.classes))
        if augment is not None:
            h = h + self.augment(augment.astype(jnp.float32))
        return nnx.silu(self.layer1(nnx.silu(self.layer0(h))))

    def _time_features(self, t: Array) -> Array:
        """Sines, then cosines."""
        if self.cfg.time_embedding == "fourier":
            frequencies = jax.lax.stop_gradient(
                self.frequencies[...].astype(jnp.float32)
            )
            angles = t.astype(jnp.float32)[:, None] * (2 * math.pi) * frequencies
            return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        channels = self.cfg.noise_multiple * self.cfg.width
        return jnp.roll(fourier(t, channels), channels // 2, -1)


class DhariwalModule(EDMModule):
    def __init__(self, cfg: DhariwalUNet, rngs: nnx.Rngs):
        if any(w % cfg.head_dim for w in cfg.widths):
            raise Refused(
                f"model: widths {cfg.widths} of the levels, "
                f"expected multiples of head_dim={cfg.head_dim}"
            )
        super().__init__(cfg, rngs, first=cfg.widths[0])
        init, last, _ = cfg.inits()
        make = functools.partial(dense, rngs=rngs)
        self.layer0 = make(cfg.width, cfg.emb, (None, "embed"), init=init)
        self.layer1 = make(cfg.emb, cfg.emb, ("embed", "mlp"), init=init)
        if cfg.classes:
            unit = nnx.initializers.normal(1.0)
            self.label = make(
                cfg.classes, cfg.emb, ("index", "embed"), init=unit, bias=False
            )
        if cfg.augment_dim:
            names = (None, "embed")
            self.augment = make(
                cfg.augment_dim, cfg.width, names, init=last, bias=False
            )

    def embed(
        self,
        t: Num[Array, " B"],
        label: Float[Array, "B K"] | None,
        augment: Num[Array, "B A"] | None,
    ) -> Float[Array, "B E"]:
        h = fourier(t, self.cfg.width, shift=0.0)
        if augment is not None:
            h = h + self.augment(augment.astype(jnp.float32))
        h = self.layer1(nnx.silu(self.layer0(h)))
        return nnx.silu(h if label is None else h + self.label(label))
