"""The image encoder of Segment Anything (SAM, arXiv:2304.02643): a ViT with attention in windows.

A few layers attend to the complete picture. Scores have a term of the key's row and one of its
column relative to the query's (ViTDet, arXiv:2203.16527; MViTv2, 2112.01526). Weights are those of
transformers' `SamVisionModel` and of the encoder in `SamModel`. Layers are not stacked, since their
tables of relative positions differ in length.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

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
    """Sizes of the encoder. Defaults are a toy's.

    ViT-B is size 1024, patch 16, dim 768, mlp 3072, heads 12, depth 12, window 14, global_layers 2
    5 8 11, neck 256; ViT-L dim 1024, mlp 4096, heads 16, depth 24, global_layers 5 11 17 23; ViT-H
    dim 1280, mlp 5120, heads 16, depth 32, global_layers 7 15 23 31.
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
    # layers that attend to the complete picture
    global_layers: tuple[int, ...] = (1,)
    neck: int = 16  # channels of the output
    activation: str = "gelu"  # a key of layers.ACTIVATIONS
    norm_eps: float = 1e-6
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    renamed = {"whole": "global_layers"}

    def __call__(self, rngs: nnx.Rngs) -> SamVisionModule:
        return SamVisionModule(self, rngs)


class Layer(nnx.Module):
    """A pre-norm layer whose queries see a square of `span` patches a side."""

    def __init__(self, cfg: SamVision, span: int, rngs: nnx.Rngs):
        d = cfg.dim
        size = cfg.dim // cfg.heads
        dtype = jnp.dtype(cfg.dtype)
        table = nnx.with_partitioning(ZEROS, ("index", None))
        make = functools.partial(dense, rngs=rngs, init=NORMAL, dtype=dtype)
        self.norm_attention = layer_norm(
            d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype
        )
        self.norm_mlp = layer_norm(d, rngs=rngs, eps=cfg.norm_eps, dtype=dtype)
        self.to_qkv = make(d, 3 * d, ("embed", "heads"))
        self.to_out = make(d, d, ("heads", "embed"))
        self.rows = nnx.Param(table(rngs.params(), (2 * span - 1, size)))
        self.columns = nnx.Param(table(rngs.params(), (2 * span - 1, size)))
        self.up = make(d, cfg.mlp, ("embed", "mlp"))
        self.down = make(cfg.mlp, d, ("mlp", "embed"))
        self.span = span
        self.heads = cfg.heads
        self.activation = lookup(ACTIVATIONS, cfg.activation, "activation")

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        height, width = x.shape[1:3]
        s = self.span
        pads = ((0, 0), (0, -height % s), (0, -width % s), (0, 0))
        h = jnp.pad(self.norm_attention(x), pads)
        windows = dict(i=h.shape[1] // s, j=h.shape[2] // s)
        h = self.attend(rearrange(h, "b (i p) (j q) d -> (b i j) p q d", **windows))
        h = rearrange(h, "(b i j) p q d -> b (i p) (j q) d", **windows)
        x = x + h[:, :height, :width]
        h = self.down(self.activation(self.up(self.norm_mlp(x))))
        return constrain(x + h, "batch", None, None, None)

    def attend(self, h: Float[Array, "B S S D"]) -> Float[Array, "B S S D"]:
        """Attention within windows of S x S patches.

        The score of a query at (y, x) and a key at (y', x') is q k / sqrt(K) + q rows[y - y'] +
        q columns[x - x']. The last two terms are products of the query and of what depends on the
        key's position alone. They are therefore S + S more channels of query and key, and any
        program for attention computes them.
        """
        s = self.span
        cut = "b y x (three n k) -> three b y x n k"
        q, k, v = rearrange(self.to_qkv(h), cut, three=3, n=self.heads)
        apart = jnp.arange(s)[:, None] - jnp.arange(s) + s - 1  # [query, key]
        rows = self.rows[...].astype(h.dtype)[apart]  # [S S K]
        columns = self.columns[...].astype(h.dtype)[apart]
        row_terms = jnp.einsum("byxnk,ysk->byxns", q, rows)
        column_terms = jnp.einsum("byxnk,xsk->byxns", q, columns)
        indices = jnp.arange(s)
        # [S S 2]
        place = jnp.stack(jnp.meshgrid(indices, indices, indexing="ij"), -1)
        marks = jax.nn.one_hot(place, s, dtype=h.dtype)
        marks = marks.reshape(1, s, s, 1, 2 * s)
        marks = jnp.broadcast_to(marks, (*k.shape[:-1], 2 * s))
        scaled = q * q.shape[-1] ** -0.5
        q = jnp.concatenate([scaled, row_terms, column_terms], -1)
        k = jnp.concatenate([k, marks], -1)
        q, k, v = (rearrange(a, "b y x n k -> b (y x) n k") for a in (q, k, v))
        return self.to_out(attention(q, k, v, scale=1.0).reshape(h.shape))


class SamVisionModule(nnx.Module):
    def __init__(self, cfg: SamVision, rngs: nnx.Rngs):
        check_sizes(cfg)
        check_taps(cfg.global_layers, cfg.depth, "model.global_layers")
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        side = cfg.size // cfg.patch
        pixels = cfg.patch**2 * cfg.channels  # numbers in a patch
        make = functools.partial(dense, rngs=rngs, init=NORMAL, dtype=self.dtype)
        norm = functools.partial(layer_norm, rngs=rngs, eps=1e-6, dtype=self.dtype)
        self.patch_embed = make(pixels, cfg.dim, (None, "embed"))
        table = nnx.with_partitioning(NORMAL, (None, "index", None, "embed"))
        self.positions = nnx.Param(table(rngs.params(), (1, side, side, cfg.dim)))
        spans = [
            side if i in cfg.global_layers else cfg.window for i in range(cfg.depth)
        ]
        self.layers = nnx.List([Layer(cfg, span, rngs) for span in spans])
        self.neck_1 = make(cfg.dim, cfg.neck, ("embed", "mlp"), bias=False)
        self.neck_2 = conv(
            cfg.neck,
            cfg.neck,
            (3, 3),
            (None, "mlp"),
            rngs=rngs,
            init=NORMAL,
            bias=False,
            dtype=self.dtype,
        )
        self.norm_1 = norm(cfg.neck)
        self.norm_2 = norm(cfg.neck)

    def __call__(
        self, x: Float[Array, "B H W C"], *, taps: tuple[int, ...] = ()
    ) -> Float[Array, "B h w D"] | tuple[Float[Array, "B h w D"], tuple]:
        """The output of the neck; with `taps`, (this, features [B N D] of those layers).

        Pixels are in units of standard deviations, as `objectives.pixels.Preprocess` gives them.

        Raises:
            Refused: on images of another size, and on layers that there are not.
        """
        cfg = self.cfg
        check_taps(taps, cfg.depth)
        h = self.patch_embed(cut_patches(cfg, x)) + self.positions[...].astype(
            self.dtype
        )
        h = constrain(h, "batch", None, None, None)
        features = []
        for layer in self.layers:
            h = as_program(layer, cfg.remat)(h)
            features.append(h)
        out = self.norm_2(self.neck_2(self.norm_1(self.neck_1(h))))
        if not taps:
            return out
        return out, tuple(
            rearrange(features[i], "b y x d -> b (y x) d") for i in taps
        )
