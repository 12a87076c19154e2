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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Dataset):
    """x float32 [dim]; where `labelled`, cond int32 the mode it was drawn from or its class,
    null_cond the number of these.

    Weights, means and isotropic standard deviations are drawn from `seed`: means by repeated draws
    from the ball of `radius` at least `gap` standard deviations apart (as far as they fit), weights
    uneven within a factor of two.
    """

    batch_size: int = 256
    dim: Annotated[int, Range(1, 4096)] = 2
    modes: Annotated[int, Range(1, 4096)] = 6
    radius: Positive = 1.0
    std: Positive = 0.08  # mean standard deviation; each mode's is within 25 % of it
    gap: NonNegative = 5.0
    classes: Annotated[int, Range(0, 4096)] = (
        # a label for each sector of about modes / classes neighbours, counted around the origin; 0:
        # for each mode
        0
    )
    labelled: bool = True  # without labels, teacher and students are those of the whole mixture

    @functools.cached_property
    def components(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(weights [K], means [K, dim], stds [K]), float32."""
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
        return tuple(np.asarray(a, np.float32) for a in (weights / weights.sum(), means, stds))

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The label of each mode, int32 [modes]."""
        rank = (
            np.argsort(np.argsort(np.arctan2(*self.components[1].T[1::-1])))
            if self.classes
            else np.arange(self.modes)
        )
        return (rank * (self.classes or self.modes) // self.modes).astype(np.int32)

    @property
    def label_count(self):
        return (self.classes or self.modes) if self.labelled else None

    def conditions(self, mode: np.ndarray) -> dict[str, np.ndarray]:
        """The labels of samples that were drawn from these modes; nothing where there are none."""
        cond = self.labels[mode]
        return (
            {"cond": cond, "null_cond": np.full_like(cond, self.classes or self.modes)}
            if self.labelled
            else {}
        )

    def hidden(self, cond: Array) -> Array:
        """Which modes a condition excludes, bool [B modes]; the null condition none."""
        return (cond[:, None] != self.labels) & (cond[:, None] < (self.classes or self.modes))

    @property
    def teacher_law(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The law that `net` is the denoiser of."""
        return self.components

    def draw(self, rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
        """`n` samples from the law."""
        weights, means, stds = self.components
        mode = rng.choice(
            self.modes, n, p=weights / weights.sum(dtype=np.float64).astype(np.float64)
        )
        x = means[mode] + stds[mode, None] * rng.standard_normal((n, self.dim)).astype(np.float32)
        return {"x": x.astype(np.float32), **self.conditions(mode)}

    def batch(self, index, rows):
        return {
            k: v[rows]
            for k, v in self.draw(
                np.random.default_rng([self.seed, 1, index]), self.batch_size
            ).items()
        }

    def evaluation(self, n):
        return self.draw(np.random.default_rng([self.seed, 2]), n)

    def net(self, process: Process = Flow()) -> Net:
        """The exact denoiser as a network without weights: (x, t, cond) -> Pred. `cond` K, or None:
        unconditional.
        """
        return fixed_net(functools.partial(self.denoise, process), config=self)

    def denoise(self, process: Process, x: Array, t: Array, cond: Array | None = None, **_) -> Pred:
        """Exact E[x0 | x_t]: responsibilities times the modes' own posterior means (00-foundations,
        section 4).
        """
        weights, means, stds = self.teacher_law
        log_w, means, stds = (
            jnp.asarray(a, x.dtype) for a in (np.log(weights.astype(np.float64)), means, stds)
        )
        a, s, da, ds = process.coefs(expand(t, x))  # [B 1]
        spread = (a * stds) ** 2 + s**2  # [B K]
        offset = x[:, None] - a[..., None] * means  # [B K D]
        logits = log_w - 0.5 * jnp.sum(offset**2, -1) / spread - 0.5 * self.dim * jnp.log(spread)
        if cond is not None:
            logits = jnp.where(self.hidden(cond), -jnp.inf, logits)
        w = jax.nn.softmax(logits)[..., None]
        x0 = jnp.sum(w * (means + (a * stds**2 / spread)[..., None] * offset), 1)
        eps = jnp.sum(w * (s / spread)[..., None] * offset, 1)  # exact at sigma = 0 too
        v = da * x0 + ds * eps
        return Pred(x0, eps, v, v)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blurred(Mixture):
    """Its teacher is that of the data convolved with N(0, blur^2): exact, but slightly wrong."""

    blur: float = 0.08

    @property
    def teacher_law(self):
        weights, means, stds = self.components
        return weights, means, np.sqrt(stds**2 + np.float32(self.blur) ** 2)
