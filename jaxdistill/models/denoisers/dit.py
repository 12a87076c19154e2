"""DiT, the class-conditional diffusion transformer (arXiv:2212.09748), with diffusers' weights.

Diffusers' `DiTTransformer2DModel` repeats the time and label embedders in every block; released
weights are the same in each, so here there is one of them. A second time `r` (students that
predict an average velocity) adds an embedder of its own, which takes t - r and is zero at the
start.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int, Key, Num

from jaxdistill.core.fields import Depth, Dropout, Dtype, Natural, Remat
from jaxdistill.core.needs import Condition, Spec
from jaxdistill.core.net import Net, make_net
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array, Params, Refused
from jaxdistill.models.layers import (
    XAVIER,
    ZEROS,
    Inside,
    Stacked,
    attention,
    dense,
    drop,
    embedding,
    fourier,
    lookup,
    merge_heads,
    part_keys,
    patchify,
    plain_norm,
    sincos_2d,
    split_heads,
    stack,
    unpatchify,
    with_residual,
)

NORMAL = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiT:
    """Sizes. Defaults are those of the digits quickstart.

    DiT-XL/2 is size 32, patch 2, channels 4, dim 1152, depth 28, heads 16.
    """

    size: int = 8  # samples are [size, size, channels]
    patch: int = 2
    channels: int = 1
    # 0: as many as channels; twice as many where a variance is predicted, which is ignored here
    out_channels: int = 0
    dim: int = 64
    depth: Depth = 4
    heads: int = 4
    classes: Natural = 10  # label `classes` is the null condition
    # takes r, for networks that predict an average velocity from r to t
    second_time: bool = False
    # rate of dropout, behind attention and in the MLP; only losses that pass a key drop
    dropout: Dropout = 0.0
    dtype: Dtype = "float32"  # arithmetic; weights are float32
    remat: Remat = "none"

    def __post_init__(self):
        if self.dim % self.heads or self.dim % 4:
            raise Refused(
                f"dim={self.dim}: expected a multiple of heads={self.heads}, "
                "and of 4 for the positions"
            )

    def __call__(self, rngs: nnx.Rngs) -> DiTModule:
        return DiTModule(self, rngs)

    @property
    def null_label(self) -> int | None:
        """The label that stands for none; None where the network takes no label."""
        return self.classes

    @property
    def condition(self) -> Condition:
        return Condition(array=Int[Spec, " B"], required=False)


class TimeEmbed(nnx.Module):
    """Sinusoidal features of a time, linear, SiLU, linear."""

    def __init__(self, dim: int, rngs: nnx.Rngs, out_init=NORMAL):
        self.linear_1 = dense(256, dim, (None, "embed"), rngs=rngs, init=NORMAL)
        self.linear_2 = dense(dim, dim, ("embed", "mlp"), rngs=rngs, init=out_init)

    def __call__(self, t: Num[Array, " B"]) -> Float[Array, "B D"]:
        return self.linear_2(nnx.silu(self.linear_1(fourier(t, 256))))


class Block(nnx.Module):
    """Self-attention and an MLP, both modulated by the condition (adaLN-Zero)."""

    def __init__(self, cfg: DiT, rngs: nnx.Rngs):
        d = cfg.dim
        make = functools.partial(
            dense, rngs=rngs, init=XAVIER, dtype=jnp.dtype(cfg.dtype)
        )
        self.modulation = make(d, 6 * d, ("embed", "mlp"), init=ZEROS)
        self.to_q = make(d, d, ("embed", "heads"))
        self.to_k = make(d, d, ("embed", "heads"))
        self.to_v = make(d, d, ("embed", "heads"))
        self.to_out = make(d, d, ("heads", "embed"))
        self.up = make(d, 4 * d, ("embed", "mlp"))
        self.down = make(4 * d, d, ("mlp", "embed"))
        self.heads = cfg.heads
        self.dropout = cfg.dropout

    def __call__(
        self,
        x: Float[Array, "B N D"],
        cond: Float[Array, "B D"],
        residual: Callable[[Array], Array] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B N D"], Inside]:
        """`cond` is given after its SiLU; `key` is that of dropout."""
        key_attention, key_mlp = part_keys(key, 2)
        modulation = self.modulation(cond)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, -1)
        h = plain_norm(x, 1e-6) * (1 + scale1) + shift1
        q = split_heads(self.to_q(h), self.heads)
        k = split_heads(self.to_k(h), self.heads)
        v = split_heads(self.to_v(h), self.heads)
        attended = merge_heads(attention(q, k, v))
        out = drop(self.to_out(attended), self.dropout, key_attention)
        branch = with_residual(out, h, residual)
        x = constrain(x + gate1 * branch, "batch", "seq", None)
        h = plain_norm(x, 1e-5) * (1 + scale2) + shift2
        neurons = nnx.gelu(self.up(h), approximate=True)
        neurons = drop(neurons, self.dropout, key_mlp)
        x = constrain(x + gate2 * self.down(neurons), "batch", "seq", None)
        return x, Inside(attended, neurons)


@flax.struct.dataclass
class Context:
    """What the blocks and the head read."""

    cond: Float[Array, "B D"]  # time, label and gap, after the SiLU
    # of the input: rows of patches, and the type of the numbers
    rows: int = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)


class DiTModule(Stacked):
    def __init__(self, cfg: DiT, rngs: nnx.Rngs):
        d = cfg.dim
        self.cfg = cfg
        self.dtype = jnp.dtype(cfg.dtype)
        self.out_channels = cfg.out_channels or cfg.channels
        pixels = cfg.patch**2  # of a patch
        make = functools.partial(dense, rngs=rngs, dtype=self.dtype)
        self.patch_embed = make(
            pixels * cfg.channels, d, (None, "embed"), init=XAVIER
        )
        self.time_embed = TimeEmbed(d, rngs)
        self.label_embed = embedding(
            cfg.classes + 1, d, rngs=rngs, names=("index", "embed")
        )
        if cfg.second_time:
            self.gap_embed = TimeEmbed(d, rngs, out_init=ZEROS)
        self.blocks = stack(lambda r: Block(cfg, r), cfg.depth, rngs)
        self.modulation_out = make(d, 2 * d, ("embed", "mlp"), init=ZEROS)
        self.proj_out = make(
            d, pixels * self.out_channels, ("embed", None), init=ZEROS
        )

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        cond: Int[Array, " B"] | None = None,
        *,
        r: Num[Array, " B"] | None = None,
        taps: tuple[int, ...] = (),
        **through: Any,
    ) -> Float[Array, "B H W C"] | tuple[Float[Array, "B H W C"], tuple]:
        """The raw prediction in x's dtype; with `taps`, (raw, features [B N D] of those blocks).

        Args:
            x: noisy samples.
            t: their times.
            cond: labels; None: the null label.
            r: second time, of a `second_time` network.
            taps: indices of blocks.
            through: options of `Stacked.apply_blocks`.
        """
        state, context = self.embed_inputs(x, t, cond, r=r)
        return self.through(state, context, taps=taps, **through)

    def embed_inputs(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        cond: Int[Array, " B"] | None = None,
        *,
        r: Num[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B N D"], Context]:
        cfg = self.cfg
        rows = x.shape[1] // cfg.patch
        cols = x.shape[2] // cfg.patch
        c = self._embed(t, cond, r)
        positions = sincos_2d(cfg.dim, rows, cols, cfg.size // cfg.patch)
        h = self.patch_embed(patchify(x.astype(self.dtype), cfg.patch))
        h = constrain(h + positions.astype(self.dtype), "batch", "seq", None)
        return h, Context(c, rows, x.dtype)

    def apply_block(self, block, state, context, residual=None, key=None):
        return block(state, context.cond, residual, key)

    def head(
        self, state: Float[Array, "B N D"], context: Context
    ) -> Float[Array, "B H W C"]:
        cfg = self.cfg
        modulation = self.modulation_out(context.cond)[:, None]
        shift, scale = jnp.split(modulation, 2, -1)
        h = self.proj_out(plain_norm(state, 1e-6) * (1 + scale) + shift)
        out = unpatchify(h, context.rows, cfg.patch)[..., : cfg.channels]
        return out.astype(context.dtype)

    def _embed(self, t: Array, label: Array | None, r: Array | None) -> Array:
        """The condition of the blocks [B D] after its SiLU: time, label and gap t - r."""
        if label is None:
            label = jnp.full(t.shape, self.cfg.classes)
        c = self.time_embed(t) + lookup(self.label_embed, label)
        if r is not None:
            c = c + self.gap_embed(t - r)
        return nnx.silu(c).astype(self.dtype)


def fold_gap(
    net: Net, params: Params, t: float | Num[Array, ""], r: float | Num[Array, ""]
) -> tuple[Net, Params]:
    """The network of one time that equals a `second_time` one at the times t and r.

    The embedding of the gap t - r is added to every row of the label table: exact, for these times
    only. They are given as the module is: after a denoiser's scaling.
    """
    module = nnx.merge(net.graphdef, params)
    gap = module.gap_embed(jnp.reshape(jnp.float32(t - r), (1,)))[0]
    cfg = dataclasses.replace(net.config, second_time=False)
    labels = {"embedding": params["label_embed"]["embedding"] + gap}
    kept = {name: value for name, value in params.items() if name != "gap_embed"}
    return make_net(cfg, wrap=net.wrap, config=cfg), {**kept, "label_embed": labels}
