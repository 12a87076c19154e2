"""Wan, the video diffusion transformer (arXiv:2503.20314), with the weights of diffusers'
`WanTransformer3DModel`.

Video latents are cut into patches; each block attends over all of them with rotary positions along
time, height and width, then to the text, then applies an MLP. One projection of the time serves all
blocks, each of which adds a small table of its own to it. Image-to-video networks also read latents
beside x and, in Wan 2.1, the states of a CLIP image encoder. Wan 2.2 14B is two such networks, one
for high and one for low noise (`interop.families.wan.experts`).
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.attention import Negative, nasa, negative_prompt
from jaxdistill.models.layers import (
    XAVIER,
    Mapper,
    attention,
    axial_waves,
    dense,
    fourier,
    layer_norm,
    modulate,
    rms_norm,
    rotate_pairs,
    scan_layers,
    split_heads,
    stack,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wan:
    """Sizes. Defaults are a toy's. Wan 2.1 T2V 1.3B: channels 16, dim 1536, mlp 8960, heads 12,
    depth 30, text_dim 4096;
    14B, and each expert of 2.2 A14B: dim 5120, mlp 13824, heads 40, depth 40; I2V: image_channels
    20, and in 2.1 vision_dim 1280; 2.2 TI2V 5B: channels 48, dim 3072, mlp 14336, heads 24, depth
    30.
    """

    patch: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns
    channels: int = 4  # of x and of the output
    image_channels: int = (
        0  # of cond["image"], concatenated to x (I2V: a mask of 4 channels, then latents)
    )
    dim: int = 48
    mlp: int = 96
    depth: Depth = 2
    heads: int = 4
    text_dim: int = 32  # channels of cond["text"]
    vision_dim: int = 0  # channels of cond["vision"]; 0: not read
    # length of the position table added to cond["vision"] (first and last frame: 514); 0: none
    vision_length: int = 0
    time_dim: int = 256  # sinusoidal features of the time
    norm_eps: float = 1e-6
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    def __call__(self, rngs: nnx.Rngs) -> WanModule:
        return WanModule(self, rngs)


class Attention(nnx.Module):
    """Attention whose queries and keys pass an RMS norm over all heads together."""

    def __init__(self, cfg: Wan, rngs: nnx.Rngs, vision: bool = False):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = lambda names: dense(d, d, names, rngs=rngs, init=XAVIER, dtype=dtype)
        scale = lambda: rms_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.heads = cfg.heads
        self.vision = vision
        self.to_q, self.to_k, self.to_v = (make(("embed", "heads")) for _ in range(3))
        self.norm_q = scale()
        self.norm_k = scale()
        self.to_out = make(("heads", "embed"))
        if vision:
            self.to_k_vision = make(("embed", "heads"))
            self.to_v_vision = make(("embed", "heads"))
            self.norm_k_vision = scale()

    def __call__(
        self,
        x: Array,
        source: Array,
        rotary: tuple[Array, Array] | None = None,
        vision: Array | None = None,
        negative: Negative | None = None,
    ) -> Array:
        """x [B N D] attends to source [B L D]; with `vision` [B M D] a second softmax over it is
        added.
        """
        q = self.norm_q(self.to_q(x))
        k = self.norm_k(self.to_k(source))
        v = self.to_v(source)
        q, k, v = (split_heads(h, self.heads) for h in (q, k, v))
        if rotary is not None:
            q = rotate_pairs(q, rotary)
            k = rotate_pairs(k, rotary)
        if negative is None:
            out = attention(q, k, v)
        else:
            other = self.norm_k(self.to_k(negative.states)), self.to_v(negative.states)
            out = nasa(q, k, v, *(split_heads(h, self.heads) for h in other), negative.alpha)
        if self.vision:
            k = self.norm_k_vision(self.to_k_vision(vision))
            v = self.to_v_vision(vision)
            out = out + attention(q, split_heads(k, self.heads), split_heads(v, self.heads))
        return self.to_out(rearrange(out, "b n h k -> b n (h k)"))


class Block(nnx.Module):
    def __init__(self, cfg: Wan, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        self.eps = cfg.norm_eps
        self.table = table(6, d, rngs)
        self.attn1 = Attention(cfg, rngs)
        self.attn2 = Attention(cfg, rngs, vision=cfg.vision_dim > 0)
        self.norm = layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.up = dense(d, cfg.mlp, ("embed", "mlp"), rngs=rngs, init=XAVIER, dtype=dtype)
        self.down = dense(cfg.mlp, d, ("mlp", "embed"), rngs=rngs, init=XAVIER, dtype=dtype)

    def __call__(
        self,
        x: Array,
        time: Array,
        text: Array,
        vision: Array | None,
        rotary: tuple[Array, Array],
        negative: Negative | None = None,
    ) -> Array:
        """x [B N D]; time [B M 6 D] float32; text [B L D]; vision [B V D]; rotary of the patches'
        positions.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = runs(time + self.table[...], x)
        add = lambda h, gate: constrain(
            (x.astype(jnp.float32) + h * gate).astype(x.dtype), "batch", "seq", None
        )
        h = modulate(x, shift1, scale1, self.eps)
        x = add(self.attn1(h, h, rotary), gate1)
        x = x + self.attn2(self.norm(x), text, vision=vision, negative=negative)
        h = nnx.gelu(self.up(modulate(x, shift2, scale2, self.eps)), approximate=True)
        return add(self.down(h), gate2)


class Vision(nnx.Module):
    """From the states of an image encoder [B N E] to the width of the blocks [B N D]."""

    def __init__(self, cfg: Wan, rngs: nnx.Rngs):
        e = cfg.vision_dim
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        if cfg.vision_length:
            self.positions = nnx.Param(
                nnx.with_partitioning(nnx.initializers.normal(0.02), (None, "index", None))(
                    rngs.params(), (1, cfg.vision_length, e)
                )
            )
        self.norm1, self.norm2 = (layer_norm(n, rngs=rngs, eps=1e-5, dtype=dtype) for n in (e, d))
        self.linear_1 = dense(e, e, (None, "mlp"), rngs=rngs, init=XAVIER, dtype=dtype)
        self.linear_2 = dense(e, d, ("mlp", "embed"), rngs=rngs, init=XAVIER, dtype=dtype)
        self.length = cfg.vision_length

    def __call__(self, x: Array) -> Array:
        x = x + self.positions[...].astype(x.dtype) if self.length else x
        return self.norm2(self.linear_2(nnx.gelu(self.linear_1(self.norm1(x)), approximate=False)))


class WanModule(nnx.Module):
    def __init__(self, cfg: Wan, rngs: nnx.Rngs):
        d = cfg.dim
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        make = lambda i, o, names: dense(i, o, names, rngs=rngs, init=XAVIER, dtype=self.dtype)
        self.patch_embed = make(
            math.prod(cfg.patch) * (cfg.channels + cfg.image_channels), d, (None, "embed")
        )
        self.time_embed = Mapper(cfg.time_dim, d, rngs)
        self.time_proj = dense(d, 6 * d, ("embed", "mlp"), rngs=rngs)
        self.text_1 = make(cfg.text_dim, d, (None, "mlp"))
        self.text_2 = make(d, d, ("mlp", "embed"))
        if cfg.vision_dim:
            self.vision = Vision(cfg, rngs)
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.table = table(2, d, rngs)
        self.proj_out = make(d, math.prod(cfg.patch) * cfg.channels, ("embed", None))

    def __call__(self, x: Array, t: Array, cond: dict[str, Array], *, taps: tuple[int, ...] = ()):
        """x [B T H W C] -> raw [B T H W C] in x's dtype; with `taps`, (raw, states [B N D]
        after those blocks).

        t [B], in 0..1000; or [B M], one for each of M equal runs of patches: of each latent frame
        where M = T (Wan 2.2 5B holds given frames at time 0), of each patch where M = N. cond:
        "text" [B L text_dim]; "mask" bool [B L], whose False tokens are set to zero but attended
        to, as in training (L = 512); "image" [B T H W image_channels]; "vision" [B V vision_dim]; a
        negative prompt as in `negative_prompt`, masked as the text is. Raises Refused where a
        condition is missing or x does not fit the patches.
        """
        cfg = self.cfg
        size = dict(zip("pqr", self.cfg.patch))
        for key, needed in {
            "text": True,
            "image": cfg.image_channels > 0,
            "vision": cfg.vision_dim > 0,
        }.items():
            if needed != (key in cond):
                raise Refused(
                    f"cond: {key!r} is {'missing' if needed else 'not read by this network'}; it has {', '.join(sorted(cond))}"
                )
        if any(n % p for n, p in zip(x.shape[1:4], cfg.patch)):
            raise Refused(
                f"x {list(x.shape)}: frames, height and width must be multiples of {cfg.patch}"
            )
        grid = [n // p for n, p in zip(x.shape[1:4], cfg.patch)]
        h = jnp.concatenate([x, cond["image"].astype(x.dtype)], -1) if cfg.image_channels else x
        h = self.patch_embed(
            rearrange(h.astype(self.dtype), "b (t p) (i q) (j r) c -> b (t i j) (p q r c)", **size)
        )
        h = constrain(h, "batch", "seq", None)
        t = t[:, None] if t.ndim == 1 else t
        if h.shape[1] % t.shape[1]:
            raise Refused(
                f"t {list(t.shape)}: expected [B] or [B M] with M dividing the {h.shape[1]} patches"
            )
        emb = self.time_embed(fourier(t.reshape(-1), cfg.time_dim, shift=0.0)).reshape(
            *t.shape, cfg.dim
        )
        time = rearrange(self.time_proj(nnx.silu(emb)), "b m (k d) -> b m k d", k=6)
        text = self._text(cond["text"], cond.get("mask"))
        negative = negative_prompt(cond)
        if negative is not None:
            negative = negative._replace(
                states=self._text(negative.states, cond.get("negative_mask")), mask=None
            )
        vision = self.vision(cond["vision"].astype(self.dtype)) if cfg.vision_dim else None
        rotary = positions(cfg.dim // cfg.heads, grid)
        body = lambda h, block: (block(h, time, text, vision, rotary, negative), None)
        h, _, features = scan_layers(body, h, self.blocks, cfg.depth, remat=cfg.remat, taps=taps)
        h = modulate(h, *runs(emb[:, :, None] + self.table[...], h), cfg.norm_eps)
        sizes = dict(zip("tij", grid)) | size
        out = rearrange(
            self.proj_out(h), "b (t i j) (p q r c) -> b (t p) (i q) (j r) c", **sizes
        ).astype(x.dtype)
        return (out, features) if taps else out

    def _text(self, text: Array, mask: Array | None) -> Array:
        """[B L E] -> [B L D], with zeros in the place of masked tokens."""
        text = text.astype(self.dtype)
        text = text if mask is None else jnp.where(mask[..., None], text, 0)
        return self.text_2(nnx.gelu(self.text_1(text), approximate=True))


def table(rows: int, dim: int, rngs: nnx.Rngs) -> nnx.Param:
    """What a layer adds to the projected time: [1 rows D] of N(0, 1 / D)."""
    return nnx.Param(
        nnx.with_partitioning(nnx.initializers.normal(dim**-0.5), (None, "index", "embed"))(
            rngs.params(), (1, rows, dim)
        )
    )


def runs(time: Array, x: Array) -> list[Array]:
    """time [B M K D] -> K arrays that broadcast against x [B N D]: [B 1 D] where M = 1, else [B N
    D], each of M constant on a run of N / M patches.
    """
    b, m, _, d = time.shape
    n = x.shape[1] // m
    spread = lambda c: (
        c if m == 1 else jnp.broadcast_to(c[:, :, None], (b, m, n, d)).reshape(b, m * n, d)
    )
    return [spread(time[:, :, k]) for k in range(time.shape[2])]


def positions(head_dim: int, grid: list[int]) -> tuple[Array, Array]:
    """Rotary factors (cosines, sines) of a grid of (frames, rows, columns): rows and columns take 2 floor(K / 6)
    channels each, frames the rest.
    """
    side = 2 * (head_dim // 6)
    return axial_waves([np.arange(n) for n in grid], (head_dim - 2 * side, side, side))
