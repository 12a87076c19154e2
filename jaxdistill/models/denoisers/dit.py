"""DiT, the class-conditional diffusion transformer (arXiv:2212.09748), with diffusers'
`DiTTransformer2DModel` weights.

Diffusers repeats the time and label embedders in every block; released weights hold the same
numbers in each, so here they stand once. A second time `r` (average-velocity students) adds its own
embedder, fed t - r, zero at the start.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype, Natural, Remat
from jaxdistill.core.net import Net, make_net
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Params, Refused
from jaxdistill.models.layers import (
    XAVIER,
    ZEROS,
    attention,
    dense,
    embedding,
    fourier,
    lookup,
    plain_norm,
    scan_layers,
    sincos_2d,
    split_heads,
    stack,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiT:
    """Sizes. Defaults are those of the digits quickstart; DiT-XL/2 is size 32, patch 2, channels 4,
    dim 1152, depth 28, heads 16.
    """

    size: int = 8  # samples are [size, size, channels]
    patch: int = 2
    channels: int = 1
    out_channels: int = (
        0  # 0: as many as channels; twice as many where a variance is predicted (and ignored here)
    )
    dim: int = 64
    depth: Depth = 4
    heads: int = 4
    classes: Natural = 10  # label `classes` is the null condition
    second_time: bool = False  # takes r, for networks that predict an average velocity from r to t
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    def __post_init__(self):
        if self.dim % self.heads or self.dim % 4:
            raise Refused(
                f"dim={self.dim}: expected a multiple of heads={self.heads}, and of 4 for the positions"
            )

    def __call__(self, rngs: nnx.Rngs) -> DiTModule:
        return DiTModule(self, rngs)

    @property
    def null_label(self) -> int | None:
        """The label that stands for none; None where the network takes no label."""
        return self.classes


class TimeEmbed(nnx.Module):
    def __init__(self, dim: int, rngs: nnx.Rngs, out_init=nnx.initializers.normal(0.02)):
        self.linear_1 = dense(
            256, dim, (None, "embed"), rngs=rngs, init=nnx.initializers.normal(0.02)
        )
        self.linear_2 = dense(dim, dim, ("embed", "mlp"), rngs=rngs, init=out_init)

    def __call__(self, t: Array) -> Array:
        return self.linear_2(nnx.silu(self.linear_1(fourier(t, 256))))


class Block(nnx.Module):
    def __init__(self, cfg: DiT, rngs: nnx.Rngs):
        d = cfg.dim
        dtype = jnp.dtype(cfg.dtype)
        make = lambda i, o, names, init=XAVIER: dense(
            i, o, names, rngs=rngs, init=init, dtype=dtype
        )
        self.modulation = make(d, 6 * d, ("embed", "mlp"), ZEROS)
        self.to_q, self.to_k, self.to_v = (make(d, d, ("embed", "heads")) for _ in range(3))
        self.to_out = make(d, d, ("heads", "embed"))
        self.up = make(d, 4 * d, ("embed", "mlp"))
        self.down = make(4 * d, d, ("mlp", "embed"))
        self.heads = cfg.heads

    def __call__(self, x: Array, cond: Array) -> Array:
        """x [B N D]; cond [B D], after its SiLU."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            self.modulation(cond)[:, None], 6, -1
        )
        h = plain_norm(x, 1e-6) * (1 + scale1) + shift1
        q, k, v = (split_heads(f(h), self.heads) for f in (self.to_q, self.to_k, self.to_v))
        att = rearrange(attention(q, k, v), "b n h k -> b n (h k)")
        x = constrain(x + gate1 * self.to_out(att), "batch", "seq", None)
        h = plain_norm(x, 1e-5) * (1 + scale2) + shift2
        x = x + gate2 * self.down(nnx.gelu(self.up(h), approximate=True))
        return constrain(x, "batch", "seq", None)


class DiTModule(nnx.Module):
    def __init__(self, cfg: DiT, rngs: nnx.Rngs):
        d = cfg.dim
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.out_channels = cfg.out_channels or cfg.channels
        self.patch_embed = dense(
            cfg.patch**2 * cfg.channels,
            d,
            (None, "embed"),
            rngs=rngs,
            init=XAVIER,
            dtype=self.dtype,
        )
        self.time_embed = TimeEmbed(d, rngs)
        self.label_embed = embedding(cfg.classes + 1, d, rngs=rngs, names=("index", "embed"))
        if cfg.second_time:
            self.gap_embed = TimeEmbed(d, rngs, out_init=ZEROS)
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.modulation_out = dense(
            d, 2 * d, ("embed", "mlp"), rngs=rngs, init=ZEROS, dtype=self.dtype
        )
        self.proj_out = dense(
            d,
            cfg.patch**2 * self.out_channels,
            ("embed", None),
            rngs=rngs,
            init=ZEROS,
            dtype=self.dtype,
        )

    def __call__(
        self,
        x: Array,
        t: Array,
        cond: Array | None = None,
        *,
        r: Array | None = None,
        taps: tuple[int, ...] = (),
    ):
        """x [B H W C], t [B], cond int [B] (None: the null label) -> raw [B H W C] in x's dtype.

        With `taps`, (raw, states [B N D] after those blocks).
        """
        cfg = self.cfg
        patch = self.cfg.patch
        rows = x.shape[1] // patch
        cols = x.shape[2] // patch
        cond = jnp.full(x.shape[:1], cfg.classes) if cond is None else cond
        c = self.time_embed(t) + lookup(self.label_embed, cond)
        if r is not None:
            c = c + self.gap_embed(t - r)
        c = nnx.silu(c).astype(self.dtype)
        h = rearrange(x.astype(self.dtype), "b (i p) (j q) c -> b (i j) (p q c)", p=patch, q=patch)
        h = self.patch_embed(h) + sincos_2d(cfg.dim, rows, cols, cfg.size // patch).astype(
            self.dtype
        )
        h = constrain(h, "batch", "seq", None)
        h, _, features = scan_layers(
            lambda h, block: (block(h, c), None),
            h,
            self.blocks,
            cfg.depth,
            remat=cfg.remat,
            taps=taps,
        )
        shift, scale = jnp.split(self.modulation_out(c)[:, None], 2, -1)
        h = self.proj_out(plain_norm(h, 1e-6) * (1 + scale) + shift)
        out = rearrange(h, "b (i j) (p q c) -> b (i p) (j q) c", i=rows, p=patch, q=patch)[
            ..., : cfg.channels
        ].astype(x.dtype)
        return (out, features) if taps else out


def fold_gap(net: Net, params: Params, t: Array, r: Array) -> tuple[Net, Params]:
    """The network of one time that equals a `second_time` one at the times t, r (scalars, as the
    module is fed them): the gap's embedding moves into every row of the label table. Exact, and for
    these times only.
    """
    gap = nnx.merge(net.graphdef, params).gap_embed(jnp.reshape(jnp.float32(t - r), (1,)))[0]
    cfg = dataclasses.replace(net.config, second_time=False)
    labels = {"embedding": params["label_embed"]["embedding"] + gap}
    return make_net(cfg, wrap=net.wrap, config=cfg), {
        **{k: v for k, v in params.items() if k != "gap_embed"},
        "label_embed": labels,
    }
