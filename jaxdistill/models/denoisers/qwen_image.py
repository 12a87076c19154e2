"""Qwen-Image (arXiv:2508.02324), a text-to-image and editing MMDiT, with the weights of diffusers'
`QwenImageTransformer2DModel`.

Two streams of tokens, text and 2x2 patches of latents, each with its own weights in every block,
attend to each other in one softmax. Rows and columns have rotary positions counted from the middle
of the picture; the text goes on from its edge, along the diagonal. Pictures to edit are further
patches behind those of x. Latents come from `models.autoencoders.vae_wan` with one frame.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.layers import (
    XAVIER,
    Mapper,
    attention,
    axial_waves,
    dense,
    fourier,
    modulate,
    rms_norm,
    rotate_pairs,
    scan_layers,
    split_heads,
    stack,
)

EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenImage:
    """Sizes. Defaults are a toy's. Qwen-Image and its editing networks, 20B: channels 16, heads 24,
    axes 16 56 56, depth 60, text_dim 3584; Qwen-Image-Edit-2511 also clean_pictures True.
    """

    patch: int = 2
    channels: int = 4
    heads: int = 2
    axes: tuple[int, int, int] = (
        4,
        6,
        6,
    )  # channels of a head that turn with the picture's number, the row and the column
    depth: Depth = 2
    text_dim: int = 32  # channels of cond["text"]
    clean_pictures: bool = False  # patches of cond["image"] are told that they are at time 0
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    @property
    def dim(self) -> int:
        return self.heads * sum(self.axes)

    def __call__(self, rngs: nnx.Rngs) -> QwenImageModule:
        return QwenImageModule(self, rngs)


class Stream(nnx.Module):
    """A block's weights for one kind of token."""

    def __init__(self, cfg: QwenImage, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = lambda i, o, names: dense(i, o, names, rngs=rngs, init=XAVIER, dtype=dtype)
        scale = lambda: rms_norm(sum(cfg.axes), rngs=rngs, eps=EPS, dtype=dtype)
        self.heads = cfg.heads
        self.modulation = make(d, 6 * d, ("embed", "mlp"))
        self.to_q, self.to_k, self.to_v = (make(d, d, ("embed", "heads")) for _ in range(3))
        self.norm_q = scale()
        self.norm_k = scale()
        self.to_out = make(d, d, ("heads", "embed"))
        self.up = make(d, 4 * d, ("embed", "mlp"))
        self.down = make(4 * d, d, ("mlp", "embed"))

    def modulations(self, time: Array, lengths: tuple[int, ...]) -> list[Array]:
        """time [B M D], after its SiLU, one for each of M runs of tokens -> six arrays [B 1 or N,
        D].
        """
        m = self.modulation(time)
        if len(lengths) > 1:
            m = jnp.concatenate(
                [jnp.repeat(m[:, i : i + 1], n, 1) for i, n in enumerate(lengths)], 1
            )
        return jnp.split(m, 6, -1)

    def qkv(
        self, x: Array, shift: Array, scale: Array, rotary: tuple[Array, Array]
    ) -> tuple[Array, Array, Array]:
        h = modulate(x, shift, scale, EPS)
        q, k, v = (split_heads(f(h), self.heads) for f in (self.to_q, self.to_k, self.to_v))
        return rotate_pairs(self.norm_q(q), rotary), rotate_pairs(self.norm_k(k), rotary), v

    def leave(
        self, x: Array, out: Array, gate1: Array, shift2: Array, scale2: Array, gate2: Array
    ) -> Array:
        """x [B N D] after what it attended to, out [B N H K], and after its MLP."""
        add = lambda x, h, gate: (x.astype(jnp.float32) + h * gate).astype(x.dtype)
        x = add(x, self.to_out(rearrange(out, "b n h k -> b n (h k)")), gate1)
        h = nnx.gelu(self.up(modulate(x, shift2, scale2, EPS)), approximate=True)
        return constrain(add(x, self.down(h), gate2), "batch", "seq", None)


class Block(nnx.Module):
    def __init__(self, cfg: QwenImage, rngs: nnx.Rngs):
        self.image = Stream(cfg, rngs)
        self.text = Stream(cfg, rngs)

    def __call__(
        self,
        x: Array,
        text: Array,
        time: Array,
        rotary: tuple,
        mask: Array | None,
        lengths: tuple[int, ...],
    ):
        """x [B N D], text [B L D], time [B M D], rotary factors of (text, x), mask [B 1 1 L + N] -> (x,
        text).
        """
        shift1, scale1, *rest = self.image.modulations(time, lengths)
        text_shift1, text_scale1, *text_rest = self.text.modulations(time[:, :1], text.shape[1:2])
        ours = self.image.qkv(x, shift1, scale1, rotary[1])
        theirs = self.text.qkv(text, text_shift1, text_scale1, rotary[0])
        q, k, v = (jnp.concatenate(pair, 1) for pair in zip(theirs, ours))
        out = attention(q, k, v, mask=mask)
        n = text.shape[1]
        return self.image.leave(x, out[:, n:], *rest), self.text.leave(text, out[:, :n], *text_rest)


class QwenImageModule(nnx.Module):
    def __init__(self, cfg: QwenImage, rngs: nnx.Rngs):
        d = cfg.dim
        pixels = cfg.patch**2 * cfg.channels
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        make = lambda i, o, names: dense(i, o, names, rngs=rngs, init=XAVIER, dtype=self.dtype)
        self.patch_embed = make(pixels, d, (None, "embed"))
        self.time_embed = Mapper(256, d, rngs)
        self.text_norm = rms_norm(cfg.text_dim, rngs=rngs, eps=EPS, dtype=self.dtype)
        self.text_embed = make(cfg.text_dim, d, (None, "embed"))
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.modulation_out = make(d, 2 * d, ("embed", "mlp"))
        self.proj_out = make(d, pixels, ("embed", None))

    def __call__(self, x: Array, t: Array, cond: dict, *, taps: tuple[int, ...] = ()):
        """x [B H W C] -> raw [B H W C] in x's dtype; with `taps`, (raw, states [B N D] of x's
        patches after those blocks).

        t [B], in 0..1000. cond: "text" [B L text_dim]; "mask" bool [B L] (optional), whose False
        tokens are attended to by nobody; "image" (optional), latents of a picture to edit [B H' W'
        C], or a tuple of these. Raises Refused where the text is missing or a picture does not fit
        the patches.
        """
        cfg = self.cfg
        p = self.cfg.patch
        if "text" not in cond:
            raise Refused(f"cond: 'text' is missing; it has {', '.join(sorted(cond))}")
        given = cond.get("image", ())
        pictures = (x, *(given if isinstance(given, tuple | list) else (given,)))
        if any(n % p for picture in pictures for n in picture.shape[1:3]):
            raise Refused(
                f"x {list(x.shape)}: height and width of it and of every cond['image'] must be multiples of {p}"
            )
        grids = [(picture.shape[1] // p, picture.shape[2] // p) for picture in pictures]
        cut = lambda picture: rearrange(
            picture.astype(self.dtype), "b (i p) (j q) c -> b (i j) (c p q)", p=p, q=p
        )
        h = constrain(
            self.patch_embed(jnp.concatenate([cut(picture) for picture in pictures], 1)),
            "batch",
            "seq",
            None,
        )
        text = self.text_embed(self.text_norm(cond["text"].astype(self.dtype)))
        mask = None
        if "mask" in cond:
            mask = jnp.pad(
                cond["mask"].astype(bool), ((0, 0), (0, h.shape[1])), constant_values=True
            )[:, None, None]
        embed = lambda t: nnx.silu(self.time_embed(fourier(t, 256, shift=0.0))).astype(self.dtype)[
            :, None
        ]
        time = embed(t)
        n = grids[0][0] * grids[0][1]
        lengths = (n, h.shape[1] - n) if cfg.clean_pictures and len(grids) > 1 else (h.shape[1],)
        times = jnp.concatenate([time, embed(jnp.zeros_like(t))], 1) if len(lengths) > 1 else time
        rotary = positions(cfg.axes, grids, text.shape[1])
        body = lambda both, block: (block(*both, times, rotary, mask, lengths), None)
        (h, _), _, features = scan_layers(
            body, (h, text), self.blocks, cfg.depth, remat=cfg.remat, taps=taps
        )
        scale, shift = jnp.split(self.modulation_out(time), 2, -1)
        h = self.proj_out(modulate(h[:, :n], shift, scale, EPS))
        out = rearrange(h, "b (i j) (c p q) -> b (i p) (j q) c", i=grids[0][0], p=p, q=p).astype(
            x.dtype
        )
        return (out, tuple(image[:, :n] for image, _ in features)) if taps else out


def positions(axes: tuple[int, int, int], grids: list[tuple[int, int]], length: int) -> tuple:
    """Rotary factors (cosines, sines) of (`length` text tokens, the patches of all pictures in order)."""
    middle = lambda n: np.arange(n) - (n - n // 2)
    pictures = [
        axial_waves([np.array([i]), middle(rows), middle(cols)], axes)
        for i, (rows, cols) in enumerate(grids)
    ]
    edge = max(n // 2 for grid in grids for n in grid)
    text = [
        axial_waves([edge + np.arange(length)], [d]) for d in axes
    ]  # the same position along all three
    join = lambda rotary, axis: tuple(jnp.concatenate(parts, axis) for parts in zip(*rotary))
    return join(text, -1), join(pictures, 1)
