"""Optimisers, learning-rate schedules and weight averages, one dataclass each, built from config."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.core.net import decays, path_name
from jaxdistill.core.types import Array, Params, Refused, lookup

SCHEDULES = ("constant", "cosine", "linear")
LARGEST = float(np.finfo(np.float32).max)
LARGEST_INT = 2**31 - 1  # updates are counted in int32
SMALLEST = float(np.finfo(np.float32).tiny)  # what is below becomes 0 on most chips


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An optax optimiser, and which of its parameters our fields are."""

    make: Callable[..., optax.GradientTransformation]
    takes: Mapping[str, str]  # our field -> its parameter; a field that is not named does not act
    # own: `weight_decay` and `mask` are parameters | decoupled: joins the update, times lr |
    # gradient: joins the gradient
    decay: str


MOMENTS = {"b1": "b1", "b2": "b2", "eps": "eps"}

# All elementwise: one that has a norm over a whole weight (LAMB, LARS) would take it over all
# layers and members stacked in it.
ALGORITHMS = {
    "adamw": Algorithm(optax.adamw, MOMENTS, "own"),
    "adam": Algorithm(optax.adamw, MOMENTS, "own"),
    "nadamw": Algorithm(optax.nadamw, MOMENTS, "own"),
    "nadam": Algorithm(optax.nadamw, MOMENTS, "own"),
    "adamaxw": Algorithm(optax.adamaxw, MOMENTS, "own"),
    "adamax": Algorithm(optax.adamaxw, MOMENTS, "own"),
    "lion": Algorithm(optax.lion, {"b1": "b1", "b2": "b2"}, "own"),
    "radam": Algorithm(optax.radam, MOMENTS, "decoupled"),
    "adabelief": Algorithm(optax.adabelief, MOMENTS, "decoupled"),
    "amsgrad": Algorithm(optax.amsgrad, MOMENTS, "decoupled"),
    "rmsprop": Algorithm(optax.rmsprop, {"b2": "decay", "eps": "eps"}, "decoupled"),
    "adagrad": Algorithm(optax.adagrad, {"eps": "eps"}, "decoupled"),
    "sgd": Algorithm(optax.sgd, {"momentum": "momentum"}, "gradient"),
}


def check_range(
    name: str, value: Any, expected: str, holds: Callable[[Any], bool], kind: type = numbers.Real
) -> None:
    """Raises Refused unless `value` is a `kind` (numbers.Real | numbers.Integral) that float32
    holds, and `holds` says so.
    """
    most = LARGEST_INT if kind is numbers.Integral else LARGEST
    sound = isinstance(value, kind) and not isinstance(value, bool) and -most <= value <= most
    if not sound or not holds(value):
        raise Refused(f"{name}={value!r}: expected {expected}")
    if not holds(in_float32(value)):
        raise Refused(f"{name}={value!r}: is {in_float32(value):g} in float32, expected {expected}")


def in_float32(value: float) -> float:
    """`value` as arithmetic in float32 sees it: rounded, and 0 where it is below the smallest
    normal number.
    """
    rounded = float(np.float32(value))
    return rounded if abs(rounded) >= SMALLEST else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One role's optimiser. Steps are the role's own updates, not engine steps.

    What is shown here is what acts, not optax's defaults (lion's paper: b2=.99; rmsprop's b2 is the
    decay of its squares). Raises Refused for a value out of range, and for a field that is set
    though it does not act on the algorithm or schedule.
    """

    # a name of ALGORITHMS; adam, nadam and adamax are the same with and without a final w
    algorithm: str = "adamw"
    lr: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0  # of sgd
    # on matrices only (core/net.py `decays`). Decoupled, times lr; sgd's joins the gradient before
    # momentum
    weight_decay: float = 0.0
    clip: float = 1.0  # global norm; 0 switches clipping off
    clip_value: float = 0.0  # largest entry, before the norm is clipped; 0 switches it off
    schedule: str = "constant"  # constant | cosine | linear: the shape after warm-up
    warmup: int = 0  # updates of linear warm-up, from lr / warmup
    decay_steps: int = 0  # updates after which cosine and linear reach `final`; 0: the run's length
    final: float = 0.0  # fraction of lr at the end of cosine and linear

    def __post_init__(self):
        check = lambda name, *rule, **kind: check_range(
            f"optimizer.{name}", getattr(self, name), *rule, **kind
        )
        for name in ("lr", "eps"):
            check(name, "a number above 0", lambda v: v > 0)
        for name in ("b1", "b2", "momentum"):
            check(name, "0 <= number < 1", lambda v: 0 <= v < 1)
        for name in ("weight_decay", "clip", "clip_value"):
            check(name, "0 or a number above it", lambda v: v >= 0)
        check("final", "a fraction from 0 to 1", lambda v: 0 <= v <= 1)
        for name in ("warmup", "decay_steps"):
            check(name, "0 or a positive integer", lambda v: v >= 0, kind=numbers.Integral)
        takes = lookup(ALGORITHMS, self._name("algorithm"), "optimizer.algorithm").takes
        self._acts(
            "algorithm",
            ("b1", "b2", "eps", "momentum"),
            lambda name: [a for a in ALGORITHMS if name in ALGORITHMS[a].takes],
            takes,
        )
        lookup(dict.fromkeys(SCHEDULES), self._name("schedule"), "optimizer.schedule")
        shaped = () if self.schedule == "constant" else ("decay_steps", "final")
        self._acts("schedule", ("decay_steps", "final"), lambda name: ["cosine", "linear"], shaped)
        if 0 < self.decay_steps <= self.warmup:
            raise Refused(
                f"optimizer.decay_steps={self.decay_steps}: expected 0, or more than optimizer.warmup={self.warmup}"
            )

    def _name(self, field: str) -> str:
        value = getattr(self, field)
        if not isinstance(value, str):
            raise Refused(f"optimizer.{field}={value!r}: expected a name")
        return value

    def _acts(
        self, choice: str, names: tuple[str, ...], where: Callable[[str], list[str]], acting: Any
    ) -> None:
        """Raises Refused where one of the fields `names` is set and not among `acting`; `where`
        lists the choices that it acts on.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in names and field.name not in acting and value != field.default:
                raise Refused(
                    f"optimizer.{field.name}={value} does not act on optimizer.{choice}={getattr(self, choice)}: "
                    f"expected {field.default} there, or one of {', '.join(where(field.name))}"
                )

    def make(
        self, steps: int, *, bank: bool = False, axes: Params | None = None
    ) -> optax.GradientTransformation:
        """The optax transformation for a role that is updated `steps` times: without moments where
        it never is.

        Members of a `bank` are clipped each by its own norm. `axes` are the logical names of its
        weights (`Net.axes`), which say what decays.
        """
        if steps == 0:
            return optax.identity()
        clip = clip_by_member_norm if bank else optax.clip_by_global_norm
        chain = [optax.clip(self.clip_value)] * bool(self.clip_value) + [clip(self.clip)] * bool(
            self.clip
        )
        return optax.chain(
            *chain, self._core(self.learning_rate(steps), functools.partial(decayed, axes=axes))
        )

    def _core(self, lr: optax.Schedule, mask: Callable) -> optax.GradientTransformation:
        """From clipped gradients to updates."""
        algorithm = ALGORITHMS[self.algorithm]
        decay = self.weight_decay
        given = {theirs: getattr(self, ours) for ours, theirs in algorithm.takes.items()}
        if not given.get("momentum", 1):  # 0 for optax is a buffer that nothing remembers
            given["momentum"] = None
        if algorithm.decay == "own":
            return algorithm.make(lr, **given, weight_decay=decay, mask=mask)
        if not decay:
            return algorithm.make(lr, **given)
        if algorithm.decay == "gradient":
            return optax.chain(optax.add_decayed_weights(decay, mask), algorithm.make(lr, **given))
        # of lr = 1 the update is already negative
        return optax.chain(
            algorithm.make(1.0, **given),
            optax.add_decayed_weights(-decay, mask),
            optax.scale_by_schedule(lr),
        )

    def learning_rate(self, steps: int) -> optax.Schedule:
        end = max((self.decay_steps or steps) - self.warmup, 1)
        if self.schedule == "constant":
            main = optax.constant_schedule(self.lr)
        elif self.schedule == "cosine":
            main = optax.cosine_decay_schedule(self.lr, end, self.final)
        else:
            main = optax.linear_schedule(self.lr, self.lr * self.final, end)
        if not self.warmup:
            return main
        rise = optax.linear_schedule(self.lr / self.warmup, self.lr, self.warmup - 1)
        return optax.join_schedules([rise, main], [self.warmup])


def clip_by_member_norm(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` for weights stacked on a leading axis: each member by the norm of
    its own.
    """

    def update(updates, state, params=None):
        squares = [
            jnp.sum(g.reshape(g.shape[0], -1) ** 2, axis=1) for g in jax.tree.leaves(updates)
        ]
        norm = jnp.sqrt(sum(squares))
        scale = jnp.where(norm < limit, 1.0, limit / jnp.maximum(norm, limit))
        return jax.tree.map(lambda g: g * scale.reshape(-1, *[1] * (g.ndim - 1)), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decayed(params: Params, axes: Params | None = None) -> Params:
    """Which weights decay, bool for each: by their logical names (core/net.py `decays`). Where
    these are not known, everything of two dimensions or more but biases, norm scales and gains.
    """
    named = lambda path: path_name(path).split("/")[-1] not in ("bias", "scale", "gain")
    by_shape = lambda path, w: jnp.ndim(w) >= 2 and named(path)
    if axes is None:
        return jax.tree_util.tree_map_with_path(by_shape, params)
    return jax.tree_util.tree_map_with_path(
        lambda path, w, names: decays(names) if len(names) else by_shape(path, w), params, axes
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
    """Exponential average with constant decay; `k` is the number of updates so far, from 1.

    With `warmup` the decay is min(decay, (1 + k) / (10 + k)), so that early averages forget the
    initial weights. This class and those below raise Refused for a field out of range.
    """

    rate: float = 0.999
    warmup: bool = True

    def __post_init__(self):
        check_rate(self.rate)

    def decay(self, k: Array) -> Array:
        """Weight of the old average at update `k`."""
        k = jnp.asarray(k, jnp.float32)
        return jnp.minimum(self.rate, (1 + k) / (10 + k)) if self.warmup else jnp.float32(self.rate)


def check_rate(rate: Any) -> None:
    check_range("ema.rate", rate, "0 <= rate < 1", lambda v: 0 <= v < 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyEma:
    """Diffusers' schedule: the first update copies the weights, later ones decay by min(rate, k /
    (9 + k)).
    """

    rate: float = 0.9999

    def __post_init__(self):
        check_rate(self.rate)

    def decay(self, k: Array) -> Array:
        k = jnp.asarray(k, jnp.float32)
        return jnp.where(k <= 1, 0.0, jnp.minimum(self.rate, k / (9 + k)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerEma:
    """Power-function average (EDM2, arXiv:2312.02696): weights proportional to t^gamma; decay (1 -
    1/k)^(gamma + 1).
    """

    sigma_rel: float = (
        0.05  # relative width of the averaging window; at .288 all weights count alike
    )

    def __post_init__(self):
        check_range("ema.sigma_rel", self.sigma_rel, "0.001 to 0.288", lambda v: 1e-3 <= v <= 0.288)

    def decay(self, k: Array) -> Array:
        return (1 - 1 / jnp.asarray(k, jnp.float32)) ** (power_gamma(self.sigma_rel) + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLifeEma:
    """Half-life in samples seen, with ramp-up (EDM): half-life min(half_life, ramp * samples)."""

    half_life: float = 500_000.0  # samples
    batch: int = 256  # samples per update
    ramp: float = 0.05

    def __post_init__(self):
        for name in ("half_life", "batch", "ramp"):
            check_range(f"ema.{name}", getattr(self, name), "a number above 0", lambda v: v > 0)

    def decay(self, k: Array) -> Array:
        half = jnp.minimum(self.half_life, self.ramp * jnp.asarray(k, jnp.float32) * self.batch)
        return 0.5 ** (self.batch / half)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RampEma:
    """Decay that climbs from 0 to `rate` by d <- d + (1 - d)(rate - d) / 2 at each update
    (TwinFlow, arXiv:2512.05150).
    """

    rate: float = 0.99

    def __post_init__(self):
        check_rate(self.rate)

    def decay(self, k: Array) -> Array:
        climb = ramp(self.rate)
        return jnp.asarray(climb)[jnp.minimum(k, len(climb) - 1)]


@functools.cache
def ramp(rate: float) -> np.ndarray:
    """The decays of `RampEma` from update 0 until 0.1 % of 1 - rate is left, then `rate` itself;
    float32.
    """
    decays = [0.0]
    while rate - decays[-1] > 1e-3 * (1 - rate):
        decays.append(decays[-1] + (1 - decays[-1]) * (rate - decays[-1]) / 2)
    return np.asarray([*decays, rate], np.float32)


@functools.cache
def power_gamma(sigma_rel: float) -> float:
    """The exponent whose profile has relative width `sigma_rel` (EDM2, appendix C): .05 -> 16.97,
    .10 -> 6.94.
    """
    t = sigma_rel**-2
    return float(max(r.real for r in np.roots([1, 7, 16 - t, 12 - t]) if abs(r.imag) < 1e-9))
