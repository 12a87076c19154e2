"""The pixel-space U-Nets of EDM (arXiv:2206.00364) with the weights of its repository: `SongUNet`
(DDPM++ and NCSN++, arXiv:2011.13456) and `DhariwalUNet` (ADM, arXiv:2105.05233).

Levels of residual blocks, some with attention over the pixels; every state of the way down is
concatenated on the way up. These are the raw networks F: the preconditioning is
`diffusion.denoiser.EDMPrecond`, which feeds them c_in x and t = ln(sigma) / 4. Neither dropout nor
label dropout is built in; biases of fresh weights are zero.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.layers import ZEROS, as_program, attention, conv, dense, fourier, group_norm

uniform = lambda scale, fan: nnx.initializers.variance_scaling(scale, fan, "uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMUNet:
    """What both have. `attention` lists the resolutions whose blocks attend; the middle always
    does.
    """

    size: int = 8  # samples are [size, size, channels]; `attention` is in its terms
    channels: int = 3  # of x and of the output
    classes: int = 0  # labels; label `classes` is the null condition; 0: unconditional
    augment_dim: int = (
        0  # channels of cond["augment"], the augmentation's parameters (9 in EDM); 0: not read
    )
    width: int = 16
    multiples: tuple[int, ...] = (
        1,
        2,
    )  # of width: channels of the levels, each at half the resolution of the one before
    blocks: Depth = 1  # residual blocks of a level on the way down; one more on the way up
    attention: tuple[int, ...] = (4,)
    emb_multiple: int = 4  # the embedding has emb_multiple * width channels
    dtype: Dtype = "float32"  # arithmetic; weights and embedding are float32
    remat: Remat = "none"  # of each block

    eps: ClassVar[float]  # of the group norms
    adaptive: ClassVar[
        bool
    ]  # the embedding scales and shifts the second norm, instead of being added before it
    damping: ClassVar[float]  # factor on the sum of a block's branch and its shortcut
    project: ClassVar[
        bool
    ]  # blocks that change the resolution have a 1x1 convolution on the shortcut
    all_up: ClassVar[bool]  # every block on the way up attends, not just the last of a level
    filter: ClassVar[tuple[int, ...]] = (1, 1)  # of every change of resolution

    def heads(self, width: int) -> int:
        """Attention heads of a block of so many channels."""
        raise NotImplementedError

    def inits(self) -> tuple:
        """Initialisers of (maps, last maps of a branch, queries keys and values)."""
        raise NotImplementedError

    def attends(self, level: int) -> bool:
        return self.size >> level in self.attention

    @property
    def null_label(self) -> int | None:
        """The label that stands for none; None where the network takes no label."""
        return self.classes or None

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(m * self.width for m in self.multiples)

    @property
    def emb(self) -> int:
        return self.emb_multiple * self.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class SongUNet(EDMUNet):
    """Defaults are a toy's. EDM's DDPM++ of CIFAR-10: size 32, width 128, multiples 2 2 2, blocks
    4, attention 16, augment_dim 9, classes 10 (or 0); of FFHQ and AFHQv2: size 64, multiples 1 2 2
    2. Its NCSN++ beside these: time_embedding "fourier", noise_multiple 2, residual True, filter 1
    3 3 1.
    """

    # features of the time: positional | fourier (random frequencies, stored and never trained)
    time_embedding: str = "positional"
    noise_multiple: int = 1  # the features of the time have noise_multiple * width channels
    residual: bool = False  # x, shrunk, is added to the state at each level on the way down
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
        return uniform(1.0, "fan_avg"), uniform(1e-10, "fan_avg"), uniform(0.2, "fan_avg")

    def __call__(self, rngs: nnx.Rngs) -> SongModule:
        return SongModule(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DhariwalUNet(EDMUNet):
    """Defaults are a toy's. EDM's ADM of ImageNet-64: size 64, width 192, multiples 1 2 3 4, blocks
    3, attention 32 16 8, head_dim 64, classes 1000.
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


def resample(x: Array, way: str, filter: tuple[int, ...], pad: int | None = None) -> Array:
    """x [B H W C] at half ("down") or twice ("up") the resolution through the separable, symmetric
    `filter`, normalised.

    `pad`: zeros around x on the way down, by default those that keep the result centred.
    """
    n = len(filter)
    channels = x.shape[-1]
    pad = (n - 1) // 2 if pad is None else pad
    if (n, pad, filter[0]) == (2, 0, filter[1]):
        if way == "up":
            return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        return rearrange(x, "b (h i) (w j) c -> b h w (i j) c", i=2, j=2).mean(3)
    weights = np.outer(filter, filter) / sum(filter) ** 2 * (4 if way == "up" else 1)
    kernel = jnp.broadcast_to(jnp.asarray(weights, x.dtype)[:, :, None, None], (n, n, 1, channels))
    how = (
        dict(window_strides=(1, 1), lhs_dilation=(2, 2))
        if way == "up"
        else dict(window_strides=(2, 2))
    )
    pads = [(n - 1 - pad,) * 2 if way == "up" else (pad,) * 2] * 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        padding=pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
        **how,
    )


def norm(cfg: EDMUNet, dim: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group norm with 32 groups, fewer where a group would have less than four channels."""
    return group_norm(dim, min(32, dim // 4), rngs=rngs, eps=cfg.eps, dtype=jnp.dtype(cfg.dtype))


class Block(nnx.Module):
    """Norm, SiLU, 3x3 convolution, twice, with the embedding at the second norm; then, with
    `heads`, attention over the pixels.
    """

    def __init__(
        self, cfg: EDMUNet, i: int, o: int, rngs: nnx.Rngs, *, heads: int = 0, way: str = ""
    ):
        dtype = jnp.dtype(cfg.dtype)
        init, last, attend = cfg.inits()
        self.cfg = cfg
        self.heads = heads
        self.way = way
        self.norm0 = norm(cfg, i, rngs)
        self.norm1 = norm(cfg, o, rngs)
        self.conv0 = conv(i, o, (3, 3), rngs=rngs, init=init, dtype=dtype)
        self.conv1 = conv(o, o, (3, 3), ("mlp", "embed"), rngs=rngs, init=last, dtype=dtype)
        self.affine = dense(cfg.emb, o * (1 + cfg.adaptive), ("embed", "mlp"), rngs=rngs, init=init)
        if i != o or (way and cfg.project):
            self.skip = conv(i, o, (1, 1), rngs=rngs, init=init, dtype=dtype)
        if heads:
            self.norm2 = norm(cfg, o, rngs)
            self.qkv = dense(
                o, 3 * o, ("embed", "heads"), rngs=rngs, init=attend, dtype=dtype
            )  # of (head, channel, q k or v)
            self.proj = dense(o, o, ("heads", "embed"), rngs=rngs, init=last, dtype=dtype)

    def __call__(self, x: Array, emb: Array) -> Array:
        """x [B H W i], emb [B E] after its SiLU -> [B H' W' o]."""
        cfg = self.cfg
        move = lambda h: resample(h, self.way, cfg.filter) if self.way else h
        h = self.conv0(move(nnx.silu(self.norm0(x))))
        params = self.affine(emb)[:, None, None].astype(h.dtype)
        if cfg.adaptive:
            scale, shift = jnp.split(params, 2, -1)
            h = nnx.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = nnx.silu(self.norm1(h + params))
        x = move(x)
        x = (self.conv1(h) + (self.skip(x) if hasattr(self, "skip") else x)) * cfg.damping
        if self.heads:
            h = rearrange(
                self.qkv(self.norm2(x)), "b i j (h k s) -> s b (i j) h k", h=self.heads, s=3
            )
            h = rearrange(attention(*h), "b n h k -> b n (h k)").reshape(x.shape)
            x = (self.proj(h) + x) * cfg.damping
        return constrain(x, "batch", None, None, None)


class Level(nnx.Module):
    """A change of resolution (`move`), then blocks; on the way down NCSN++ adds the shrunk image
    (`image`) between.
    """

    def __init__(
        self, blocks: list[Block], move: Block | None = None, image: nnx.Conv | None = None
    ):
        self.blocks = nnx.List(blocks)
        if move is not None:
            self.move = move
        if image is not None:
            self.image = image


class EDMModule(nnx.Module):
    """The walk down and up; subclasses embed the time and the condition."""

    def __init__(self, cfg: EDMUNet, rngs: nnx.Rngs, first: int):
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        init, last, _ = cfg.inits()
        w = cfg.widths
        top = len(cfg.multiples) - 1
        make = lambda i, o, attend=False, way="": Block(
            cfg, i, o, rngs, heads=cfg.heads(o) if attend else 0, way=way
        )
        self.conv_in = conv(
            cfg.channels, first, (3, 3), (None, "embed"), rngs=rngs, init=init, dtype=self.dtype
        )
        residual = getattr(cfg, "residual", False)
        pad = 1 + (len(cfg.filter) - 1) // 2
        # channels of the state, of the image, of the states that wait for the way up
        now = first
        seen = cfg.channels
        held = [first]
        down = []
        up = []
        for i, width in enumerate(w):
            move = make(now, now, way="down") if i else None
            image = None
            if i and residual:  # padded for the convolution and for the filter that follows it
                image = conv(
                    seen,
                    now,
                    (3, 3),
                    rngs=rngs,
                    padding=[(pad, pad)] * 2,
                    init=init,
                    dtype=self.dtype,
                )
                seen = now
            blocks = [
                make(now if j == 0 else width, width, cfg.attends(i)) for j in range(cfg.blocks)
            ]
            held += [now] * bool(i) + [width] * cfg.blocks
            down.append(Level(blocks, move, image))
            now = width
        self.mid = nnx.List([make(now, now, True), make(now, now)])
        for i, width in reversed(list(enumerate(w))):
            move = make(now, now, way="up") if i < top else None
            blocks = []
            for j in range(cfg.blocks + 1):
                blocks.append(
                    make(
                        now + held.pop(), width, cfg.attends(i) and (cfg.all_up or j == cfg.blocks)
                    )
                )
                now = width
            up.append(Level(blocks, move))
        self.down = nnx.List(down)
        self.up = nnx.List(up)
        self.norm_out = norm(cfg, now, rngs)
        self.conv_out = conv(
            now, cfg.channels, (3, 3), ("embed", None), rngs=rngs, init=last, dtype=self.dtype
        )

    def __call__(self, x: Array, t: Array, cond=None, *, taps: tuple[int, ...] = ()):
        """x [B H W C] (c_in x), t [B] (ln(sigma) / 4) -> raw F [B H W C] in x's dtype; H and W
        multiples of 2^(levels - 1).

        cond: labels, int [B] (`classes` is the null one) or weights of the classes [B classes];
        None: the null one; or a dict with any of "label" and "augment" [B augment_dim]. An
        unconditional network ignores labels. With `taps`, (raw, states [B N D] after those levels):
        0, 1, ... on the way down, the last of which is the bottleneck, then the middle, then the
        way up. Raises Refused where x, cond or taps do not fit.
        """
        cfg = self.cfg
        levels = len(self.cfg.multiples)
        if any(n % 2 ** (levels - 1) for n in x.shape[1:3]):
            raise Refused(
                f"x: {x.shape[1]} by {x.shape[2]} pixels, expected multiples of {2 ** (levels - 1)}"
            )
        if any(not 0 <= tap <= 2 * levels for tap in taps):
            raise Refused(
                f"taps={tuple(taps)}: levels are numbered 0 to {2 * levels}, {levels} is the middle"
            )
        emb = self.embed(t, *self._condition(cond, t.shape[0]))
        run = lambda block, h: as_program(block, cfg.remat)(h, emb)
        image = x.astype(self.dtype)
        states = []
        held = [h := self.conv_in(image)]
        for level in self.down:
            if hasattr(level, "move"):
                h = run(level.move, h)
                if hasattr(level, "image"):
                    h = image = (
                        h + resample(level.image(image), "down", cfg.filter, pad=0)
                    ) * math.sqrt(0.5)
                held.append(h)
            for block in level.blocks:
                held.append(h := run(block, h))
            states.append(h)
        for block in self.mid:
            h = run(block, h)
        states.append(h)
        for level in self.up:
            h = run(level.move, h) if hasattr(level, "move") else h
            for block in level.blocks:
                h = run(block, jnp.concatenate([h, held.pop()], -1))
            states.append(h)
        out = self.conv_out(nnx.silu(self.norm_out(h))).astype(x.dtype)
        return (
            (out, tuple(rearrange(states[tap], "b h w c -> b (h w) c") for tap in taps))
            if taps
            else out
        )

    def _condition(self, cond, batch: int) -> tuple[Array | None, Array | None]:
        """(weights of the classes [B classes], augmentation [B augment_dim]), None where not read
        or not given.
        """
        given = cond if isinstance(cond, dict) else {} if cond is None else {"label": cond}
        reads = ["label", "augment"] if self.cfg.augment_dim else ["label"]
        stray = sorted(given.keys() - set(reads))
        if stray:
            raise Refused(
                f"cond: {stray[0]!r} is not read by this network, expected {' and '.join(reads)}"
            )
        if not self.cfg.classes:
            label = None
        elif "label" not in given:
            label = jnp.zeros((batch, self.cfg.classes))
        elif jnp.issubdtype(given["label"].dtype, jnp.integer):
            label = jax.nn.one_hot(given["label"], self.cfg.classes)  # zeros for the null label
        else:
            label = given["label"].astype(jnp.float32)
        return label, given.get("augment")

    def embed(self, t: Array, label: Array | None, augment: Array | None) -> Array:
        """What the blocks read [B E], after its SiLU, float32."""
        raise NotImplementedError


class SongModule(EDMModule):
    def __init__(self, cfg: SongUNet, rngs: nnx.Rngs):
        if cfg.time_embedding not in ("positional", "fourier"):
            raise Refused(
                f"model: time_embedding={cfg.time_embedding!r}, expected 'positional' or 'fourier'"
            )
        super().__init__(cfg, rngs, first=cfg.width)
        noise = cfg.noise_multiple * cfg.width
        init = cfg.inits()[0]
        make = lambda i, o, names, bias=True: dense(i, o, names, rngs=rngs, init=init, bias=bias)
        if cfg.time_embedding == "fourier":
            self.frequencies = nnx.Param(
                nnx.with_partitioning(nnx.initializers.normal(16.0), (None,))(
                    rngs.params(), (noise // 2,)
                )
            )
        if cfg.classes:
            self.label = make(cfg.classes, noise, ("index", "embed"))
        if cfg.augment_dim:
            self.augment = make(cfg.augment_dim, noise, (None, "embed"), bias=False)
        self.layer0 = make(noise, cfg.emb, (None, "embed"))
        self.layer1 = make(cfg.emb, cfg.emb, ("embed", "mlp"))

    def embed(self, t, label, augment):
        cfg = self.cfg
        noise = self.cfg.noise_multiple * self.cfg.width
        if cfg.time_embedding == "fourier":
            args = (
                t.astype(jnp.float32)[:, None]
                * (2 * math.pi)
                * jax.lax.stop_gradient(self.frequencies[...].astype(jnp.float32))
            )
            h = jnp.concatenate([jnp.sin(args), jnp.cos(args)], -1)
        else:
            h = jnp.roll(fourier(t, noise), noise // 2, -1)  # sines first
        if label is not None:
            h = h + self.label(label * math.sqrt(cfg.classes))
        if augment is not None:
            h = h + self.augment(augment.astype(jnp.float32))
        return nnx.silu(self.layer1(nnx.silu(self.layer0(h))))


class DhariwalModule(EDMModule):
    def __init__(self, cfg: DhariwalUNet, rngs: nnx.Rngs):
        if any(w % cfg.head_dim for w in cfg.widths):
            raise Refused(
                f"model: widths {cfg.widths} of the levels, expected multiples of head_dim={cfg.head_dim}"
            )
        super().__init__(cfg, rngs, first=cfg.widths[0])
        init, last, _ = cfg.inits()
        self.layer0 = dense(cfg.width, cfg.emb, (None, "embed"), rngs=rngs, init=init)
        self.layer1 = dense(cfg.emb, cfg.emb, ("embed", "mlp"), rngs=rngs, init=init)
        if cfg.classes:
            self.label = dense(
                cfg.classes,
                cfg.emb,
                ("index", "embed"),
                rngs=rngs,
                init=nnx.initializers.normal(1.0),
                bias=False,
            )
        if cfg.augment_dim:
            self.augment = dense(
                cfg.augment_dim, cfg.width, (None, "embed"), rngs=rngs, init=last, bias=False
            )

    def embed(self, t, label, augment):
        h = fourier(t, self.cfg.width, shift=0.0)
        if augment is not None:
            h = h + self.augment(augment.astype(jnp.float32))
        h = self.layer1(nnx.silu(self.layer0(h)))
        return nnx.silu(h if label is None else h + self.label(label))
