"""Qwen-Image (arXiv:2508.02324), an MMDiT that makes and edits pictures from text.

Weights are those of diffusers' `QwenImageTransformer2DModel`.

Two streams of tokens, text and 2x2 patches of latents, each with its own weights in every block,
attend to each other in one softmax. Rows and columns have rotary positions counted from the middle
of the picture; the text continues from its edge, along the diagonal. Pictures to edit are more
patches behind those of x. Latents come from `models.autoencoders.vae_wan` with one frame.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
    key_mask,
    merge_heads,
    modulate,
    rms_norm,
    rotate_pairs,
    split_heads,
    stack,
    with_residual,
)

EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenImage:
    """Sizes. Defaults are a toy's.

    Qwen-Image and its editing networks, 20B: channels 16, heads 24, axes 16 56 56, depth 60,
    text_dim 3584. Qwen-Image-Edit-2511 has clean_pictures True besides.
    """

    patch: int = 2
    channels: int = 4
    heads: int = 2
    # channels of a head that turn with the picture's number, the row and the column
    axes: tuple[int, int, int] = (4, 6, 6)
    depth: Depth = 2
    text_dim: int = 32  # channels of cond["text"]
    clean_pictures: bool = False  # patches of cond["image"] are modulated by time 0
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    @property
    def dim(self) -> int:
        return self.heads * sum(self.axes)

    def __call__(self, rngs: nnx.Rngs) -> QwenImageModule:
        return QwenImageModule(self, rngs)

    @property
    def condition(self) -> Condition:
        return Condition(
            needs={"text": Float[Spec, f"B L {self.text_dim}"]},
            optional={
                "mask": Shaped[Spec, "B L"],
                "image": Float[Spec, f"B _ _ {self.channels}"],
            },
        )


class Stream(nnx.Module):
    """A block's weights for one kind of token."""

    def __init__(self, cfg: QwenImage, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, rngs=rngs, init=XAVIER, dtype=dtype)
        self.heads = cfg.heads
        self.modulation = make(d, 6 * d, ("embed", "mlp"))
        self.to_q = make(d, d, ("embed", "heads"))
        self.to_k = make(d, d, ("embed", "heads"))
        self.to_v = make(d, d, ("embed", "heads"))
        self.norm_q = rms_norm(sum(cfg.axes), rngs=rngs, eps=EPS, dtype=dtype)
        self.norm_k = rms_norm(sum(cfg.axes), rngs=rngs, eps=EPS, dtype=dtype)
        self.to_out = make(d, d, ("heads", "embed"))
        self.up = make(d, 4 * d, ("embed", "mlp"))
        self.down = make(4 * d, d, ("mlp", "embed"))

    def modulations(
        self, time: Float[Array, "B M D"], lengths: tuple[int, ...]
    ) -> list[Float[Array, "B _ D"]]:
        """Two times (shift, scale, gate) of the tokens; `time` is given after its SiLU.

        The tokens are M runs of `lengths`, each with a time of its own: the results are [B N D], or
        [B 1 D] where M is 1.
        """
        m = self.modulation(time)
        if len(lengths) > 1:
            runs = [
                jnp.repeat(m[:, i : i + 1], n, 1) for i, n in enumerate(lengths)
            ]
            m = jnp.concatenate(runs, 1)
        return jnp.split(m, 6, -1)

    def qkv(
        self,
        x: Float[Array, "B N D"],
        shift: Float[Array, "B _ D"],
        scale: Float[Array, "B _ D"],
        rotary: Rotary,
    ) -> tuple[
        Float[Array, "B N D"],
        tuple[
            Float[Array, "B N H K"],
            Float[Array, "B N H K"],
            Float[Array, "B N H K"],
        ],
    ]:
        """The modulated tokens, and their queries, keys and values."""
        h = modulate(x, shift, scale, EPS)
        q = split_heads(self.to_q(h), self.heads)
        k = split_heads(self.to_k(h), self.heads)
        v = split_heads(self.to_v(h), self.heads)
        q = rotate_pairs(self.norm_q(q), rotary)
        k = rotate_pairs(self.norm_k(k), rotary)
        return h, (q, k, v)

    def residual(
        self,
        x: Float[Array, "B N D"],
        out: Float[Array, "B N D"],
        gate1: Float[Array, "B _ D"],
        shift2: Float[Array, "B _ D"],
        scale2: Float[Array, "B _ D"],
        gate2: Float[Array, "B _ D"],
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N M"]]:
        """x plus the output of attention, then plus that of the MLP, and the MLP's neurons."""
        x = add_gated(x, out, gate1)
        h = nnx.gelu(self.up(modulate(x, shift2, scale2, EPS)), approximate=True)
        x = constrain(add_gated(x, self.down(h), gate2), "batch", "seq", None)
        return x, h


@flax.struct.dataclass
class Context:
    """What the blocks and the head read."""

    time: Float[Array, "B 1 D"]  # embedded, after the SiLU
    times: Float[Array, "B M D"]  # of each run of patches
    rotary: tuple[Rotary, Rotary]  # of (text, patches)
    mask: Shaped[Array, "B 1 1 _"] | None  # of text and patches, in this order
    lengths: tuple[int, ...] = flax.struct.field(pytree_node=False)  # of the runs
    own: int = flax.struct.field(pytree_node=False)  # patches of x
    rows: int = flax.struct.field(pytree_node=False)  # of patches of x
    dtype: Any = flax.struct.field(pytree_node=False)  # of x


class Block(nnx.Module):
    """Joint attention of the tokens of pictures and text."""

    def __init__(self, cfg: QwenImage, rngs: nnx.Rngs):
        self.image = Stream(cfg, rngs)
        self.text = Stream(cfg, rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        text: Float[Array, "B L D"],
        context: Context,
        residual: Callable[[Array], Array] | None = None,
    ) -> tuple[tuple[Float[Array, "B N D"], Float[Array, "B L D"]], Inside]:
        """((x, text), inside of x); the text has the first time.

        Args:
            x: patches of the pictures.
            text: tokens of the text.
            context: of `QwenImageModule.embed_inputs`.
            residual: added to the output of attention of x.
        """
        n = text.shape[1]
        times = context.times
        shift, scale, *rest = self.image.modulations(times, context.lengths)
        text_shift, text_scale, *text_rest = self.text.modulations(
            times[:, :1], (n,)
        )
        text_rotary, image_rotary = context.rotary
        h, of_image = self.image.qkv(x, shift, scale, image_rotary)
        _, of_text = self.text.qkv(text, text_shift, text_scale, text_rotary)
        q, k, v = (jnp.concatenate(pair, 1) for pair in zip(of_text, of_image))
        out = attention(q, k, v, mask=context.mask)
        attended = merge_heads(out[:, n:])
        branch = with_residual(self.image.to_out(attended), h, residual)
        x, neurons = self.image.residual(x, branch, *rest)
        text_branch = self.text.to_out(merge_heads(out[:, :n]))
        text, _ = self.text.residual(text, text_branch, *text_rest)
        return (x, text), Inside(attended, neurons)


class QwenImageModule(Stacked):
    def __init__(self, cfg: QwenImage, rngs: nnx.Rngs):
        d = cfg.dim
        pixels = cfg.patch**2 * cfg.channels
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        make = functools.partial(dense, rngs=rngs, init=XAVIER, dtype=self.dtype)
        self.patch_embed = make(pixels, d, (None, "embed"))
        self.time_embed = EmbeddingMLP(256, d, rngs)
        self.text_norm = rms_norm(
            cfg.text_dim, rngs=rngs, eps=EPS, dtype=self.dtype
        )
        self.text_embed = make(cfg.text_dim, d, (None, "embed"))
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.modulation_out = make(d, 2 * d, ("embed", "mlp"))
        self.proj_out = make(d, pixels, ("embed", None))

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        cond: dict,
        *,
        taps: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B H W C"] | tuple[Float[Array, "B H W C"], tuple]:
        """The raw prediction in x's dtype; with `taps`, (raw, features [B N D] of those blocks).

        Args:
            x: noisy latents; the features are those of their patches.
            t: times in 0..1000.
            cond: "text" [B L text_dim]; "mask" bool [B L] (optional), False on tokens that nobody
              attends to; "image" (optional): latents of a picture to edit, of any height and width,
              or a tuple of these.
            taps: indices of blocks.
            through: options of `Stacked.apply_blocks`; a state is (patches, text).

        Raises:
            Refused: where the condition is not this, or a picture does not fit the patches.
        """
        return self.through(*self.embed_inputs(x, t, cond), taps=taps, **through)

    def embed_inputs(
        self, x: Float[Array, "B H W C"], t: Num[Array, " B"], cond: dict
    ) -> tuple[tuple[Float[Array, "B N D"], Float[Array, "B L D"]], Context]:
        cfg = self.cfg
        check_condition(cond, cfg.condition, "QwenImage")
        pictures = self._pictures(x, cond)
        grids = [
            (p.shape[1] // cfg.patch, p.shape[2] // cfg.patch) for p in pictures
        ]
        own = grids[0][0] * grids[0][1]  # patches of x
        h = jnp.concatenate([self._cut(picture) for picture in pictures], 1)
        h = constrain(self.patch_embed(h), "batch", "seq", None)
        text = self.text_embed(self.text_norm(cond["text"].astype(self.dtype)))
        mask = self._mask(cond, h.shape[1])
        time = self._time(t)
        times = time
        lengths = (h.shape[1],)
        if cfg.clean_pictures and len(pictures) > 1:
            times = jnp.concatenate([time, self._time(jnp.zeros_like(t))], 1)
            lengths = (own, h.shape[1] - own)
        rotary = positions(cfg.axes, grids, text.shape[1])
        context = Context(
            time, times, rotary, mask, lengths, own, grids[0][0], x.dtype
        )
        return (h, text), context

    def apply_block(self, block, state, context, residual=None):
        return block(*state, context, residual)

    def head(
        self, state: tuple[Array, Array], context: Context
    ) -> Float[Array, "B H W C"]:
        h = self.feature(state, context)
        scale, shift = jnp.split(self.modulation_out(context.time), 2, -1)
        h = self.proj_out(modulate(h, shift, scale, EPS))
        return self._join(h, context.rows).astype(context.dtype)

    def feature(
        self, state: tuple[Array, Array], context: Context
    ) -> Float[Array, "B N D"]:
        """The patches of x."""
        patches, _ = state
        return patches[:, : context.own]

    def _pictures(self, x: Array, cond: dict) -> tuple[Array, ...]:
        """x and the pictures to edit."""
        p = self.cfg.patch
        given = cond.get("image", ())
        given = tuple(given) if isinstance(given, tuple | list) else (given,)
        pictures = (x, *given)
        if any(n % p for picture in pictures for n in picture.shape[1:3]):
            raise Refused(
                f"x {list(x.shape)}: height and width of it and of every cond['image'] "
                f"must be multiples of {p}"
            )
        return pictures

    def _cut(self, picture: Array) -> Array:
        """[B H W C] -> patches [B N p p C], by rows; their channels are (channel, row, column)."""
        p = self.cfg.patch
        return rearrange(
            picture.astype(self.dtype),
            "b (i p) (j q) c -> b (i j) (c p q)",
            p=p,
            q=p,
        )

    def _join(self, patches: Array, rows: int) -> Array:
        """The inverse of `_cut` for a picture of `rows` patches from top to bottom."""
        p = self.cfg.patch
        return rearrange(
            patches, "b (i j) (c p q) -> b (i p) (j q) c", i=rows, p=p, q=p
        )

    def _mask(self, cond: dict, patches: int) -> Array | None:
        """Attention mask [B 1 1 L + patches]: all patches are attended to."""
        if "mask" not in cond:
            return None
        mask = cond["mask"].astype(bool)
        return key_mask(jnp.pad(mask, ((0, 0), (0, patches)), constant_values=True))

    def _time(self, t: Array) -> Array:
        """Embedded times [B 1 D] after the SiLU."""
        embedded = self.time_embed(fourier(t, 256, shift=0.0))
        return nnx.silu(embedded).astype(self.dtype)[:, None]


def positions(
    axes: tuple[int, int, int], grids: list[tuple[int, int]], length: int
) -> tuple[Rotary, Rotary]:
    """Rotary factors of `length` text tokens, and of the patches of all pictures in order."""
    pictures = []
    for i, (rows, cols) in enumerate(grids):
        pictures.append(
            axial_rotary([np.array([i]), _centred(rows), _centred(cols)], axes)
        )
    edge = max(n // 2 for grid in grids for n in grid)
    diagonal = edge + np.arange(length)  # a token's position along all three axes
    text = [axial_rotary([diagonal], [d]) for d in axes]
    return _concatenated(text, -1), _concatenated(pictures, 1)


def _centred(n: int) -> np.ndarray:
    """n positions, counted from the middle."""
    return np.arange(n) - (n - n // 2)


def _concatenated(parts: list[Rotary], axis: int) -> Rotary:
    cosines, sines = zip(*parts)
    return jnp.concatenate(cosines, axis), jnp.concatenate(sines, axis)
