"""Gaussian mixtures with exact score, velocity and guidance: the teacher that needs no training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.fields import NonNegative, Positive, Range
from jaxdistill.core.net import Net, fixed_net
from jaxdistill.core.types import Array
from jaxdistill.data.base import Dataset
from jaxdistill.diffusion.process import Flow, Pred, Process, expand

# weights [K], means [K D], stds [K]
Components = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Dataset):
    """Points x float32 [B dim] from an isotropic Gaussian mixture.

    Where `labelled`, cond int32 [B] is the mode that the point was drawn from, or its class;
    null_cond is the number of labels.

    Weights, means and standard deviations are drawn from `seed`. Means are drawn from the ball of
    `radius` until they are at least `gap` standard deviations apart, as far as they fit. Weights
    differ within a factor of two.
    """

    batch_size: int = 256
    dim: Annotated[int, Range(1, 4096)] = 2
    modes: Annotated[int, Range(1, 4096)] = 6
    radius: Positive = 1.0
    # mean standard deviation; each mode's is within 25 % of it
    std: Positive = 0.08
    gap: NonNegative = 5.0
    # Number of labels: each stands for a sector of about modes / classes neighbours, counted around
    # the origin. 0: a label for each mode.
    classes: Annotated[int, Range(0, 4096)] = 0
    # without labels, teacher and students are those of the full mixture
    labelled: bool = True

    @functools.cached_property
    def components(self) -> Components:
        """(weights [K], means [K D], standard deviations [K]) of the modes, float32."""
        rng = np.random.default_rng([self.seed, self.dim, self.modes])
        means = []
        gap = self.gap * self.std
        while len(means) < self.modes:
            x = rng.standard_normal(self.dim)
            x *= self.radius * rng.uniform() ** (1 / self.dim) / np.linalg.norm(x)
            if all(np.linalg.norm(x - m) > gap for m in means):
                means.append(x)
            gap *= 0.998
        weights = rng.uniform(1, 2, self.modes)
        stds = self.std * rng.uniform(0.75, 1.25, self.modes)
        parts = (weights / weights.sum(), means, stds)
        return tuple(np.asarray(part, np.float32) for part in parts)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The label of each mode, int32 [K]."""
        if not self.classes:
            return np.arange(self.modes).astype(np.int32)
        _, means, _ = self.components
        angle = np.arctan2(*means.T[1::-1])
        rank = np.argsort(np.argsort(angle))
        return (rank * self.classes // self.modes).astype(np.int32)

    @property
    def label_count(self):
        return (self.classes or self.modes) if self.labelled else None

    def conditions(self, mode: np.ndarray) -> dict[str, np.ndarray]:
        """The labels of samples from these modes int [B]; empty where there are none."""
        if not self.labelled:
            return {}
        cond = self.labels[mode]
        return {
            "cond": cond,
            "null_cond": np.full_like(cond, self.classes or self.modes),
        }

    def hidden(self, cond: Array) -> Array:
        """Which modes the labels [B] exclude, bool [B K]; the null label excludes none."""
        other = cond[:, None] != self.labels
        return other & (cond[:, None] < (self.classes or self.modes))

    @property
    def teacher_components(self) -> Components:
        """The mixture whose exact denoiser the teacher is."""
        return self.components

    def drawn_modes(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """The modes of `n` samples, drawn by their weights: int [n]."""
        weights, _, _ = self.components
        # Normalised in float64, which `choice` asks for.
        shares = weights / weights.sum(dtype=np.float64).astype(np.float64)
        return rng.choice(self.modes, n, p=shares)

    def draw(self, rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
        """`n` samples with their labels."""
        _, means, stds = self.components
        mode = self.drawn_modes(rng, n)
        noise = rng.standard_normal((n, self.dim)).astype(np.float32)
        x = means[mode] + stds[mode, None] * noise
        return {"x": x.astype(np.float32), **self.conditions(mode)}

    def batch(self, index, samples):
        drawn = self.draw(
            np.random.default_rng([self.seed, 1, index]), self.batch_size
        )
        return {k: v[samples] for k, v in drawn.items()}

    def evaluation(self, n):
        return self.draw(np.random.default_rng([self.seed, 2]), n)

    def net(self, process: Process = Flow()) -> Net:
        """The exact denoiser, a network without weights: (x, t, cond) -> Pred.

        `cond` is int [B], or None for the full mixture.
        """
        return fixed_net(functools.partial(self.denoise, process), config=self)

    def denoise(
        self, process: Process, x: Array, t: Array, cond: Array | None = None, **_
    ) -> Pred:
        """Exact E[x0 | x_t]: the modes' posterior means, weighted by their responsibilities."""
        weights, means, stds = self.teacher_components
        log_w = jnp.asarray(np.log(weights.astype(np.float64)), x.dtype)
        means = jnp.asarray(means, x.dtype)
        stds = jnp.asarray(stds, x.dtype)
        a, s, da, ds = process.coefs(expand(t, x))  # [B 1]
        variance = (a * stds) ** 2 + s**2  # [B K]
        offset = x[:, None] - a[..., None] * means  # [B K D]
        square = jnp.sum(offset**2, -1)
        logits = (
            log_w - 0.5 * square / variance - 0.5 * self.dim * jnp.log(variance)
        )
        if cond is not None:
            logits = jnp.where(self.hidden(cond), -jnp.inf, logits)
        w = jax.nn.softmax(logits)[..., None]
        x0 = jnp.sum(w * (means + (a * stds**2 / variance)[..., None] * offset), 1)
        # exact at sigma = 0 too
        eps = jnp.sum(w * (s / variance)[..., None] * offset, 1)
        v = da * x0 + ds * eps
        return Pred(x0, eps, v, v)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blurred(Mixture):
    """A mixture whose teacher is that of the data convolved with N(0, blur^2), hence wrong."""

    blur: float = 0.08

    @property
    def teacher_components(self):
        weights, means, stds = self.components
        return weights, means, np.sqrt(stds**2 + np.float32(self.blur) ** 2)
