"""The text-conditional U-Net of Stable Diffusion (arXiv:2112.10752) and SDXL (arXiv:2307.01952).

Weights are those of diffusers' `UNet2DConditionModel`. Levels of ResNet blocks, each followed by a
transformer that reads the text; what the way down computes is concatenated on the way up. The
transformer blocks behind one ResNet block are stacked and scanned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Bool, Float, Num, Shaped

from jaxdistill.core.fields import Depth, Dtype, Natural, Remat
from jaxdistill.core.needs import Condition, Spec, check_condition
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.attention import (
    Negative,
    nasa,
    negative_needs,
    negative_prompt,
)
from jaxdistill.models.blocks import Down, ResBlock, Up
from jaxdistill.models.layers import (
    EmbeddingMLP,
    as_program,
    attention,
    conv,
    dense,
    fourier,
    group_norm,
    key_mask,
    layer_norm,
    merge_heads,
    scan_layers,
    split_heads,
    stack,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet:
    """Sizes. Defaults are a toy's.

    Stable Diffusion 1.5: size 64, widths 320 640 1280 1280, depths 1 1 1 0, mid_depth 1, heads 8,
    text_dim 768, groups 32, matrices False. 2.1: heads 5 10 20 20, text_dim 1024, matrices True.
    SDXL: size 128, widths 320 640 1280, depths 0 2 10, mid_depth 10, heads 5 10 20, text_dim 2048,
    pooled_dim 1280, size_dim 256.
    """

    size: int = 8  # latents are [size, size, channels] in training; others work
    channels: int = 4  # of x and of the output
    # of cond["image"], concatenated to x (inpainting, editing)
    image_channels: int = 0
    # channels of the levels, each at half the resolution of the one before
    widths: tuple[int, ...] = (32, 64)
    # ResNet blocks of a level on the way down; one more on the way up
    layers: Depth = 2
    # transformer blocks after each ResNet block of a level
    depths: tuple[int, ...] = (
        1,
        0,
    )
    mid_depth: Natural = 1  # transformer blocks in the middle; 0: no middle at all
    # of the transformers of each level; the middle takes the last
    heads: tuple[int, ...] = (
        2,
        4,
    )
    text_dim: int = 32  # channels of cond["text"]
    # channels of cond["pooled"]; 0: neither it nor cond["size"] is read
    pooled_dim: int = 0
    size_dim: int = 0  # features of each of the six numbers of cond["size"]
    # features of cond["guidance"] (guidance-distilled students, arXiv:2210.03142); 0: not read
    guidance_dim: int = 0
    groups: int = 8  # of the group norms
    # whether PyTorch stores the maps around a transformer as matrices, not as 1x1 convolutions: the
    # function is the same
    matrices: bool = True
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"  # of each ResNet and transformer block

    def __call__(self, rngs: nnx.Rngs) -> UNetModule:
        return UNetModule(self, rngs)

    @property
    def embed_dim(self) -> int:
        """Channels of the embedding of the time and of what is added to it."""
        return 4 * self.widths[0]

    @property
    def condition(self) -> Condition:
        needs = {"text": Float[Spec, f"B L {self.text_dim}"]}
        if self.image_channels:
            needs["image"] = Float[Spec, f"B H W {self.image_channels}"]
        if self.pooled_dim:
            needs["pooled"] = Float[Spec, f"B {self.pooled_dim}"]
            needs["size"] = Num[Spec, "B 6"]
        if self.guidance_dim:
            needs["guidance"] = Num[Spec, " B"]
        optional = {"mask": Shaped[Spec, "B L"], **negative_needs(self.text_dim)}
        return Condition(needs=needs, optional=optional)


class Attention(nnx.Module):
    """Multi-head attention; only the output's map has a bias."""

    def __init__(self, dim: int, source: int, heads: int, rngs: nnx.Rngs, dtype):
        make = functools.partial(dense, rngs=rngs, dtype=dtype)
        self.heads = heads
        self.to_q = make(dim, dim, ("embed", "heads"), bias=False)
        self.to_k = make(source, dim, ("embed", "heads"), bias=False)
        self.to_v = make(source, dim, ("embed", "heads"), bias=False)
        self.to_out = make(dim, dim, ("heads", "embed"))

    def __call__(
        self,
        x: Float[Array, "B N D"],
        source: Float[Array, "B S E"],
        mask: Bool[Array, "B 1 1 S"] | None = None,
        negative: Negative | None = None,
    ) -> Float[Array, "B N D"]:
        """x attends to `source`, less its attention to a negative prompt where there is one."""
        q = split_heads(self.to_q(x), self.heads)
        k, v = self._keys_values(source)
        if negative is None:
            out = attention(q, k, v, mask=mask)
        else:
            other = self._keys_values(negative.tokens)
            out = nasa(
                q,
                k,
                v,
                *other,
                negative.alpha,
                mask=mask,
                negative_mask=negative.mask,
            )
        return self.to_out(merge_heads(out))

    def _keys_values(self, source: Array) -> tuple[Array, Array]:
        k = split_heads(self.to_k(source), self.heads)
        return k, split_heads(self.to_v(source), self.heads)


class Text(NamedTuple):
    """What the transformers read."""

    tokens: Array  # [B L E]
    mask: Array | None  # bool [B 1 1 L]
    negative: Negative | None


class Block(nnx.Module):
    """Self-attention, attention to the text, GEGLU (arXiv:2002.05202), each a normed branch."""

    def __init__(self, dim: int, text: int, heads: int, rngs: nnx.Rngs, dtype):
        self.norm1 = layer_norm(dim, rngs=rngs, dtype=dtype)
        self.norm2 = layer_norm(dim, rngs=rngs, dtype=dtype)
        self.norm3 = layer_norm(dim, rngs=rngs, dtype=dtype)
        self.attn1 = Attention(dim, dim, heads, rngs, dtype)
        self.attn2 = Attention(dim, text, heads, rngs, dtype)
        wide = 8 * dim  # values, then gates
        self.up = dense(dim, wide, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.down = dense(4 * dim, dim, ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B N D"], text: Text
    ) -> Float[Array, "B N D"]:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), *text)
        value, gate = jnp.split(self.up(self.norm3(x)), 2, -1)
        h = self.down(value * nnx.gelu(gate, approximate=False))
        return constrain(x + h, "batch", "seq", None)


class Transformer(nnx.Module):
    """`depth` blocks over the pixels, between two linear maps, as a residual branch."""

    def __init__(self, cfg: UNet, dim: int, depth: int, heads: int, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        self.depth = depth
        self.remat = cfg.remat
        self.norm = group_norm(dim, cfg.groups, rngs=rngs, eps=1e-6, dtype=dtype)
        self.proj_in = dense(dim, dim, ("embed", "mlp"), rngs=rngs, dtype=dtype)
        self.blocks = stack(
            lambda r: Block(dim, cfg.text_dim, heads, r, dtype), depth, rngs
        )
        self.proj_out = dense(dim, dim, ("mlp", "embed"), rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B H W C"], text: Text
    ) -> Float[Array, "B H W C"]:
        h = self.proj_in(rearrange(self.norm(x), "b h w c -> b (h w) c"))
        h = constrain(h, "batch", "seq", None)
        body = lambda h, block: (block(h, text), None)
        h, *_ = scan_layers(body, h, self.blocks, self.depth, remat=self.remat)
        return x + self.proj_out(h).reshape(x.shape)


def resnet(cfg: UNet, i: int, o: int, rngs: nnx.Rngs) -> ResBlock:
    """A residual block of the U-Net from i to o channels."""
    dtype = jnp.dtype(cfg.dtype)
    return ResBlock(
        i, o, emb=cfg.embed_dim, groups=cfg.groups, rngs=rngs, dtype=dtype
    )


class Level(nnx.Module):
    """ResNet blocks from `ins` to `out` channels with transformers, then a change of resolution."""

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
        self.resnets = nnx.List([resnet(cfg, i, out, rngs) for i in ins])
        transformers = []
        if depth:
            transformers = [Transformer(cfg, out, depth, heads, rngs) for _ in ins]
        self.attentions = nnx.List(transformers)
        if resample:
            self.resample = resample(out, rngs=rngs, dtype=jnp.dtype(cfg.dtype))

    def layer(
        self,
        i: int,
        x: Float[Array, "B H W C"],
        emb: Float[Array, "B E"],
        text: Text,
        remat: str,
    ) -> Float[Array, "B H W D"]:
        """The i-th ResNet block and its transformer."""
        x = as_program(self.resnets[i], remat)(x, emb)
        if not self.attentions:
            return x
        # its scan rematerialises
        return as_program(self.attentions[i], "none")(x, text)


class Middle(nnx.Module):
    """ResNet block, transformer, ResNet block."""

    def __init__(self, cfg: UNet, rngs: nnx.Rngs):
        dim = cfg.widths[-1]
        self.before = resnet(cfg, dim, dim, rngs)
        self.after = resnet(cfg, dim, dim, rngs)
        self.attention = Transformer(cfg, dim, cfg.mid_depth, cfg.heads[-1], rngs)

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        emb: Float[Array, "B E"],
        text: Text,
        remat: str,
    ) -> Float[Array, "B H W C"]:
        x = as_program(self.before, remat)(x, emb)
        x = as_program(self.attention, "none")(x, text)  # its scan rematerialises
        return as_program(self.after, remat)(x, emb)


class UNetModule(nnx.Module):
    def __init__(self, cfg: UNet, rngs: nnx.Rngs):
        if not len(cfg.widths) == len(cfg.depths) == len(cfg.heads):
            raise Refused(
                f"model: widths={cfg.widths}, depths={cfg.depths} and heads={cfg.heads} "
                "name different numbers of levels"
            )
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        w = cfg.widths
        channels = cfg.channels + cfg.image_channels
        convolution = functools.partial(
            conv, size=(3, 3), rngs=rngs, dtype=self.dtype
        )
        self.conv_in = convolution(channels, w[0], names=(None, "embed"))
        self.time_embed = EmbeddingMLP(w[0], cfg.embed_dim, rngs)
        if cfg.pooled_dim:
            self.size_embed = EmbeddingMLP(
                cfg.pooled_dim + 6 * cfg.size_dim, cfg.embed_dim, rngs
            )
        if cfg.guidance_dim:
            names = (None, "embed")
            self.guidance_embed = dense(
                cfg.guidance_dim, w[0], names, rngs=rngs, bias=False
            )
        down, skips = self._way_down(rngs)
        if cfg.mid_depth:
            self.mid = Middle(cfg, rngs)
        up = self._way_up(skips, rngs)
        self.down = nnx.List(down)
        self.up = nnx.List(up)
        self.norm_out = group_norm(w[0], cfg.groups, rngs=rngs, dtype=self.dtype)
        self.conv_out = convolution(w[0], cfg.channels, names=("embed", None))

    def _way_down(self, rngs: nnx.Rngs) -> tuple[list[Level], list[int]]:
        """(levels, channels of all activations that are concatenated on the way up)."""
        cfg = self.cfg
        last = len(cfg.widths) - 1
        levels = []
        skips = [cfg.widths[0]]
        for i, width in enumerate(cfg.widths):
            ins = [skips[-1]] + [width] * (cfg.layers - 1)
            resample = Down if i < last else None
            levels.append(
                Level(cfg, ins, width, cfg.depths[i], cfg.heads[i], resample, rngs)
            )
            skips += [width] * (cfg.layers + (i < last))
        return levels, skips

    def _way_up(self, skips: list[int], rngs: nnx.Rngs) -> list[Level]:
        cfg = self.cfg
        levels = []
        skips = list(skips)
        before = cfg.widths[-1]
        for i, width in reversed(list(enumerate(cfg.widths))):
            ins = [before + skips.pop()] + [
                width + skips.pop() for _ in range(cfg.layers)
            ]
            resample = Up if i else None
            levels.append(
                Level(cfg, ins, width, cfg.depths[i], cfg.heads[i], resample, rngs)
            )
            before = width
        return levels

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        cond: Mapping[str, Any],
        *,
        taps: tuple[int, ...] = (),
    ) -> Float[Array, "B H W C"] | tuple[Float[Array, "B H W C"], tuple]:
        """The raw prediction in x's dtype; with `taps`, (raw, features [B N D] of those levels).

        Args:
            x: noisy latents; H and W are multiples of 2^(levels - 1).
            t: times in 0 to 999.
            cond: "text" [B L text_dim]; "mask" bool [B L] (optional); a negative prompt as in
              `negative_prompt`; and of a network that reads them "image" [B H W image_channels],
              "pooled" [B pooled_dim], "size" [B 6] (pixels: original height and width, the crop's
              top and left, target height and width) and "guidance" [B] (guidance scale - 1, LCM's
              w).
            taps: 0, 1, ... on the way down, then the middle, then the way up.

        Raises:
            Refused: where x, the condition or the taps are not this.
        """
        cfg = self.cfg
        self._check(x, taps)
        check_condition(cond, cfg.condition, "UNet")
        emb = self._embed(t, cond)
        text = self._text(cond)
        h = jnp.concatenate([x, cond["image"]], -1) if cfg.image_channels else x
        h = self.conv_in(h.astype(self.dtype))
        h, skips, features = self._descend(h, emb, text)
        if cfg.mid_depth:
            h = self.mid(h, emb, text, cfg.remat)
        features.append(h)
        h, features_up = self._ascend(h, skips, emb, text)
        features += features_up
        out = self.conv_out(nnx.silu(self.norm_out(h))).astype(x.dtype)
        if not taps:
            return out
        return out, tuple(
            rearrange(features[tap], "b h w c -> b (h w) c") for tap in taps
        )

    def _check(self, x: Array, taps: tuple[int, ...]) -> None:
        levels = len(self.cfg.widths)
        if any(n % 2 ** (levels - 1) for n in x.shape[1:3]):
            raise Refused(
                f"x: {x.shape[1]} by {x.shape[2]} latents, "
                f"expected multiples of {2 ** (levels - 1)}"
            )
        if any(not 0 <= tap <= 2 * levels for tap in taps):
            raise Refused(
                f"taps={tuple(taps)}: blocks are numbered 0 to {2 * levels}, {levels} is the middle"
            )

    def _descend(
        self, h: Array, emb: Array, text: Text
    ) -> tuple[Array, list, list]:
        """(output, all activations for the way up, outputs of the levels)."""
        cfg = self.cfg
        skips = [h]
        features = []
        for level in self.down:
            for i in range(cfg.layers):
                h = level.layer(i, h, emb, text, cfg.remat)
                skips.append(h)
            if hasattr(level, "resample"):
                h = level.resample(h)
                skips.append(h)
            features.append(h)
        return h, skips, features

    def _ascend(
        self, h: Array, skips: list, emb: Array, text: Text
    ) -> tuple[Array, list]:
        """(output, outputs of the levels)."""
        cfg = self.cfg
        skips = list(skips)
        features = []
        for level in self.up:
            for i in range(cfg.layers + 1):
                h = jnp.concatenate([h, skips.pop()], -1)
                h = level.layer(i, h, emb, text, cfg.remat)
            if hasattr(level, "resample"):
                h = level.resample(h)
            features.append(h)
        return h, features

    def _text(self, cond: Mapping[str, Any]) -> Text:
        negative = negative_prompt(cond)
        if negative is not None:
            negative = negative._replace(tokens=negative.tokens.astype(self.dtype))
        return Text(
            cond["text"].astype(self.dtype), key_mask(cond.get("mask")), negative
        )

    def _embed(self, t: Array, cond: Mapping[str, Any]) -> Array:
        """What the ResNet blocks add [B E], after its SiLU.

        It embeds the time, the guidance scale, the pooled text and the sizes.
        """
        cfg = self.cfg
        h = fourier(t, cfg.widths[0], shift=0.0)
        if cfg.guidance_dim:
            guidance = fourier(1000.0 * cond["guidance"], cfg.guidance_dim)
            guidance = jnp.roll(guidance, cfg.guidance_dim // 2, -1)  # sines first
            h = h + self.guidance_embed(guidance)
        emb = self.time_embed(h)
        if cfg.pooled_dim:
            sizes = fourier(cond["size"].reshape(-1), cfg.size_dim, shift=0.0)
            sizes = sizes.reshape(t.shape[0], -1)
            pooled = cond["pooled"].astype(jnp.float32)
            emb = emb + self.size_embed(jnp.concatenate([pooled, sizes], -1))
        return nnx.silu(emb).astype(self.dtype)
