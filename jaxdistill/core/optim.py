"""Optimisers, learning-rate schedules and weight averages, one dataclass each, built from config."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.core.types import Array, Refused

SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One role's optimiser. Steps are the role's own updates, not engine steps."""

    algorithm: str = "adamw"  # adamw | radam | sgd | any optax alias that takes a learning rate
    lr: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only: norms, biases and embeddings of one index are spared
    clip: float = 1.0  # global norm; 0 switches clipping off
    clip_value: float = 0.0  # largest entry, before the norm is clipped; 0 switches it off
    schedule: str = "constant"  # constant | cosine | linear: the shape after warm-up
    warmup: int = 0  # updates of linear warm-up, from lr / warmup
    decay_steps: int = 0  # updates after which cosine and linear reach `final`; 0: the run's length
    final: float = 0.0  # fraction of lr at the end of cosine and linear

    def make(self, steps: int, *, bank: bool = False) -> optax.GradientTransformation:
        """The optax transformation for a role that is updated `steps` times: without moments where it never is.

        Members of a `bank` are clipped each by its own norm. Raises Refused on unknown names.
        """
        if steps == 0:
            return optax.identity()
        clip = clip_by_member_norm if bank else optax.clip_by_global_norm
        chain = [optax.clip(self.clip_value)] * bool(self.clip_value) + [clip(self.clip)] * bool(self.clip)
        lr = self.learning_rate(steps)
        if self.algorithm in ("adamw", "adam"):
            core = optax.adamw(lr, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, mask=decayed)
        elif self.algorithm == "radam":
            core = optax.radam(lr, b1=self.b1, b2=self.b2, eps=self.eps)
        elif hasattr(optax, self.algorithm):
            core = getattr(optax, self.algorithm)(lr)
        else:
            raise Refused(f"optimizer.algorithm={self.algorithm!r}: expected adamw, radam, sgd or another optax optimiser")
        return optax.chain(*chain, core)

    def learning_rate(self, steps: int) -> optax.Schedule:
        end = max((self.decay_steps or steps) - self.warmup, 1)
        if self.schedule == "constant":
            main = optax.constant_schedule(self.lr)
        elif self.schedule == "cosine":
            main = optax.cosine_decay_schedule(self.lr, end, self.final)
        elif self.schedule == "linear":
            main = optax.linear_schedule(self.lr, self.lr * self.final, end)
        else:
            raise Refused(f"optimizer.schedule={self.schedule!r}: expected one of {', '.join(SCHEDULES)}")
        if not self.warmup:
            return main
        rise = optax.linear_schedule(self.lr / self.warmup, self.lr, self.warmup - 1)
        return optax.join_schedules([rise, main], [self.warmup])


def clip_by_member_norm(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` for weights stacked on a leading axis: each member by the norm of its own."""

    def update(updates, state, params=None):
        squares = [jnp.sum(g.reshape(g.shape[0], -1) ** 2, axis=1) for g in jax.tree.leaves(updates)]
        norm = jnp.sqrt(sum(squares))
        scale = jnp.where(norm < limit, 1.0, limit / jnp.maximum(norm, limit))
        return jax.tree.map(lambda g: g * scale.reshape(-1, *[1] * (g.ndim - 1)), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decayed(params):
    """Which weights decay: everything but biases, norm scales and gains, whatever axes are stacked before them."""
    name = lambda path: str(getattr(path[-1], "key", path[-1]))
    return jax.tree_util.tree_map_with_path(lambda path, _: name(path) not in ("bias", "scale", "gain"), params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
    """Exponential average with constant decay; `k` is the number of updates so far, from 1.

    With `warmup` the decay is min(decay, (1 + k) / (10 + k)), so that early averages forget the initial weights.
    """

    rate: float = 0.999
    warmup: bool = True

    def decay(self, k: Array) -> Array:
        """Weight of the old average at update `k`."""
        k = jnp.asarray(k, jnp.float32)
        return jnp.minimum(self.rate, (1 + k) / (10 + k)) if self.warmup else jnp.float32(self.rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyEma:
    """Diffusers' schedule: the first update copies the weights, later ones decay by min(rate, k / (9 + k))."""

    rate: float = 0.9999

    def decay(self, k: Array) -> Array:
        k = jnp.asarray(k, jnp.float32)
        return jnp.where(k <= 1, 0.0, jnp.minimum(self.rate, k / (9 + k)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerEma:
    """Power-function average (EDM2, arXiv:2312.02696): weights proportional to t^gamma; decay (1 - 1/k)^(gamma + 1)."""

    sigma_rel: float = 0.05  # relative width of the averaging window

    def decay(self, k: Array) -> Array:
        return (1 - 1 / jnp.asarray(k, jnp.float32)) ** (power_gamma(self.sigma_rel) + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLifeEma:
    """Half-life in samples seen, with ramp-up (EDM): half-life min(half_life, ramp * samples)."""

    half_life: float = 500_000.0  # samples
    batch: int = 256  # samples per update
    ramp: float = 0.05

    def decay(self, k: Array) -> Array:
        half = jnp.minimum(self.half_life, self.ramp * jnp.asarray(k, jnp.float32) * self.batch)
        return 0.5 ** (self.batch / half)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RampEma:
    """Decay that climbs from 0 to `rate` by d <- d + (1 - d)(rate - d) / 2 at each update (TwinFlow, arXiv:2512.05150).

    Raises Refused for a rate outside [0, 1).
    """

    rate: float = 0.99

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise Refused(f"ema.rate={self.rate}: expected 0 <= rate < 1")

    def decay(self, k: Array) -> Array:
        climb = ramp(self.rate)
        return jnp.asarray(climb)[jnp.minimum(k, len(climb) - 1)]


@functools.cache
def ramp(rate: float) -> np.ndarray:
    """The decays of `RampEma` from update 0 until 0.1 % of 1 - rate is left, then `rate` itself; float32."""
    decays = [0.0]
    while rate - decays[-1] > 1e-3 * (1 - rate):
        decays.append(decays[-1] + (1 - decays[-1]) * (rate - decays[-1]) / 2)
    return np.asarray([*decays, rate], np.float32)


@functools.cache
def power_gamma(sigma_rel: float) -> float:
    """The exponent whose profile has relative width `sigma_rel` (EDM2, appendix C): .05 -> 16.97, .10 -> 6.94."""
    t = sigma_rel**-2
    return float(max(r.real for r in np.roots([1, 7, 16 - t, 12 - t]) if abs(r.imag) < 1e-9))
