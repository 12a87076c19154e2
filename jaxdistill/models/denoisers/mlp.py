"""Networks for points in a plane: a denoiser for toy distillation, with feature taps and a second
time.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from jaxdistill.core.fields import Depth, Dtype
from jaxdistill.core.sharding import constrain
from jaxdistill.core.types import Array
from jaxdistill.models.layers import ZEROS, dense, embedding, lookup


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
    """A residual MLP denoiser for samples [B, dim]."""

    dim: int = 2
    width: int = 128
    depth: Depth = 3
    classes: int = 0  # 0: unconditional; else label `classes` is the null condition
    second_time: bool = False  # takes r, for networks that predict an average velocity from r to t
    dtype: Dtype = "float32"

    def __call__(self, rngs: nnx.Rngs) -> MLPModule:
        return MLPModule(self, rngs)

    @property
    def null_label(self) -> int | None:
        """The label that stands for none; None where the network takes no label."""
        return self.classes or None


def _waves(t: Array) -> Array:
    """[B, 8]: smooth features of a time in [0, pi/2], with derivatives that stay small."""
    args = t[:, None] * jnp.array([0.5, 1.0, 2.0, 4.0])
    return jnp.concatenate([jnp.sin(args), jnp.cos(args)], -1)


class MLPModule(nnx.Module):
    def __init__(self, cfg: MLP, rngs: nnx.Rngs):
        self.cfg = cfg
        w = cfg.width
        make = lambda i, o, names, **kw: dense(
            i, o, names, rngs=rngs, dtype=jnp.dtype(cfg.dtype), **kw
        )
        self.inp = make(cfg.dim + 8, w, (None, "embed"))
        if cfg.classes:
            self.label_embed = embedding(
                cfg.classes + 1, w, rngs=rngs, std=0.5, names=("index", "embed")
            )
        if cfg.second_time:
            self.gap_embed = make(8, w, (None, "embed"), init=ZEROS)
        self.up = nnx.List([make(w, 2 * w, ("embed", "mlp")) for _ in range(cfg.depth)])
        self.down = nnx.List([make(2 * w, w, ("mlp", "embed")) for _ in range(cfg.depth)])
        self.out = make(w, cfg.dim, ("embed", None))

    def __call__(
        self,
        x: Array,
        t: Array,
        cond: Array | None = None,
        *,
        r: Array | None = None,
        taps: tuple[int, ...] = (),
    ):
        """x [B dim], t [B], cond int [B] -> raw [B dim]; with `taps`, (raw, states [B 1 width]
        after those layers).
        """
        h = self.inp(jnp.concatenate([x, _waves(t)], -1))
        if self.cfg.classes:
            h = h + lookup(
                self.label_embed, jnp.full(x.shape[:1], self.cfg.classes) if cond is None else cond
            )
        if r is not None:
            h = h + self.gap_embed(_waves(t - r))
        features = []
        for up, down in zip(self.up, self.down):
            h = constrain(h + down(nnx.silu(up(h))), "batch", None)
            features.append(h[:, None])
        out = self.out(h).astype(x.dtype)
        return (out, tuple(features[i] for i in taps)) if taps else out
