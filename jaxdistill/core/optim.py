"""Optimisers, learning-rate schedules and weight averages: one dataclass each."""

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
SMALLEST = float(np.finfo(np.float32).tiny)  # smaller numbers become 0 on most chips


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An optax optimiser, and the names of its parameters."""

    make: Callable[..., optax.GradientTransformation]
    # field of Optimizer -> parameter; other fields have no effect
    takes: Mapping[str, str]
    # How weights decay. "own": by its parameters `weight_decay` and `mask`. "decoupled": added to
    # the update, times lr. "gradient": added to the gradient.
    decay: str


MOMENTS = {"b1": "b1", "b2": "b2", "eps": "eps"}

# All of these are elementwise. LAMB and LARS take norms over a weight, which here would include all
# layers and bank members that are stacked in it.
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
    name: str,
    value: Any,
    expected: str,
    holds: Callable[[Any], bool],
    kind: type = numbers.Real,
) -> None:
    """Raises Refused unless `value` is a `kind` (numbers.Real | numbers.Integral) that float32
    holds, and `holds` says so.
    """
    most = LARGEST_INT if kind is numbers.Integral else LARGEST
    sound = (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and -most <= value <= most
    )
    if not sound or not holds(value):
        raise Refused(f"{name}={value!r}: expected {expected}")
    if not holds(in_float32(value)):
        raise Refused(
            f"{name}={value!r}: is {in_float32(value):g} in float32, expected {expected}"
        )


def in_float32(value: float) -> float:
    """`value` rounded to float32, with 0 in place of subnormal numbers."""
    rounded = float(np.float32(value))
    return rounded if abs(rounded) >= SMALLEST else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimiser of one role. Its steps are the role's updates, not the engine's steps.

    These defaults are used, never optax's own: lion's paper has b2=.99, for instance. Raises
    Refused on a value out of range, and on a field that is set without effect on the algorithm or
    the schedule.
    """

    algorithm: str = "adamw"  # a name in ALGORITHMS; "adam" is "adamw"
    lr: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999  # of rmsprop: the decay of its squares
    eps: float = 1e-8
    momentum: float = 0.0  # of sgd
    # On matrices only (core/net.py `decays`): decoupled and times lr. That of sgd is added to the
    # gradient before momentum.
    weight_decay: float = 0.0
    clip: float = 1.0  # global norm; 0 switches clipping off
    # of each gradient entry, before the norm is clipped; 0 for none
    clip_value: float = 0.0
    schedule: str = "constant"  # constant | cosine | linear, after the warm-up
    warmup: int = 0  # updates of linear warm-up, from lr / warmup
    # updates after which cosine and linear reach `final`; 0: the run's length
    decay_steps: int = 0
    final: float = 0.0  # fraction of lr at the end of cosine and linear

    def __post_init__(self):
        def check(name: str, *rule: Any, **kind: Any) -> None:
            check_range(f"optimizer.{name}", getattr(self, name), *rule, **kind)

        for name in ("lr", "eps"):
            check(name, "a number above 0", lambda v: v > 0)
        for name in ("b1", "b2", "momentum"):
            check(name, "0 <= number < 1", lambda v: 0 <= v < 1)
        for name in ("weight_decay", "clip", "clip_value"):
            check(name, "0 or a number above it", lambda v: v >= 0)
        check("final", "a fraction from 0 to 1", lambda v: 0 <= v <= 1)
        for name in ("warmup", "decay_steps"):
            check(
                name,
                "0 or a positive integer",
                lambda v: v >= 0,
                kind=numbers.Integral,
            )
        takes = lookup(
            ALGORITHMS, self._name("algorithm"), "optimizer.algorithm"
        ).takes
        self._acts(
            "algorithm",
            ("b1", "b2", "eps", "momentum"),
            lambda name: [a for a in ALGORITHMS if name in ALGORITHMS[a].takes],
            takes,
        )
        lookup(dict.fromkeys(SCHEDULES), self._name("schedule"), "optimizer.schedule")
        shaped = () if self.schedule == "constant" else ("decay_steps", "final")
        self._acts(
            "schedule",
            ("decay_steps", "final"),
            lambda name: ["cosine", "linear"],
            shaped,
        )
        if 0 < self.decay_steps <= self.warmup:
            raise Refused(
                f"optimizer.decay_steps={self.decay_steps}: expected 0,"
                f" or more than optimizer.warmup={self.warmup}"
            )

    def _name(self, field: str) -> str:
        value = getattr(self, field)
        if not isinstance(value, str):
            raise Refused(f"optimizer.{field}={value!r}: expected a name")
        return value

    def _acts(
        self,
        choice: str,
        names: tuple[str, ...],
        where: Callable[[str], list[str]],
        acting: Any,
    ) -> None:
        """Raises Refused where one of the fields `names` is set but has no effect.

        `acting` are the fields that have one under the present `choice`; `where` lists the choices
        under which a field has one.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                field.name in names
                and field.name not in acting
                and value != field.default
            ):
                raise Refused(
                    f"optimizer.{field.name}={value} does not act on"
                    f" optimizer.{choice}={getattr(self, choice)}:"
                    f" expected {field.default} there, or one of {', '.join(where(field.name))}"
                )

    def make(
        self, steps: int, *, bank: bool = False, axes: Params | None = None
    ) -> optax.GradientTransformation:
        """The optax transformation for a role with `steps` updates; 0 updates need no state.

        Args:
          bank: the role is a bank of networks; each member is clipped by its own norm.
          axes: logical axis names of the weights (`Net.axes`), which say what decays.
        """
        if steps == 0:
            return optax.identity()
        chain = []
        if self.clip_value:
            chain.append(optax.clip(self.clip_value))
        if self.clip:
            clip = clip_by_member_norm if bank else optax.clip_by_global_norm
            chain.append(clip(self.clip))
        mask = functools.partial(decayed, axes=axes)
        return optax.chain(*chain, self._core(self.learning_rate(steps), mask))

    def _core(
        self, lr: optax.Schedule, mask: Callable
    ) -> optax.GradientTransformation:
        """From clipped gradients to updates."""
        algorithm = ALGORITHMS[self.algorithm]
        decay = self.weight_decay
        given = {
            theirs: getattr(self, ours) for ours, theirs in algorithm.takes.items()
        }
        if (
            given.get("momentum") == 0
        ):  # optax would allocate a buffer for a momentum of 0
            given["momentum"] = None
        if algorithm.decay == "own":
            return algorithm.make(lr, **given, weight_decay=decay, mask=mask)
        if not decay:
            return algorithm.make(lr, **given)
        if algorithm.decay == "gradient":
            return optax.chain(
                optax.add_decayed_weights(decay, mask), algorithm.make(lr, **given)
            )
        # the update with lr = 1 has its sign changed already
        return optax.chain(
            algorithm.make(1.0, **given),
            optax.add_decayed_weights(-decay, mask),
            optax.scale_by_schedule(lr),
        )

    def learning_rate(self, steps: int) -> optax.Schedule:
        """The learning rate as a function of the role's update number, from 0."""
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
    """`optax.clip_by_global_norm` for stacked weights: each member has its own norm."""

    def update(updates, state, params=None):
        squares = [
            jnp.sum(g.reshape(g.shape[0], -1) ** 2, axis=1)
            for g in jax.tree.leaves(updates)
        ]
        norm = jnp.sqrt(sum(squares))
        scale = jnp.where(norm < limit, 1.0, limit / jnp.maximum(norm, limit))
        return jax.tree.map(
            lambda g: g * scale.reshape(-1, *[1] * (g.ndim - 1)), updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decayed(params: Params, axes: Params | None = None) -> Params:
    """Whether weight decay acts, as a tree of bool like `params`.

    The logical axis names decide (core/net.py `decays`). Weights without names decay if they have
    two dimensions or more, except biases, norm scales and gains.
    """

    def by_shape(path: tuple, w: Any) -> bool:
        vector = path_name(path).split("/")[-1] in ("bias", "scale", "gain")
        return jnp.ndim(w) >= 2 and not vector

    def by_names(path: tuple, w: Any, names: Any) -> bool:
        return decays(names) if len(names) else by_shape(path, w)

    if axes is None:
        return jax.tree_util.tree_map_with_path(by_shape, params)
    return jax.tree_util.tree_map_with_path(by_names, params, axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
    """Exponential average of weights with a constant decay.

    With `warmup` the decay at update k, k >= 1, is min(rate, (1 + k) / (10 + k)), so that early
    averages forget the initial weights. This class and those below raise Refused on a field out of
    range.
    """

    rate: float = 0.999
    warmup: bool = True

    def __post_init__(self):
        check_rate(self.rate)

    def decay(self, k: Array) -> Array:
        """Weight of the old average at update `k`."""
        k = jnp.asarray(k, jnp.float32)
        return (
            jnp.minimum(self.rate, (1 + k) / (10 + k))
            if self.warmup
            else jnp.float32(self.rate)
        )


def check_rate(rate: Any) -> None:
    check_range("ema.rate", rate, "0 <= rate < 1", lambda v: 0 <= v < 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyEma:
    """The schedule of diffusers: update 1 copies the weights, then decay min(rate, k / (9 + k))."""

    rate: float = 0.9999

    def __post_init__(self):
        check_rate(self.rate)

    def decay(self, k: Array) -> Array:
        k = jnp.asarray(k, jnp.float32)
        return jnp.where(k <= 1, 0.0, jnp.minimum(self.rate, k / (9 + k)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerEma:
    """Power-function average (EDM2, arXiv:2312.02696): decay (1 - 1/k)^(gamma + 1)."""

    # relative width of the averaging window; .288 is a plain mean
    sigma_rel: float = 0.05

    def __post_init__(self):
        check_range(
            "ema.sigma_rel",
            self.sigma_rel,
            "0.001 to 0.288",
            lambda v: 1e-3 <= v <= 0.288,
        )

    def decay(self, k: Array) -> Array:
        return (1 - 1 / jnp.asarray(k, jnp.float32)) ** (
            power_gamma(self.sigma_rel) + 1
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLifeEma:
    """The average of EDM: its half-life in samples is min(half_life, ramp * samples so far)."""

    half_life: float = 500_000.0  # samples
    batch: int = 256  # samples per update
    ramp: float = 0.05

    def __post_init__(self):
        for name in ("half_life", "batch", "ramp"):
            check_range(
                f"ema.{name}",
                getattr(self, name),
                "a number above 0",
                lambda v: v > 0,
            )

    def decay(self, k: Array) -> Array:
        half = jnp.minimum(
            self.half_life, self.ramp * jnp.asarray(k, jnp.float32) * self.batch
        )
        return 0.5 ** (self.batch / half)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RampEma:
    """A decay that rises from 0 to `rate`: d <- d + (1 - d)(rate - d) / 2 at each update.

    Source: TwinFlow (arXiv:2512.05150).
    """

    rate: float = 0.99

    def __post_init__(self):
        check_rate(self.rate)

    def decay(self, k: Array) -> Array:
        decays = ramp(self.rate)
        return jnp.asarray(decays)[jnp.minimum(k, len(decays) - 1)]


@functools.cache
def ramp(rate: float) -> np.ndarray:
    """The decays of `RampEma` from update 0, float32.

    They end with `rate` once the difference from it is below 0.1 % of 1 - rate.
    """
    decays = [0.0]
    while rate - decays[-1] > 1e-3 * (1 - rate):
        decays.append(decays[-1] + (1 - decays[-1]) * (rate - decays[-1]) / 2)
    return np.asarray([*decays, rate], np.float32)


@functools.cache
def power_gamma(sigma_rel: float) -> float:
    """The exponent gamma of a profile with relative width `sigma_rel` (EDM2, appendix C).

    .05 gives 16.97, and .10 gives 6.94.
    """
    t = sigma_rel**-2
    return float(
        max(r.real for r in np.roots([1, 7, 16 - t, 12 - t]) if abs(r.imag) < 1e-9)
    )
