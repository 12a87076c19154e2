"""A denoiser of points, for toy distillation, with taps and a second time."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from jaxdistill.core.fields import Depth, Dtype
from jaxdistill.core.needs import Condition, Spec
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
    # takes r, for networks that predict an average velocity from r to t
    second_time: bool = False
    dtype: Dtype = "float32"

    def __call__(self, rngs: nnx.Rngs) -> MLPModule:
        return MLPModule(self, rngs)

    @property
    def null_label(self) -> int | None:
        """The label that stands for none; None where the network takes no label."""
        return self.classes or None

    @property
    def condition(self) -> Condition | None:
        return (
            Condition(array=Int[Spec, " B"], required=False)
            if self.classes
            else None
        )


def _time_features(t: Array) -> Array:
    """[B, 8] of a time [B] in [0, pi/2]: smooth, with small derivatives."""
    angles = t[:, None] * jnp.array([0.5, 1.0, 2.0, 4.0])
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class MLPModule(nnx.Module):
    def __init__(self, cfg: MLP, rngs: nnx.Rngs):
        self.cfg = cfg
        w = cfg.width
        make = functools.partial(dense, rngs=rngs, dtype=jnp.dtype(cfg.dtype))
        self.inp = make(cfg.dim + 8, w, (None, "embed"))
        if cfg.classes:
            names = ("index", "embed")
            self.label_embed = embedding(
                cfg.classes + 1, w, rngs=rngs, std=0.5, names=names
            )
        if cfg.second_time:
            self.gap_embed = make(8, w, (None, "embed"), init=ZEROS)
        self.up = nnx.List(
            [make(w, 2 * w, ("embed", "mlp")) for _ in range(cfg.depth)]
        )
        self.down = nnx.List(
            [make(2 * w, w, ("mlp", "embed")) for _ in range(cfg.depth)]
        )
        self.out = make(w, cfg.dim, ("embed", None))

    def __call__(
        self,
        x: Float[Array, "B D"],
        t: Float[Array, " B"],
        cond: Int[Array, " B"] | None = None,
        *,
        r: Float[Array, " B"] | None = None,
        taps: tuple[int, ...] = (),
    ) -> Float[Array, "B D"] | tuple[Float[Array, "B D"], tuple]:
        """The raw prediction; with `taps`, (raw, features [B 1 width] of those layers).

        Args:
            x: noisy samples.
            t: their times.
            cond: labels; None: the null label. A network without classes ignores them.
            r: second time, of a `second_time` network.
            taps: indices of layers.
        """
        h = self.inp(jnp.concatenate([x, _time_features(t)], -1))
        if self.cfg.classes:
            label = (
                jnp.full(x.shape[:1], self.cfg.classes) if cond is None else cond
            )
            h = h + lookup(self.label_embed, label)
        if r is not None:
            h = h + self.gap_embed(_time_features(t - r))
        features = []
        for up, down in zip(self.up, self.down):
            h = constrain(h + down(nnx.silu(up(h))), "batch", None)
            features.append(h[:, None])
        out = self.out(h).astype(x.dtype)
        return (out, tuple(features[i] for i in taps)) if taps else out
