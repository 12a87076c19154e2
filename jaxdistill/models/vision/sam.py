"""The image encoder of Segment Anything (SAM, arXiv:2304.02643): a ViT that attends within windows,
in a few layers everywhere.

Scores have a term of the key's row and one of its column relative to the query's (ViTDet,
arXiv:2203.16527; MViTv2, 2112.01526). Weights are those of transformers' `SamVisionModel` and of
the encoder in `SamModel`. Layers are not stacked, since their tables of relative positions differ
in length.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Remat
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, lookup
from jaxdistill.models.layers import (
    ACTIVATIONS,
    ZEROS,
    as_program,
    attention,
    check_taps,
    conv,
    dense,
    layer_norm,
)
from jaxdistill.models.vision.vit import NORMAL, check_sizes, cut_patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamVision:
    """Sizes of the encoder. Defaults are a toy's; ViT-B is size 1024, patch 16, dim 768, mlp 3072,
    heads 12, depth 12, window 14, whole (2, 5, 8, 11), neck 256; ViT-L dim 1024, mlp 4096, heads
    16, depth 24, whole (5, 11, 17, 23); ViT-H dim 1280, mlp 5120, heads 16, depth 32, whole (7, 15,
    23, 31).
    """

    size: int = 8  # images are [size, size, channels]
    patch: int = 2
    channels: int = 3
    dim: int = 32
    mlp: int = 64
    heads: int = 2
    depth: Depth = 2
    # patches on a side; the last windows of a row or column are padded with zeros, which are
    # attended to
    window: int = 3
    whole: tuple[int, ...] = (1,)  # layers without windows
    neck: int = 16  # channels of the output
    activation: str = "gelu"  # a key of layers.ACTIVATIONS
    norm_eps: float = 1e-6
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    def __call__(self, rngs: nnx.Rngs) -> SamVisionModule:
        return SamVisionModule(self, rngs)


class Layer(nnx.Module):
    """A pre-norm layer whose queries see a square of `span` patches a side."""

    def __init__(self, cfg: SamVision, span: int, rngs: nnx.Rngs):
        d = cfg.dim
        size = cfg.dim // cfg.heads
        dtype = jnp.dtype(cfg.dtype)
        named = nnx.with_partitioning
        make = lambda i, o, *names: dense(i, o, names, rngs=rngs, init=NORMAL, dtype=dtype)
        self.norm_attention, self.norm_mlp = (
            layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype) for _ in range(2)
        )
        self.to_qkv = make(d, 3 * d, "embed", "heads")
        self.to_out = make(d, d, "heads", "embed")
        self.rows, self.columns = (
            nnx.Param(named(ZEROS, ("index", None))(rngs.params(), (2 * span - 1, size)))
            for _ in range(2)
        )
        self.up = make(d, cfg.mlp, "embed", "mlp")
        self.down = make(cfg.mlp, d, "mlp", "embed")
        self.span = span
        self.heads = cfg.heads
        self.activation = lookup(ACTIVATIONS, cfg.activation, "activation")

    def __call__(self, x: Array) -> Array:
        """x [B H W D] -> [B H W D]."""
        (height, width), s = x.shape[1:3], self.span
        h = jnp.pad(self.norm_attention(x), ((0, 0), (0, -height % s), (0, -width % s), (0, 0)))
        down = h.shape[1] // s
        across = h.shape[2] // s
        h = self.attend(rearrange(h, "b (i p) (j q) d -> (b i j) p q d", i=down, j=across))
        x = (
            x
            + rearrange(h, "(b i j) p q d -> b (i p) (j q) d", i=down, j=across)[:, :height, :width]
        )
        return constrain(
            x + self.down(self.activation(self.up(self.norm_mlp(x)))), "batch", None, None, None
        )

    def attend(self, h: Array) -> Array:
        """h [N S S D] -> [N S S D]: softmax of q k / sqrt(K) + q rows[y - y'] + q columns[x - x'],
        where the key is at (y', x').

        Both terms are products of the query with what depends on the key's place alone, so that
        they are S + S more channels of query and key, and any program for attention serves.
        """
        s = self.span
        q, k, v = rearrange(
            self.to_qkv(h), "b y x (three n k) -> three b y x n k", three=3, n=self.heads
        )
        apart = jnp.arange(s)[:, None] - jnp.arange(s) + s - 1  # [query, key]
        rows, columns = (
            table[...].astype(h.dtype)[apart] for table in (self.rows, self.columns)
        )  # [S S K]
        terms = jnp.einsum("byxnk,ysk->byxns", q, rows), jnp.einsum("byxnk,xsk->byxns", q, columns)
        place = jnp.stack(jnp.meshgrid(jnp.arange(s), jnp.arange(s), indexing="ij"), -1)  # [S S 2]
        marks = jax.nn.one_hot(place, s, dtype=h.dtype).reshape(1, s, s, 1, 2 * s)
        q = jnp.concatenate([q * q.shape[-1] ** -0.5, *terms], -1)
        k = jnp.concatenate([k, jnp.broadcast_to(marks, (*k.shape[:-1], 2 * s))], -1)
        flat = lambda a: rearrange(a, "b y x n k -> b (y x) n k")
        return self.to_out(attention(flat(q), flat(k), flat(v), scale=1.0).reshape(h.shape))


class SamVisionModule(nnx.Module):
    def __init__(self, cfg: SamVision, rngs: nnx.Rngs):
        check_sizes(cfg)
        check_taps(cfg.whole, cfg.depth, "model.whole")
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        side = cfg.size // cfg.patch
        make = dict(rngs=rngs, dtype=self.dtype)
        self.patch_embed = dense(
            cfg.patch**2 * cfg.channels, cfg.dim, (None, "embed"), init=NORMAL, **make
        )
        self.positions = nnx.Param(
            nnx.with_partitioning(NORMAL, (None, "index", None, "embed"))(
                rngs.params(), (1, side, side, cfg.dim)
            )
        )
        self.layers = nnx.List(
            [Layer(cfg, side if i in cfg.whole else cfg.window, rngs) for i in range(cfg.depth)]
        )
        self.neck_1 = dense(cfg.dim, cfg.neck, ("embed", "mlp"), init=NORMAL, bias=False, **make)
        self.neck_2 = conv(
            cfg.neck, cfg.neck, (3, 3), (None, "mlp"), init=NORMAL, bias=False, **make
        )
        self.norm_1, self.norm_2 = (layer_norm(cfg.neck, eps=1e-6, **make) for _ in range(2))

    def __call__(self, x: Array, *, taps: tuple[int, ...] = ()):
        """x [B H W C] -> states behind the neck [B h w N]; with `taps`, (states, states [B h w,
        D] after those layers).

        Pixels are in units of standard deviations, as `objectives.pixels.Preprocess` gives them.
        Raises Refused on images of another size.
        """
        cfg = self.cfg
        check_taps(taps, cfg.depth)
        h = constrain(
            self.patch_embed(cut_patches(cfg, x)) + self.positions[...].astype(self.dtype),
            "batch",
            None,
            None,
            None,
        )
        after = []
        for layer in self.layers:
            h = as_program(layer, cfg.remat)(h)
            after.append(h)
        out = self.norm_2(self.neck_2(self.norm_1(self.neck_1(h))))
        return (
            (out, tuple(rearrange(after[i], "b y x d -> b (y x) d") for i in taps)) if taps else out
        )
