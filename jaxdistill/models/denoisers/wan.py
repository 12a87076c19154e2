"""Wan, the video diffusion transformer (arXiv:2503.20314), with diffusers' weights.

They are those of `WanTransformer3DModel`. Video latents are cut into patches; each block attends
over all of them with rotary positions along time, height and width, then to the text, then applies
an MLP. One projection of the time serves all blocks; each adds a small table of its own to it.
Image-to-video networks also read latents beside x and, in Wan 2.1, the features of a CLIP image
encoder. Wan 2.2 14B is two such networks, one for high and one for low noise
(`interop.families.wan.experts`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Float, Num, Shaped

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.needs import Condition, Spec, check_condition
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.attention import (
    Negative,
    nasa,
    negative_needs,
    negative_prompt,
)
from jaxdistill.models.layers import (
    XAVIER,
    EmbeddingMLP,
    Inside,
    Rotary,
    Stacked,
    add_gated,
    attention,
    axial_rotary,
    dense,
    fourier,
    layer_norm,
    merge_heads,
    modulate,
    rms_norm,
    rotate_pairs,
    split_heads,
    stack,
    with_residual,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wan:
    """Sizes. Defaults are a toy's.

    Wan 2.1 T2V 1.3B: channels 16, dim 1536, mlp 8960, heads 12, depth 30, text_dim 4096. 14B, and
    each expert of 2.2 A14B: dim 5120, mlp 13824, heads 40, depth 40. I2V: image_channels 20, and in
    2.1 vision_dim 1280. 2.2 TI2V 5B: channels 48, dim 3072, mlp 14336, heads 24, depth 30.
    """

    patch: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns
    channels: int = 4  # of x and of the output
    # channels of cond["image"], concatenated to x (I2V: a mask of 4 channels, then latents)
    image_channels: int = 0
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

    @property
    def condition(self) -> Condition:
        extra = {
            "image": (
                self.image_channels,
                Float[Spec, f"B T H W {self.image_channels}"],
            ),
            "vision": (self.vision_dim, Float[Spec, f"B S {self.vision_dim}"]),
        }
        text = {"text": Float[Spec, f"B L {self.text_dim}"]}
        read = {name: need for name, (channels, need) in extra.items() if channels}
        return Condition(
            needs={**text, **read},
            optional={"mask": Shaped[Spec, "B L"], **negative_needs(self.text_dim)},
            unread=tuple(name for name in extra if name not in read),
        )


class Attention(nnx.Module):
    """Attention whose queries and keys pass an RMS norm over all heads together."""

    def __init__(self, cfg: Wan, rngs: nnx.Rngs, vision: bool = False):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, d, d, rngs=rngs, init=XAVIER, dtype=dtype)
        norm = functools.partial(
            rms_norm, d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype
        )
        self.heads = cfg.heads
        self.vision = vision
        self.to_q = make(("embed", "heads"))
        self.to_k = make(("embed", "heads"))
        self.to_v = make(("embed", "heads"))
        self.norm_q = norm()
        self.norm_k = norm()
        self.to_out = make(("heads", "embed"))
        if vision:
            self.to_k_vision = make(("embed", "heads"))
            self.to_v_vision = make(("embed", "heads"))
            self.norm_k_vision = norm()

    def attended(
        self,
        x: Float[Array, "B N D"],
        source: Float[Array, "B S D"],
        rotary: Rotary | None = None,
        vision: Float[Array, "B M D"] | None = None,
        negative: Negative | None = None,
    ) -> Float[Array, "B N D"]:
        """What x attends to in `source`, before the output projection, heads merged.

        Args:
            x: queries.
            source: keys and values.
            rotary: positions of x and `source`.
            vision: keys and values of a second softmax, whose result is added.
            negative: a prompt whose attention is subtracted.
        """
        q = split_heads(self.norm_q(self.to_q(x)), self.heads)
        k = split_heads(self.norm_k(self.to_k(source)), self.heads)
        v = split_heads(self.to_v(source), self.heads)
        if rotary is not None:
            q = rotate_pairs(q, rotary)
            k = rotate_pairs(k, rotary)
        if negative is None:
            out = attention(q, k, v)
        else:
            negative_k = split_heads(
                self.norm_k(self.to_k(negative.tokens)), self.heads
            )
            negative_v = split_heads(self.to_v(negative.tokens), self.heads)
            out = nasa(q, k, v, negative_k, negative_v, negative.alpha)
        if self.vision:
            k = split_heads(
                self.norm_k_vision(self.to_k_vision(vision)), self.heads
            )
            v = split_heads(self.to_v_vision(vision), self.heads)
            out = out + attention(q, k, v)
        return merge_heads(out)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        source: Float[Array, "B S D"],
        **options: Any,
    ) -> Float[Array, "B N D"]:
        """The projected output; options as of `attended`."""
        return self.to_out(self.attended(x, source, **options))


class Block(nnx.Module):
    def __init__(self, cfg: Wan, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        self.eps = cfg.norm_eps
        self.table = table(6, d, rngs)
        self.attn1 = Attention(cfg, rngs)
        self.attn2 = Attention(cfg, rngs, vision=cfg.vision_dim > 0)
        self.norm = layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.up = dense(
            d, cfg.mlp, ("embed", "mlp"), rngs=rngs, init=XAVIER, dtype=dtype
        )
        self.down = dense(
            cfg.mlp, d, ("mlp", "embed"), rngs=rngs, init=XAVIER, dtype=dtype
        )

    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Context,
        residual: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B N D"], Inside]:
        """x: patches."""
        times = context.time + self.table[...]
        shift1, scale1, gate1, shift2, scale2, gate2 = runs(times, x)
        h = modulate(x, shift1, scale1, self.eps)
        attended = self.attn1.attended(h, h, context.rotary)
        branch = with_residual(self.attn1.to_out(attended), h, residual)
        x = constrain(add_gated(x, branch, gate1), "batch", "seq", None)
        crossed = self.attn2(
            self.norm(x),
            context.text,
            vision=context.vision,
            negative=context.negative,
        )
        x = x + crossed
        h = self.up(modulate(x, shift2, scale2, self.eps))
        neurons = nnx.gelu(h, approximate=True)
        x = add_gated(x, self.down(neurons), gate2)
        return constrain(x, "batch", "seq", None), Inside(attended, neurons)


@flax.struct.dataclass
class Context:
    """What the blocks and the head read."""

    emb: Float[Array, "B M D"]  # embedded times of M runs of patches
    time: Float[Array, "B M 6 D"]  # `emb` projected, float32
    text: Float[Array, "B L D"]
    vision: Float[Array, "B S D"] | None
    rotary: Rotary
    negative: Negative | None
    # of the input: patches of frames, rows and columns, and the type of the numbers
    grid: tuple[int, ...] = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)


class Vision(nnx.Module):
    """From the features of an image encoder to the width of the blocks."""

    def __init__(self, cfg: Wan, rngs: nnx.Rngs):
        e = cfg.vision_dim
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, rngs=rngs, init=XAVIER, dtype=dtype)
        if cfg.vision_length:
            init = nnx.initializers.normal(0.02)
            named = nnx.with_partitioning(init, (None, "index", None))
            self.positions = nnx.Param(
                named(rngs.params(), (1, cfg.vision_length, e))
            )
        self.norm1 = layer_norm(e, rngs=rngs, eps=1e-5, dtype=dtype)
        self.norm2 = layer_norm(d, rngs=rngs, eps=1e-5, dtype=dtype)
        self.linear_1 = make(e, e, (None, "mlp"))
        self.linear_2 = make(e, d, ("mlp", "embed"))
        self.length = cfg.vision_length

    def __call__(self, x: Float[Array, "B S E"]) -> Float[Array, "B S D"]:
        if self.length:
            x = x + self.positions[...].astype(x.dtype)
        h = nnx.gelu(self.linear_1(self.norm1(x)), approximate=False)
        return self.norm2(self.linear_2(h))


class WanModule(Stacked):
    def __init__(self, cfg: Wan, rngs: nnx.Rngs):
        d = cfg.dim
        pixels = math.prod(cfg.patch)  # of a patch
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, rngs=rngs, init=XAVIER, dtype=self.dtype)
        self.patch_embed = make(
            pixels * (cfg.channels + cfg.image_channels), d, (None, "embed")
        )
        self.time_embed = EmbeddingMLP(cfg.time_dim, d, rngs)
        self.time_proj = dense(d, 6 * d, ("embed", "mlp"), rngs=rngs)
        self.text_1 = make(cfg.text_dim, d, (None, "mlp"))
        self.text_2 = make(d, d, ("mlp", "embed"))
        if cfg.vision_dim:
            self.vision = Vision(cfg, rngs)
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.table = table(2, d, rngs)
        self.proj_out = make(d, pixels * cfg.channels, ("embed", None))

    def __call__(
        self,
        x: Float[Array, "B T H W C"],
        t: Num[Array, " B"] | Num[Array, "B M"],
        cond: Mapping[str, Any],
        *,
        taps: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B T H W C"] | tuple[Float[Array, "B T H W C"], tuple]:
        """The raw prediction in x's dtype; with `taps`, (raw, features [B N D] of those blocks).

        Args:
            x: noisy video latents.
            t: times in 0..1000, one a sample, or one for each of M equal runs of patches: of each
              latent frame where M = T (Wan 2.2 5B keeps given frames at time 0), of each patch
              where M = N.
            cond: "text" [B L text_dim]; "mask" bool [B L] (optional), whose False tokens are set to
              zero but attended to, as in training (L = 512); "image" [B T H W image_channels];
              "vision" [B S vision_dim]; a negative prompt as in `negative_prompt`, masked as the
              text is.
            taps: indices of blocks.
            through: options of `Stacked.apply_blocks`.

        Raises:
            Refused: where the condition is not this, or x or t do not fit the patches.
        """
        return self.through(*self.embed_inputs(x, t, cond), taps=taps, **through)

    def embed_inputs(
        self,
        x: Float[Array, "B T H W C"],
        t: Num[Array, " B"] | Num[Array, "B M"],
        cond: Mapping[str, Any],
    ) -> tuple[Float[Array, "B N D"], Context]:
        cfg = self.cfg
        check_condition(cond, cfg.condition, "Wan")
        if any(n % p for n, p in zip(x.shape[1:4], cfg.patch)):
            raise Refused(
                f"x {list(x.shape)}: frames, height and width must be multiples of {cfg.patch}"
            )
        grid = tuple(n // p for n, p in zip(x.shape[1:4], cfg.patch))
        h = self._enter(x, cond)
        emb = self._embed(t, h.shape[1])
        time = rearrange(self.time_proj(nnx.silu(emb)), "b m (k d) -> b m k d", k=6)
        text = self._text(cond["text"], cond.get("mask"))
        negative = self._negative(cond)
        vision = (
            self.vision(cond["vision"].astype(self.dtype))
            if cfg.vision_dim
            else None
        )
        rotary = positions(cfg.dim // cfg.heads, grid)
        context = Context(emb, time, text, vision, rotary, negative, grid, x.dtype)
        return h, context

    def apply_block(self, block, state, context, residual=None):
        return block(state, context, residual)

    def head(
        self, state: Float[Array, "B N D"], context: Context
    ) -> Float[Array, "B T H W C"]:
        shift, scale = runs(context.emb[:, :, None] + self.table[...], state)
        h = self.proj_out(modulate(state, shift, scale, self.cfg.norm_eps))
        return self._join(h, context.grid).astype(context.dtype)

    def _enter(self, x: Array, cond: Mapping[str, Any]) -> Array:
        """Embedded patches [B N D] of x and of the latents beside it."""
        if self.cfg.image_channels:
            x = jnp.concatenate([x, cond["image"].astype(x.dtype)], -1)
        sizes = dict(zip("pqr", self.cfg.patch))
        cut = "b (t p) (i q) (j r) c -> b (t i j) (p q r c)"
        h = self.patch_embed(rearrange(x.astype(self.dtype), cut, **sizes))
        return constrain(h, "batch", "seq", None)

    def _join(self, patches: Array, grid: tuple[int, ...]) -> Array:
        """[B N p q r C] -> [B T H W C], N patches of a grid (frames, rows, columns)."""
        sizes = dict(zip("tij", grid)) | dict(zip("pqr", self.cfg.patch))
        return rearrange(
            patches, "b (t i j) (p q r c) -> b (t p) (i q) (j r) c", **sizes
        )

    def _embed(self, t: Array, patches: int) -> Array:
        """Embedded times [B M D] of runs of patches."""
        t = t[:, None] if t.ndim == 1 else t
        if patches % t.shape[1]:
            raise Refused(
                f"t {list(t.shape)}: expected [B] or [B M] with M dividing the {patches} patches"
            )
        features = fourier(t.reshape(-1), self.cfg.time_dim, shift=0.0)
        return self.time_embed(features).reshape(*t.shape, self.cfg.dim)

    def _text(self, text: Array, mask: Array | None) -> Array:
        """[B L E] -> [B L D], with zeros in the place of masked tokens."""
        text = text.astype(self.dtype)
        if mask is not None:
            text = jnp.where(mask[..., None], text, 0)
        return self.text_2(nnx.gelu(self.text_1(text), approximate=True))

    def _negative(self, cond: Mapping[str, Any]) -> Negative | None:
        """The embedded negative prompt, masked as the text is."""
        negative = negative_prompt(cond)
        if negative is None:
            return None
        tokens = self._text(negative.tokens, cond.get("negative_mask"))
        return negative._replace(tokens=tokens, mask=None)


def table(rows: int, dim: int, rngs: nnx.Rngs) -> nnx.Param:
    """What a layer adds to the projected time: [1 rows D] of N(0, 1 / D)."""
    init = nnx.initializers.normal(dim**-0.5)
    named = nnx.with_partitioning(init, (None, "index", "embed"))
    return nnx.Param(named(rngs.params(), (1, rows, dim)))


def runs(
    time: Float[Array, "B M K D"], x: Float[Array, "B N _"]
) -> list[Float[Array, "B _ D"]]:
    """The K parts of projected times of M runs of N / M patches, to broadcast against patches x.

    Each is [B 1 D] where M is 1, else [B N D], constant on each run.
    """
    batch, count, _, dim = time.shape
    length = x.shape[1] // count
    parts = [time[:, :, k] for k in range(time.shape[2])]
    if count == 1:
        return parts
    shape = (batch, count, length, dim)
    return [
        jnp.broadcast_to(part[:, :, None], shape).reshape(
            batch, count * length, dim
        )
        for part in parts
    ]


def positions(head_dim: int, grid: Sequence[int]) -> Rotary:
    """Rotary factors of the patches of a grid (frames, rows, columns).

    Rows and columns take 2 floor(K / 6) of the K channels of a head each, frames the rest.
    """
    side = 2 * (head_dim // 6)
    axes = [np.arange(n) for n in grid]
    return axial_rotary(axes, (head_dim - 2 * side, side, side))
