"""The text-conditional U-Net of Stable Diffusion (arXiv:2112.10752) and SDXL (arXiv:2307.01952),
with the weights of diffusers' `UNet2DConditionModel`.

Levels of ResNet blocks, each followed by a transformer that reads the text; what the way down
computes is concatenated on the way up. The transformer blocks behind one ResNet block are stacked
and scanned.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Natural, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.attention import Negative, nasa, negative_prompt
from jaxdistill.models.blocks import Down, ResBlock, Up
from jaxdistill.models.layers import (
    Mapper,
    as_program,
    attention,
    conv,
    dense,
    fourier,
    group_norm,
    layer_norm,
    scan_layers,
    split_heads,
    stack,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet:
    """Sizes. Defaults are a toy's. Stable Diffusion 1.5: size 64, widths 320 640 1280 1280, depths
    1 1 1 0, mid_depth 1, heads 8, text_dim 768, groups 32, matrices False. 2.1: heads 5 10 20 20,
    text_dim 1024, matrices True. SDXL: size 128, widths 320 640 1280, depths 0 2 10, mid_depth 10,
    heads 5 10 20, text_dim 2048, pooled_dim 1280, size_dim 256.
    """

    size: int = 8  # latents are [size, size, channels] in training; others work
    channels: int = 4  # of x and of the output
    image_channels: int = 0  # of cond["image"], concatenated to x (inpainting, editing)
    widths: tuple[int, ...] = (
        32,
        64,
    )  # channels of the levels, each at half the resolution of the one before
    layers: Depth = 2  # ResNet blocks of a level on the way down; one more on the way up
    depths: tuple[int, ...] = (
        1,
        0,
    )  # transformer blocks after each ResNet block of a level; 0: none
    mid_depth: Natural = 1  # transformer blocks in the middle; 0: no middle at all
    heads: tuple[int, ...] = (2, 4)  # of the transformers of each level; the middle takes the last
    text_dim: int = 32  # channels of cond["text"]
    pooled_dim: int = 0  # channels of cond["pooled"]; 0: neither it nor cond["size"] is read
    size_dim: int = 0  # features of each of the six numbers of cond["size"]
    # features of cond["guidance"] (guidance-distilled students, arXiv:2210.03142); 0: not read
    guidance_dim: int = 0
    groups: int = 8  # of the group norms
    # PyTorch stores the maps around a transformer as matrices, not as 1x1 convolutions; same
    # function
    matrices: bool = True
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"  # of each ResNet and transformer block

    def __call__(self, rngs: nnx.Rngs) -> UNetModule:
        return UNetModule(self, rngs)


class Attention(nnx.Module):
    """Multi-head attention of [B N D] to [B L E], no bias but the last."""

    def __init__(self, dim: int, source: int, heads: int, rngs: nnx.Rngs, dtype):
        make = lambda i: dense(i, dim, ("embed", "heads"), rngs=rngs, bias=False, dtype=dtype)
        self.heads = heads
        self.to_q = make(dim)
        self.to_k = make(source)
        self.to_v = make(source)
        self.to_out = dense(dim, dim, ("heads", "embed"), rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Array, source: Array, mask: Array | None = None, negative: Negative | None = None
    ) -> Array:
        q, k, v = (
            split_heads(h, self.heads) for h in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        if negative is None:
            out = attention(q, k, v, mask=mask)
        else:
            other = (split_heads(f(negative.states), self.heads) for f in (self.to_k, self.to_v))
            out = nasa(q, k, v, *other, negative.alpha, mask=mask, negative_mask=negative.mask)
        return self.to_out(rearrange(out, "b n h k -> b n (h k)"))


class Text(NamedTuple):
    """What the transformers read: states [B L E], their mask bool [B 1 1 L], and a negative prompt."""

    states: Array
    mask: Array | None
    negative: Negative | None


class Block(nnx.Module):
    """Self-attention, attention to the text, GEGLU (arXiv:2002.05202), each on a normed residual
    branch.
    """

    def __init__(self, dim: int, text: int, heads: int, rngs: nnx.Rngs, dtype):
        self.norm1, self.norm2, self.norm3 = (
            layer_norm(dim, rngs=rngs, dtype=dtype) for _ in range(3)
        )
        self.attn1 = Attention(dim, dim, heads, rngs, dtype)
        self.attn2 = Attention(dim, text, heads, rngs, dtype)
        self.up = dense(
            dim, 8 * dim, ("embed", "mlp"), rngs=rngs, dtype=dtype
        )  # values, then gates
        self.down = dense(4 * dim, dim, ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Array, text: Text) -> Array:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), *text)
        value, gate = jnp.split(self.up(self.norm3(x)), 2, -1)
        return constrain(
            x + self.down(value * nnx.gelu(gate, approximate=False)), "batch", "seq", None
        )


class Transformer(nnx.Module):
    """`depth` blocks over the pixels, between two linear maps, as a residual branch of [B H W C]."""

    def __init__(self, cfg: UNet, dim: int, depth: int, heads: int, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        self.depth = depth
        self.remat = cfg.remat
        self.norm = group_norm(dim, cfg.groups, rngs=rngs, eps=1e-6, dtype=dtype)
        self.proj_in = dense(dim, dim, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.blocks = stack(lambda r: Block(dim, cfg.text_dim, heads, r, dtype), depth, rngs)
        self.proj_out = dense(dim, dim, ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Array, text: Text) -> Array:
        h = constrain(
            self.proj_in(rearrange(self.norm(x), "b h w c -> b (h w) c")), "batch", "seq", None
        )
        h, *_ = scan_layers(
            lambda h, block: (block(h, text), None), h, self.blocks, self.depth, remat=self.remat
        )
        return x + self.proj_out(h).reshape(x.shape)


class Level(nnx.Module):
    """ResNet blocks from `ins` to `out` channels, transformers of `depth` blocks behind them, a
    change of resolution.
    """

    def __init__(
        self,
        cfg: UNet,
        ins: list[int],
        out: int,
        depth: int,
        heads: int,
        resample: type | None,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(cfg.dtype)
        make = lambda i: ResBlock(
            i, out, emb=4 * cfg.widths[0], groups=cfg.groups, rngs=rngs, dtype=dtype
        )
        self.resnets = nnx.List([make(i) for i in ins])
        self.attentions = nnx.List(
            [Transformer(cfg, out, depth, heads, rngs) for _ in ins] if depth else []
        )
        if resample:
            self.resample = resample(out, rngs=rngs, dtype=dtype)

    def layer(self, i: int, x: Array, emb: Array, text: Text, remat: str) -> Array:
        """The i-th ResNet block and its transformer."""
        x = as_program(self.resnets[i], remat)(x, emb)
        return as_program(self.attentions[i], "none")(x, text) if self.attentions else x


class Middle(nnx.Module):
    """ResNet block, transformer, ResNet block."""

    def __init__(self, cfg: UNet, rngs: nnx.Rngs):
        dim = cfg.widths[-1]
        dtype = jnp.dtype(cfg.dtype)
        make = lambda: ResBlock(
            dim, dim, emb=4 * cfg.widths[0], groups=cfg.groups, rngs=rngs, dtype=dtype
        )
        self.before = make()
        self.after = make()
        self.attention = Transformer(cfg, dim, cfg.mid_depth, cfg.heads[-1], rngs)

    def __call__(self, x: Array, emb: Array, text: Text, remat: str) -> Array:
        x = as_program(self.before, remat)(x, emb)
        x = as_program(self.attention, "none")(x, text)  # its scan rematerialises
        return as_program(self.after, remat)(x, emb)


class UNetModule(nnx.Module):
    def __init__(self, cfg: UNet, rngs: nnx.Rngs):
        if not len(cfg.widths) == len(cfg.depths) == len(cfg.heads):
            raise Refused(
                f"model: widths={cfg.widths}, depths={cfg.depths} and heads={cfg.heads} name different numbers of levels"
            )
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        w = cfg.widths
        last = len(w) - 1
        emb = 4 * w[0]
        self.conv_in = conv(
            cfg.channels + cfg.image_channels,
            w[0],
            (3, 3),
            (None, "embed"),
            rngs=rngs,
            dtype=self.dtype,
        )
        self.time_embed = Mapper(w[0], emb, rngs)
        if cfg.pooled_dim:
            self.size_embed = Mapper(cfg.pooled_dim + 6 * cfg.size_dim, emb, rngs)
        if cfg.guidance_dim:
            self.guidance_embed = dense(
                cfg.guidance_dim, w[0], (None, "embed"), rngs=rngs, bias=False
            )
        held = [w[0]]  # channels of the states that wait for the way up
        down = []
        up = []
        for i, width in enumerate(w):
            ins = [held[-1]] + [width] * (cfg.layers - 1)
            down.append(
                Level(
                    cfg, ins, width, cfg.depths[i], cfg.heads[i], Down if i < last else None, rngs
                )
            )
            held += [width] * (cfg.layers + (i < last))
        if cfg.mid_depth:
            self.mid = Middle(cfg, rngs)
        before = w[-1]
        for i, width in reversed(list(enumerate(w))):
            ins = [before + held.pop()] + [width + held.pop() for _ in range(cfg.layers)]
            up.append(Level(cfg, ins, width, cfg.depths[i], cfg.heads[i], Up if i else None, rngs))
            before = width
        self.down = nnx.List(down)
        self.up = nnx.List(up)
        self.norm_out = group_norm(w[0], cfg.groups, rngs=rngs, dtype=self.dtype)
        self.conv_out = conv(
            w[0], cfg.channels, (3, 3), ("embed", None), rngs=rngs, dtype=self.dtype
        )

    def __call__(self, x: Array, t: Array, cond: dict[str, Array], *, taps: tuple[int, ...] = ()):
        """x [B H W C], t [B] (0 to 999) -> raw [B H W C] in x's dtype; H and W multiples of
        2^(levels - 1).

        cond: "text" [B L text_dim], "mask" bool [B L] (optional); where the sizes say so, "image"
        [B H W image_channels], "pooled" [B pooled_dim] and "size" [B 6] (pixels: original height
        and width, crop's top and left, target height and width), "guidance" [B] (guidance scale -
        1, LCM's w); a negative prompt, where wanted, as in `negative_prompt`. With `taps`, (raw,
        states [B N D] after those blocks): 0, 1, ... on the way down, then the middle, then the way
        up.
        """
        cfg = self.cfg
        levels = len(self.cfg.widths)
        remat = self.cfg.remat
        if any(n % 2 ** (levels - 1) for n in x.shape[1:3]):
            raise Refused(
                f"x: {x.shape[1]} by {x.shape[2]} latents, expected multiples of {2 ** (levels - 1)}"
            )
        if any(not 0 <= tap <= 2 * levels for tap in taps):
            raise Refused(
                f"taps={tuple(taps)}: blocks are numbered 0 to {2 * levels}, {levels} is the middle"
            )
        self._check(cond)
        emb = self._embed(t, cond)
        text = self._text(cond)
        states = []
        run = lambda level, i, h: level.layer(i, h, emb, text, remat)
        h = jnp.concatenate([x, cond["image"]], -1) if cfg.image_channels else x
        held = [h := self.conv_in(h.astype(self.dtype))]
        for level in self.down:
            for i in range(cfg.layers):
                held.append(h := run(level, i, h))
            if hasattr(level, "resample"):
                held.append(h := level.resample(h))
            states.append(h)
        if cfg.mid_depth:
            h = self.mid(h, emb, text, remat)
        states.append(h)
        for level in self.up:
            for i in range(cfg.layers + 1):
                h = run(level, i, jnp.concatenate([h, held.pop()], -1))
            h = level.resample(h) if hasattr(level, "resample") else h
            states.append(h)
        out = self.conv_out(nnx.silu(self.norm_out(h))).astype(x.dtype)
        return (
            (out, tuple(rearrange(states[tap], "b h w c -> b (h w) c") for tap in taps))
            if taps
            else out
        )

    def _check(self, cond: dict[str, Array]) -> None:
        cfg = self.cfg
        needs = {
            "text": 1,
            "image": cfg.image_channels,
            "pooled": cfg.pooled_dim,
            "size": cfg.pooled_dim,
            "guidance": cfg.guidance_dim,
        }
        missing = [name for name, size in needs.items() if size and name not in cond]
        if missing:
            raise Refused(
                f"cond: no {missing[0]!r} among {sorted(cond)}, expected {[name for name, size in needs.items() if size]}"
            )

    def _text(self, cond: dict[str, Array]) -> Text:
        mask = cond["mask"][:, None, None, :].astype(bool) if "mask" in cond else None
        negative = negative_prompt(cond)
        if negative is not None:
            negative = negative._replace(states=negative.states.astype(self.dtype))
        return Text(cond["text"].astype(self.dtype), mask, negative)

    def _embed(self, t: Array, cond: dict[str, Any]) -> Array:
        """What the ResNet blocks add [B E], after its SiLU: the time, the guidance scale, the
        pooled text and the sizes.
        """
        cfg = self.cfg
        h = fourier(t, cfg.widths[0], shift=0.0)
        if cfg.guidance_dim:  # sines first
            h = h + self.guidance_embed(
                jnp.roll(
                    fourier(1000.0 * cond["guidance"], cfg.guidance_dim), cfg.guidance_dim // 2, -1
                )
            )
        emb = self.time_embed(h)
        if cfg.pooled_dim:
            sizes = fourier(cond["size"].reshape(-1), cfg.size_dim, shift=0.0).reshape(
                t.shape[0], -1
            )
            emb = emb + self.size_embed(
                jnp.concatenate([cond["pooled"].astype(jnp.float32), sizes], -1)
            )
        return nnx.silu(emb).astype(self.dtype)
