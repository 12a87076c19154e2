"""SANA (arXiv:2410.10629), a text-to-image transformer whose cost is linear in the pixels.

Weights are those of diffusers' `SanaTransformer2DModel`: SANA, SANA 1.5 (arXiv:2501.18427) and
SANA-Sprint (arXiv:2503.09641).

Each block attends over all latents with a ReLU in the place of the softmax, then to the text with a
softmax, then applies a gated convolution, which also gives the network its sense of position. One
projection of the time serves all blocks; each adds a small table of its own to it. Latents are
those of a deep-compression autoencoder, 32 channels at 1/32 of the resolution.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Bool, Float, Num, Shaped

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.needs import Condition, Spec, check_condition
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.attention import (
    Negative,
    linear_attention,
    nasa,
    negative_needs,
    negative_prompt,
)
from jaxdistill.models.layers import (
    XAVIER,
    EmbeddingMLP,
    GatedConv,
    Inside,
    Stacked,
    add_gated,
    attention,
    dense,
    fourier,
    key_mask,
    merge_heads,
    modulate,
    patchify,
    rms_norm,
    sincos_2d,
    split_heads,
    stack,
    unpatchify,
    with_residual,
)

EPS = 1e-5  # of the norms of queries, keys and text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sana:
    """Sizes. Defaults are a toy's. All released networks: channels 32, patch 1, text_dim 2304.

    0.6B: dim 1152, heads 36, cross_heads 16, depth 28. 1.6B: dim 2240, heads 70, cross_heads 20,
    depth 20. 1.5 4.8B: the same, depth 60, qk_norm True. Sprint: the sizes of 0.6B or 1.6B, qk_norm
    and guidance True. 2K and 4K: interpolation 1 and 2, size 64 and 128.
    """

    # latents of a side that the positions are made for; without positions, a number that PyTorch's
    # pipelines read
    size: int = 8
    patch: int = 1
    channels: int = 4
    dim: int = 32
    depth: Depth = 2
    heads: int = 4  # of the linear attention
    cross_heads: int = 2  # of the attention to the text
    text_dim: int = 16  # channels of cond["text"]
    mlp_ratio: float = 2.5  # hidden channels of the gated convolution, in dim
    # queries and keys pass an RMS norm over all heads together
    qk_norm: bool = False
    # factor by which the sinusoidal positions are closer together; None: no positions
    interpolation: float | None = None
    guidance: bool = False  # reads cond["guidance"]
    # factor on the guidance scale before it is embedded
    guidance_scale: float = 0.1
    # factor on t before it is embedded (Sprint's teachers: .001)
    time_scale: float = 1.0
    norm_eps: float = 1e-6  # of the modulated norms
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    def __call__(self, rngs: nnx.Rngs) -> SanaModule:
        return SanaModule(self, rngs)

    @property
    def condition(self) -> Condition:
        needs = {"text": Float[Spec, f"B L {self.text_dim}"]}
        optional = {"mask": Shaped[Spec, "B L"], **negative_needs(self.text_dim)}
        if not self.guidance:
            return Condition(needs=needs, optional=optional, unread=("guidance",))
        needs["guidance"] = Num[Spec, " B"]
        return Condition(needs=needs, optional=optional)


class Attention(nnx.Module):
    """The maps of an attention of `heads` heads, and the norms of its queries and keys."""

    def __init__(self, cfg: Sana, heads: int, rngs: nnx.Rngs, *, bias: bool):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, d, d, rngs=rngs, init=XAVIER, dtype=dtype)
        self.heads = heads
        self.qk_norm = cfg.qk_norm
        self.to_q = make(("embed", "heads"), bias=bias)
        self.to_k = make(("embed", "heads"), bias=bias)
        self.to_v = make(("embed", "heads"), bias=bias)
        self.to_out = make(("heads", "embed"))
        if cfg.qk_norm:
            self.norm_q = rms_norm(d, rngs=rngs, eps=EPS, dtype=dtype)
            self.norm_k = rms_norm(d, rngs=rngs, eps=EPS, dtype=dtype)

    def queries(self, x: Float[Array, "B N D"]) -> Float[Array, "B N H K"]:
        q = self.to_q(x)
        if self.qk_norm:
            q = self.norm_q(q)
        return split_heads(q, self.heads)

    def keys_values(
        self, x: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]:
        k = self.to_k(x)
        if self.qk_norm:
            k = self.norm_k(k)
        return split_heads(k, self.heads), split_heads(self.to_v(x), self.heads)

    def out(self, attended: Float[Array, "B N H K"]) -> Float[Array, "B N D"]:
        return self.to_out(merge_heads(attended))


class LinearAttention(Attention):
    """Linear attention with a ReLU kernel (arXiv:2006.16236, 2410.10629)."""

    def attended(self, x: Float[Array, "B N D"]) -> Float[Array, "B N E"]:
        """What x attends to, before the output projection, heads merged."""
        k, v = self.keys_values(x)
        q = self.queries(x)
        attended = linear_attention(nnx.relu(q), nnx.relu(k), v)
        return merge_heads(attended.astype(x.dtype))


class CrossAttention(Attention):
    """Softmax attention to a text, less that to a negative prompt where there is one."""

    def __call__(
        self,
        x: Float[Array, "B N D"],
        text: Float[Array, "B L D"],
        mask: Bool[Array, "B 1 1 L"] | None = None,
        negative: Negative | None = None,
    ) -> Float[Array, "B N D"]:
        q = self.queries(x)
        k, v = self.keys_values(text)
        if negative is None:
            return self.out(attention(q, k, v, mask=mask))
        other = self.keys_values(negative.tokens)
        negative_mask = negative.mask
        out = nasa(
            q, k, v, *other, negative.alpha, mask=mask, negative_mask=negative_mask
        )
        return self.out(out)


class Block(nnx.Module):
    def __init__(self, cfg: Sana, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        hidden = int(cfg.mlp_ratio * cfg.dim)
        self.eps = cfg.norm_eps
        self.table = table(6, cfg.dim, rngs)
        self.attn1 = LinearAttention(cfg, cfg.heads, rngs, bias=False)
        self.attn2 = CrossAttention(cfg, cfg.cross_heads, rngs, bias=True)
        self.gated = GatedConv(cfg.dim, hidden, rngs=rngs, init=XAVIER, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Context,
        residual: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B N D"], Inside]:
        """x: patches."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            context.time + self.table[...], 6, 1
        )
        h = modulate(x, shift1, scale1, self.eps)
        attended = self.attn1.attended(h)
        branch = with_residual(self.attn1.to_out(attended), h, residual)
        x = constrain(add_gated(x, branch, gate1), "batch", "seq", None)
        x = x + self.attn2(x, context.text, context.mask, context.negative)
        h = modulate(x, shift2, scale2, self.eps)
        h = rearrange(h, "b (i j) d -> b i j d", i=context.rows)
        neurons = self.gated.neurons(h)
        h = rearrange(self.gated.down(neurons), "b i j d -> b (i j) d")
        x = constrain(add_gated(x, h, gate2), "batch", "seq", None)
        return x, Inside(attended, rearrange(neurons, "b i j m -> b (i j) m"))


@flax.struct.dataclass
class Context:
    """What the blocks and the head read."""

    emb: Float[Array, "B D"]  # the time, and the guidance scale
    time: Float[Array, "B 6 D"]  # `emb` projected, float32
    text: Float[Array, "B L D"]
    mask: Bool[Array, "B 1 1 L"] | None  # of the text
    negative: Negative | None
    rows: int = flax.struct.field(pytree_node=False)  # of patches
    dtype: Any = flax.struct.field(pytree_node=False)  # of the input


class SanaModule(Stacked):
    def __init__(self, cfg: Sana, rngs: nnx.Rngs):
        d = cfg.dim
        pixels = cfg.patch**2 * cfg.channels
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, rngs=rngs, init=XAVIER, dtype=self.dtype)
        self.patch_embed = make(pixels, d, (None, "embed"))
        self.time_embed = EmbeddingMLP(256, d, rngs)
        if cfg.guidance:
            self.guidance_embed = EmbeddingMLP(256, d, rngs)
        self.time_proj = dense(d, 6 * d, ("embed", "mlp"), rngs=rngs)
        self.text_1 = make(cfg.text_dim, d, (None, "mlp"))
        self.text_2 = make(d, d, ("mlp", "embed"))
        self.text_norm = rms_norm(d, rngs=rngs, eps=EPS, dtype=self.dtype)
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.table = table(2, d, rngs)
        self.proj_out = make(d, pixels, ("embed", None))

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        cond: Mapping[str, Any],
        *,
        taps: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B H W C"] | tuple[Float[Array, "B H W C"], tuple]:
        """The raw prediction in x's dtype; with `taps`, (raw, features [B N D] of those blocks).

        Args:
            x: noisy latents.
            t: times in 0..1000 (Sprint: the flow's, in 0..1).
            cond: "text" [B L text_dim]; "mask" bool [B L] (optional), False on tokens that nobody
              attends to; "guidance" [B], the guidance scale, of a network with `guidance`; a
              negative prompt as in `negative_prompt`.
            taps: indices of blocks.
            through: options of `Stacked.apply_blocks`.

        Raises:
            Refused: where the condition is not this, or x does not fit the patches.
        """
        return self.through(*self.embed_inputs(x, t, cond), taps=taps, **through)

    def embed_inputs(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        cond: Mapping[str, Any],
    ) -> tuple[Float[Array, "B N D"], Context]:
        cfg = self.cfg
        check_condition(cond, cfg.condition, "Sana")
        if any(n % cfg.patch for n in x.shape[1:3]):
            raise Refused(
                f"x {list(x.shape)}: height and width must be multiples of {cfg.patch}"
            )
        rows = x.shape[1] // cfg.patch
        h = self._enter(x)
        emb = self._embed(t, cond)
        time = rearrange(self.time_proj(nnx.silu(emb)), "b (k d) -> b k d", k=6)
        text = self._text(cond["text"])
        mask = key_mask(cond.get("mask"))
        negative = negative_prompt(cond)
        if negative is not None:
            negative = negative._replace(tokens=self._text(negative.tokens))
        return h, Context(emb, time, text, mask, negative, rows, x.dtype)

    def apply_block(self, block, state, context, residual=None):
        return block(state, context, residual)

    def head(
        self, state: Float[Array, "B N D"], context: Context
    ) -> Float[Array, "B H W C"]:
        shift, scale = jnp.split(context.emb[:, None] + self.table[...], 2, 1)
        h = self.proj_out(modulate(state, shift, scale, 1e-6))
        return unpatchify(h, context.rows, self.cfg.patch).astype(context.dtype)

    def _enter(self, x: Array) -> Array:
        """Embedded patches [B N D], with positions where the network has them."""
        cfg = self.cfg
        h = self.patch_embed(patchify(x.astype(self.dtype), cfg.patch))
        if cfg.interpolation is not None:
            rows = x.shape[1] // cfg.patch
            cols = x.shape[2] // cfg.patch
            base = cfg.size // cfg.patch / cfg.interpolation
            h = h + sincos_2d(cfg.dim, rows, cols, base).astype(self.dtype)
        return constrain(h, "batch", "seq", None)

    def _embed(self, t: Array, cond: Mapping[str, Any]) -> Array:
        """[B D]: the time, and the guidance scale where it is read."""
        cfg = self.cfg
        emb = self.time_embed(fourier(cfg.time_scale * t, 256, shift=0.0))
        if cfg.guidance:
            guidance = fourier(
                cfg.guidance_scale * cond["guidance"], 256, shift=0.0
            )
            emb = emb + self.guidance_embed(guidance)
        return emb

    def _text(self, text: Array) -> Array:
        """[B L E] -> [B L D]."""
        h = nnx.gelu(self.text_1(text.astype(self.dtype)), approximate=True)
        return self.text_norm(self.text_2(h))


def table(rows: int, dim: int, rngs: nnx.Rngs) -> nnx.Param:
    """What a layer adds to the projected time: [rows D] of N(0, 1 / D)."""
    init = nnx.initializers.normal(dim**-0.5)
    named = nnx.with_partitioning(init, ("index", "embed"))
    return nnx.Param(named(rngs.params(), (rows, dim)))
