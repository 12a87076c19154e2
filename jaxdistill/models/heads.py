"""Small networks on top of others: discriminators on features, a function of time, a projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from jaxdistill.core.needs import Condition, Spec
from jaxdistill.core.types import Array, Refused
from jaxdistill.models.layers import (
    ZEROS,
    dense,
    embedding,
    fourier,
    lookup,
    plain_norm,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminator:
    """One head for each tapped layer, conditioned on time and label; the logit is their mean."""

    taps: int = 1  # number of tapped layers
    dim: int = 64  # channels of their features
    width: int = 64
    # label `classes` is the null condition; 0: not conditioned on a label
    classes: int = 0

    renamed = {"features": "taps"}

    def __call__(self, rngs: nnx.Rngs) -> DiscriminatorModule:
        return DiscriminatorModule(self, rngs)

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


class DiscriminatorModule(nnx.Module):
    def __init__(self, cfg: Discriminator, rngs: nnx.Rngs):
        self.cfg = cfg
        w = cfg.width

        def layers(i: int, o: int, names: tuple):
            return nnx.List(
                [dense(i, o, names, rngs=rngs) for _ in range(cfg.taps)]
            )

        self.tokens = layers(cfg.dim, w, ("embed", "mlp"))
        self.pooled = layers(w, w, ("mlp", "embed"))
        self.logits = layers(w, 1, ("embed", None))
        self.time = dense(32, w, (None, "mlp"), rngs=rngs)
        if cfg.classes:
            self.label_embed = embedding(
                cfg.classes + 1, w, rngs=rngs, names=("index", "mlp")
            )

    def __call__(
        self,
        features: Sequence[Float[Array, "B _ D"]],
        t: Float[Array, " B"],
        cond: Int[Array, " B"] | Mapping[str, Any] | None = None,
    ) -> Float[Array, " B"]:
        """Logits, in float32.

        Args:
            features: of each tapped layer.
            t: the time of the samples that they were computed from.
            cond: labels; ignored by a network without classes.
        """
        c = self.time(fourier(1000.0 * t, 32))
        if self.cfg.classes and cond is not None:
            c = c + lookup(self.label_embed, cond)
        total = 0.0
        for f, tokens, pooled, logit in zip(
            features, self.tokens, self.pooled, self.logits
        ):
            h = tokens(plain_norm(f.astype(jnp.float32), 1e-6)) + c[:, None]
            h = nnx.silu(h).mean(1)
            total = total + logit(nnx.silu(pooled(h)))[:, 0]
        return total / len(features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """One head for each tapped layer, each with a logit of its own."""

    dims: tuple[int, ...] = (64,)  # channels of the features of each tapped layer
    width: int = 64

    def __call__(self, rngs: nnx.Rngs) -> HeadsModule:
        return HeadsModule(self, rngs)


class HeadsModule(nnx.Module):
    def __init__(self, cfg: Heads, rngs: nnx.Rngs):
        w = cfg.width

        def layers(sizes: list[tuple[int, int]], names: tuple):
            return nnx.List([dense(i, o, names, rngs=rngs) for i, o in sizes])

        self.tokens = layers([(dim, w) for dim in cfg.dims], ("embed", "mlp"))
        self.pooled = layers([(w, w) for _ in cfg.dims], ("mlp", "embed"))
        self.logits = layers([(w, 1) for _ in cfg.dims], ("embed", None))

    def __call__(
        self, features: Sequence[Float[Array, "B _ _"]]
    ) -> Float[Array, "B heads"]:
        """Logits of the features of each tapped layer, in float32.

        Raises:
            Refused: where there are more or fewer layers than heads.
        """
        if len(features) != len(self.logits):
            raise Refused(
                f"taps: {len(features)} of them for the {len(self.logits)} heads of model.dims"
            )
        logits = []
        for f, tokens, pooled, logit in zip(
            features, self.tokens, self.pooled, self.logits
        ):
            h = nnx.silu(tokens(plain_norm(f.astype(jnp.float32), 1e-6))).mean(1)
            logits.append(logit(nnx.silu(pooled(h))))
        return jnp.concatenate(logits, -1)


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

    def __call__(self, t: Float[Array, " B"]) -> Float[Array, " B"]:
        return self.out(fourier(t, self.width, max_period=100.0))[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """A learnt linear map without bias from a student's width to its teacher's.

    It is N(0, 0.02^2) at the start.
    """

    inputs: int = 64
    outputs: int = 64

    def __call__(self, rngs: nnx.Rngs) -> ProjectionModule:
        return ProjectionModule(self, rngs)


class ProjectionModule(nnx.Module):
    def __init__(self, cfg: Projection, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        names = ("embed", None)
        self.map = dense(
            cfg.inputs, cfg.outputs, names, rngs=rngs, bias=False, init=init
        )

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        return self.map(x)
