"""Small networks on top of others: discriminator heads on feature taps, and a scalar function of
time.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from jaxdistill.core.types import Array, Refused
from jaxdistill.models.layers import ZEROS, dense, embedding, fourier, lookup, plain_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminator:
    """One head for each feature tap, conditioned on time and label; the logit is their mean."""

    features: int = 1  # number of taps
    dim: int = 64  # channels of a tap
    width: int = 64
    classes: int = 0  # 0: not conditioned on a label

    def __call__(self, rngs: nnx.Rngs) -> DiscriminatorModule:
        return DiscriminatorModule(self, rngs)

    @property
    def null_label(self) -> int | None:
        """The label that stands for none; None where the network takes no label."""
        return self.classes or None


class DiscriminatorModule(nnx.Module):
    def __init__(self, cfg: Discriminator, rngs: nnx.Rngs):
        self.cfg = cfg
        self.tokens = nnx.List(
            [dense(cfg.dim, cfg.width, ("embed", "mlp"), rngs=rngs) for _ in range(cfg.features)]
        )
        self.pooled = nnx.List(
            [dense(cfg.width, cfg.width, ("mlp", "embed"), rngs=rngs) for _ in range(cfg.features)]
        )
        self.logits = nnx.List(
            [dense(cfg.width, 1, ("embed", None), rngs=rngs) for _ in range(cfg.features)]
        )
        self.time = dense(32, cfg.width, (None, "mlp"), rngs=rngs)
        if cfg.classes:
            self.label_embed = embedding(
                cfg.classes + 1, cfg.width, rngs=rngs, names=("index", "mlp")
            )

    def __call__(self, features: tuple[Array, ...], t: Array, cond: Array | None = None) -> Array:
        """features: taps [B N dim]; t [B] -> logits [B], float32."""
        c = self.time(fourier(1000.0 * t, 32))
        if self.cfg.classes and cond is not None:
            c = c + lookup(self.label_embed, cond)
        total = 0.0
        for f, tokens, pooled, logit in zip(features, self.tokens, self.pooled, self.logits):
            h = nnx.silu(tokens(plain_norm(f.astype(jnp.float32), 1e-6)) + c[:, None]).mean(1)
            total = total + logit(nnx.silu(pooled(h)))[:, 0]
        return total / len(features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """One head for each feature tap, each with a logit of its own."""

    dims: tuple[int, ...] = (64,)  # channels of the taps
    width: int = 64

    def __call__(self, rngs: nnx.Rngs) -> HeadsModule:
        return HeadsModule(self, rngs)


class HeadsModule(nnx.Module):
    def __init__(self, cfg: Heads, rngs: nnx.Rngs):
        self.tokens = nnx.List(
            [dense(dim, cfg.width, ("embed", "mlp"), rngs=rngs) for dim in cfg.dims]
        )
        self.pooled = nnx.List(
            [dense(cfg.width, cfg.width, ("mlp", "embed"), rngs=rngs) for _ in cfg.dims]
        )
        self.logits = nnx.List([dense(cfg.width, 1, ("embed", None), rngs=rngs) for _ in cfg.dims])

    def __call__(self, features: tuple[Array, ...]) -> Array:
        """features: taps [B N dim] -> logits [B heads], float32. Raises Refused where there are more
        or fewer taps than heads.
        """
        if len(features) != len(self.logits):
            raise Refused(
                f"taps: {len(features)} of them for the {len(self.logits)} heads of model.dims"
            )
        pool = lambda f, tokens: nnx.silu(tokens(plain_norm(f.astype(jnp.float32), 1e-6))).mean(1)
        states = [
            nnx.silu(pooled(pool(f, tokens)))
            for f, tokens, pooled in zip(features, self.tokens, self.pooled)
        ]
        return jnp.concatenate([logit(h) for h, logit in zip(states, self.logits)], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeWeight:
    """A learnt scalar function of time: log-variance weights (EDM2, sCM). Zero at the start."""

    width: int = 64

    def __call__(self, rngs: nnx.Rngs) -> TimeWeightModule:
        return TimeWeightModule(self, rngs)


class TimeWeightModule(nnx.Module):
    def __init__(self, cfg: TimeWeight, rngs: nnx.Rngs):
        self.width = cfg.width
        self.out = dense(cfg.width, 1, (None, None), rngs=rngs, init=ZEROS)

    def __call__(self, t: Array) -> Array:
        """t [B] -> [B]."""
        return self.out(fourier(t, self.width, max_period=100.0))[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """A learned linear map without bias from a student's width to its teacher's, N(0, 0.02^2) at
    the start.
    """

    inputs: int = 64
    outputs: int = 64

    def __call__(self, rngs: nnx.Rngs) -> ProjectionModule:
        return ProjectionModule(self, rngs)


class ProjectionModule(nnx.Module):
    def __init__(self, cfg: Projection, rngs: nnx.Rngs):
        self.map = dense(
            cfg.inputs,
            cfg.outputs,
            ("embed", None),
            rngs=rngs,
            bias=False,
            init=nnx.initializers.normal(0.02),
        )

    def __call__(self, x: Array) -> Array:
        """x [... inputs] -> [... outputs]."""
        return self.map(x)
