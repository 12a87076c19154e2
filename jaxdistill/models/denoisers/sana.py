"""SANA (arXiv:2410.10629), a text-to-image transformer whose cost is linear in the pixels, with the
weights of diffusers' `SanaTransformer2DModel`: SANA, SANA 1.5 (arXiv:2501.18427) and SANA-Sprint
(arXiv:2503.09641).

Each block attends over all latents with a ReLU in the place of the softmax, then to the text with
one, then applies a gated convolution, which is also what tells the network where it is. One
projection of the time serves all blocks, each of which adds a small table of its own to it. Latents
are those of a deep-compression autoencoder, 32 channels at 1/32 of the resolution.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.attention import Negative, linear_attention, nasa, negative_prompt
from jaxdistill.models.layers import (
    XAVIER,
    GatedConv,
    Mapper,
    attention,
    dense,
    fourier,
    modulate,
    rms_norm,
    scan_layers,
    sincos_2d,
    split_heads,
    stack,
)

EPS = 1e-5  # of the norms of queries, keys and text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sana:
    """Sizes. Defaults are a toy's. All released networks: channels 32, patch 1, text_dim 2304.
    0.6B: dim 1152, heads 36, cross_heads 16, depth 28; 1.6B: dim 2240, heads 70, cross_heads 20,
    depth 20; 1.5 4.8B: the same, depth 60, qk_norm True; Sprint: the sizes of 0.6B or 1.6B, qk_norm
    and guidance True. 2K and 4K: interpolation 1 and 2, size 64 and 128.
    """

    # latents of a side that the positions were made for; without them a number for PyTorch's
    # pipelines
    size: int = 8
    patch: int = 1
    channels: int = 4
    dim: int = 32
    depth: Depth = 2
    heads: int = 4  # of the linear attention
    cross_heads: int = 2  # of the attention to the text
    text_dim: int = 16  # channels of cond["text"]
    mlp_ratio: float = 2.5  # hidden channels of the gated convolution, in dim
    qk_norm: bool = False  # queries and keys pass an RMS norm over all heads together
    interpolation: float | None = (
        None  # sinusoidal positions, this much closer together; None: no positions
    )
    guidance: bool = False  # reads cond["guidance"]
    guidance_scale: float = 0.1  # times which it is embedded
    time_scale: float = 1.0  # times which t is embedded (Sprint's teachers: .001)
    norm_eps: float = 1e-6  # of the modulated norms
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    def __call__(self, rngs: nnx.Rngs) -> SanaModule:
        return SanaModule(self, rngs)


class Attention(nnx.Module):
    """The maps of an attention of `heads` heads, and the norms of its queries and keys."""

    def __init__(self, cfg: Sana, heads: int, rngs: nnx.Rngs, *, bias: bool):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = lambda names, bias: dense(
            d, d, names, rngs=rngs, bias=bias, init=XAVIER, dtype=dtype
        )
        self.heads = heads
        self.qk_norm = cfg.qk_norm
        self.to_q, self.to_k, self.to_v = (make(("embed", "heads"), bias) for _ in range(3))
        self.to_out = make(("heads", "embed"), True)
        if cfg.qk_norm:
            self.norm_q, self.norm_k = (
                rms_norm(d, rngs=rngs, eps=EPS, dtype=dtype) for _ in range(2)
            )

    def queries(self, x: Array) -> Array:
        q = self.to_q(x)
        return split_heads(self.norm_q(q) if self.qk_norm else q, self.heads)

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        k = self.to_k(x)
        return split_heads(self.norm_k(k) if self.qk_norm else k, self.heads), split_heads(
            self.to_v(x), self.heads
        )

    def out(self, x: Array) -> Array:
        return self.to_out(rearrange(x, "b n h k -> b n (h k)"))


class LinearAttention(Attention):
    """ReLU linear attention of [B N D] to itself (arXiv:2006.16236, with another kernel)."""

    def __call__(self, x: Array) -> Array:
        k, v = self.keys_values(x)
        return self.out(linear_attention(nnx.relu(self.queries(x)), nnx.relu(k), v).astype(x.dtype))


class CrossAttention(Attention):
    """Softmax attention of [B N D] to text [B L D] under a mask [B 1 1 L]."""

    def __call__(
        self, x: Array, text: Array, mask: Array | None = None, negative: Negative | None = None
    ) -> Array:
        q = self.queries(x)
        kv = self.keys_values(text)
        if negative is None:
            return self.out(attention(q, *kv, mask=mask))
        other = self.keys_values(negative.states)
        return self.out(
            nasa(q, *kv, *other, negative.alpha, mask=mask, negative_mask=negative.mask)
        )


class Block(nnx.Module):
    def __init__(self, cfg: Sana, rngs: nnx.Rngs):
        self.eps = cfg.norm_eps
        self.table = table(6, cfg.dim, rngs)
        self.attn1 = LinearAttention(cfg, cfg.heads, rngs, bias=False)
        self.attn2 = CrossAttention(cfg, cfg.cross_heads, rngs, bias=True)
        self.gated = GatedConv(
            cfg.dim,
            int(cfg.mlp_ratio * cfg.dim),
            rngs=rngs,
            init=XAVIER,
            dtype=jnp.dtype(cfg.dtype),
        )

    def __call__(
        self,
        x: Array,
        time: Array,
        text: Array,
        mask: Array | None,
        grid: tuple[int, int],
        negative: Negative | None = None,
    ) -> Array:
        """x [B N D], N patches of a grid of (rows, columns); time [B 6 D] float32; text [B L D];
        mask [B 1 1 L].
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(time + self.table[...], 6, 1)
        add = lambda h, gate: constrain(
            (x.astype(jnp.float32) + h * gate).astype(x.dtype), "batch", "seq", None
        )
        x = add(self.attn1(modulate(x, shift1, scale1, self.eps)), gate1)
        x = x + self.attn2(x, text, mask, negative)
        h = rearrange(modulate(x, shift2, scale2, self.eps), "b (i j) d -> b i j d", i=grid[0])
        return add(rearrange(self.gated(h), "b i j d -> b (i j) d"), gate2)


class SanaModule(nnx.Module):
    def __init__(self, cfg: Sana, rngs: nnx.Rngs):
        d = cfg.dim
        pixels = cfg.patch**2 * cfg.channels
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        make = lambda i, o, names: dense(i, o, names, rngs=rngs, init=XAVIER, dtype=self.dtype)
        self.patch_embed = make(pixels, d, (None, "embed"))
        self.time_embed = Mapper(256, d, rngs)
        if cfg.guidance:
            self.guidance_embed = Mapper(256, d, rngs)
        self.time_proj = dense(d, 6 * d, ("embed", "mlp"), rngs=rngs)
        self.text_1 = make(cfg.text_dim, d, (None, "mlp"))
        self.text_2 = make(d, d, ("mlp", "embed"))
        self.text_norm = rms_norm(d, rngs=rngs, eps=EPS, dtype=self.dtype)
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.table = table(2, d, rngs)
        self.proj_out = make(d, pixels, ("embed", None))

    def __call__(self, x: Array, t: Array, cond: dict[str, Array], *, taps: tuple[int, ...] = ()):
        """x [B H W C] -> raw [B H W C] in x's dtype; with `taps`, (raw, states [B N D] after
        those blocks).

        t [B], in 0..1000 (Sprint: the flow's time, in 0..1). cond: "text" [B L text_dim]; "mask"
        bool [B L] (optional), whose False tokens are attended to by nobody; "guidance" [B], the
        guidance scale, where the sizes say so; a negative prompt as in `negative_prompt`. Raises
        Refused where a condition is missing or x does not fit the patches.
        """
        cfg = self.cfg
        p = self.cfg.patch
        for key, needed in {"text": True, "guidance": cfg.guidance}.items():
            if needed != (key in cond):
                raise Refused(
                    f"cond: {key!r} is {'missing' if needed else 'not read by this network'}; it has {', '.join(sorted(cond))}"
                )
        if any(n % p for n in x.shape[1:3]):
            raise Refused(f"x {list(x.shape)}: height and width must be multiples of {p}")
        rows, cols = grid = x.shape[1] // p, x.shape[2] // p
        h = self.patch_embed(
            rearrange(x.astype(self.dtype), "b (i p) (j q) c -> b (i j) (p q c)", p=p, q=p)
        )
        if cfg.interpolation is not None:
            h = h + sincos_2d(cfg.dim, rows, cols, cfg.size // p / cfg.interpolation).astype(
                self.dtype
            )
        h = constrain(h, "batch", "seq", None)
        emb = self.time_embed(fourier(cfg.time_scale * t, 256, shift=0.0))
        if cfg.guidance:
            emb = emb + self.guidance_embed(
                fourier(cfg.guidance_scale * cond["guidance"], 256, shift=0.0)
            )
        time = rearrange(self.time_proj(nnx.silu(emb)), "b (k d) -> b k d", k=6)
        text = self._text(cond["text"])
        negative = negative_prompt(cond)
        mask = cond["mask"][:, None, None, :].astype(bool) if "mask" in cond else None
        if negative is not None:
            negative = negative._replace(states=self._text(negative.states))
        body = lambda h, block: (block(h, time, text, mask, grid, negative), None)
        h, _, features = scan_layers(body, h, self.blocks, cfg.depth, remat=cfg.remat, taps=taps)
        h = self.proj_out(modulate(h, *jnp.split(emb[:, None] + self.table[...], 2, 1), 1e-6))
        out = rearrange(h, "b (i j) (p q c) -> b (i p) (j q) c", i=rows, p=p, q=p).astype(x.dtype)
        return (out, features) if taps else out

    def _text(self, text: Array) -> Array:
        """[B L E] -> [B L D]."""
        return self.text_norm(
            self.text_2(nnx.gelu(self.text_1(text.astype(self.dtype)), approximate=True))
        )


def table(rows: int, dim: int, rngs: nnx.Rngs) -> nnx.Param:
    """What a layer adds to the projected time: [rows D] of N(0, 1 / D)."""
    return nnx.Param(
        nnx.with_partitioning(nnx.initializers.normal(dim**-0.5), ("index", "embed"))(
            rngs.params(), (rows, dim)
        )
    )
