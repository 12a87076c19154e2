"""Optimisers, learning-rate schedules and weight averages: one dataclass each."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.core.algorithms import ALGORITHMS, OwnAxes, own_axes
from jaxdistill.core.fields import check_range
from jaxdistill.core.gradients import (
    clip_by_member_norm,
    clip_by_percentile,
    clip_later,
    skipping,
    zero_nonfinite,
    zeroing,
)
from jaxdistill.core.net import decays, path_name
from jaxdistill.core.rates import check_matches, checked_rates, scale_by_path
from jaxdistill.core.types import Array, Params, Refused, lookup

# schedule -> the fields of Optimizer that shape it
SCHEDULES = {
    "constant": (),
    "cosine": ("decay_steps", "final"),
    "linear": ("decay_steps", "final"),
    "step": ("milestones", "gamma"),
}
NONFINITE = ("stop", "skip", "zero")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimiser of one role. Its steps are the role's updates, not the engine's steps.

    These defaults are used, never optax's own: lion's paper has b2=.99, for instance. Raises
    Refused on a value out of range, and on a field that is set without effect on the algorithm, the
    schedule or the clipping.
    """

    algorithm: str = "adamw"  # a name in ALGORITHMS; "adam" is "adamw"
    lr: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999  # of rmsprop: the decay of its squares
    b3: float = 0.9999  # of came: the decay of its confidence
    eps: float = 1e-8
    eps1: float = 1e-30  # of came: added to squared gradients
    # of came: added to squared distances of updates from their mean
    eps2: float = 1e-16
    momentum: float = 0.0  # of sgd
    # On matrices only (core/net.py `decays`): decoupled and times lr. That of sgd is added to the
    # gradient before momentum, that of lamb to the update before the trust ratio.
    weight_decay: float = 0.0
    # (regular expression, factor): the first that matches a weight's whole path "a/b/c" multiplies
    # its learning rate. A factor of 0 leaves the weight as it is; its gradient counts in the norm.
    rates: tuple[tuple[str, float], ...] = ()
    clip: float = 1.0  # global norm; 0 switches clipping off
    # of each gradient entry, before the norm is clipped; 0 for none
    clip_value: float = 0.0
    # The global norm is clipped to this percentile of its last values before clipping, at most to
    # `clip`; 0: to `clip` alone. Published: 95.
    clip_percentile: float = 0.0
    # updates that the percentile is of; before there are as many, `clip` alone is the limit
    clip_window: int = 1000
    clip_from: int = 0  # updates before clipping, by value and by norm, begins
    # Where the gradient or the loss is not finite:
    # - "stop": the run stops.
    # - "skip": the update is skipped; weights, moments, average and count of updates stay, and the
    #   method's memory where no other role of the turn moves.
    # - "zero": the update is taken with 0 in place of the entries that are not finite after
    #   clipping. Clipping by norm leaves no other entry of such a gradient.
    # Metrics that are not finite, or of skipped updates, do not count in the log. In a bank "skip"
    # is for the members concerned; otherwise the gradients of these are 0.
    nonfinite: str = "stop"
    # constant | cosine | linear | step, after the warm-up
    schedule: str = "constant"
    warmup: int = 0  # updates of linear warm-up, from lr / warmup
    # updates after which cosine and linear reach `final`; 0: the run's length
    decay_steps: int = 0
    final: float = 0.0  # fraction of lr at the end of cosine and linear
    milestones: tuple[
        int, ...
    ] = ()  # of step: updates after which lr falls, rising
    gamma: float = 0.1  # of step: factor of lr at each milestone

    def __post_init__(self):
        def check(name: str, *rule: Any, **kind: Any) -> None:
            check_range(f"optimizer.{name}", getattr(self, name), *rule, **kind)

        object.__setattr__(self, "rates", checked_rates(self.rates))
        if isinstance(self.milestones, list):
            object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("lr", "eps", "eps1", "eps2", "gamma"):
            check(name, "a number above 0", lambda v: v > 0)
        for name in ("b1", "b2", "b3", "momentum"):
            check(name, "0 <= number < 1", lambda v: 0 <= v < 1)
        for name in ("weight_decay", "clip", "clip_value"):
            check(name, "0 or a number above it", lambda v: v >= 0)
        check("final", "a fraction from 0 to 1", lambda v: 0 <= v <= 1)
        check("clip_percentile", "a number from 0 to 100", lambda v: 0 <= v <= 100)
        for name in ("warmup", "decay_steps", "clip_from"):
            check(
                name,
                "0 or a positive integer",
                lambda v: v >= 0,
                kind=numbers.Integral,
            )
        whole = dict(kind=numbers.Integral)
        check("clip_window", "a positive integer", lambda v: v >= 1, **whole)
        takes = lookup(
            ALGORITHMS, self._name("algorithm"), "optimizer.algorithm"
        ).takes
        self._acts(
            "algorithm",
            ("b1", "b2", "b3", "eps", "eps1", "eps2", "momentum"),
            lambda name: [a for a in ALGORITHMS if name in ALGORITHMS[a].takes],
            takes,
        )
        shaped = lookup(SCHEDULES, self._name("schedule"), "optimizer.schedule")
        self._acts(
            "schedule",
            ("decay_steps", "final", "milestones", "gamma"),
            lambda name: [s for s in SCHEDULES if name in SCHEDULES[s]],
            shaped,
        )
        self._check_milestones()
        if 0 < self.decay_steps <= self.warmup:
            raise Refused(
                f"optimizer.decay_steps={self.decay_steps}: expected 0,"
                f" or more than optimizer.warmup={self.warmup}"
            )
        lookup(
            dict.fromkeys(NONFINITE), self._name("nonfinite"), "optimizer.nonfinite"
        )
        self._check_clipping()

    def _check_milestones(self) -> None:
        """Raises Refused unless the milestones of "step" rise and follow the warm-up."""
        given = self.milestones
        if not isinstance(given, tuple):
            raise Refused(
                f"optimizer.milestones={given!r}: expected a list of updates"
            )
        last = self.warmup
        for i, update in enumerate(given):
            check_range(
                f"optimizer.milestones[{i}]",
                update,
                f"an integer above {last}",
                lambda v: v > last,
                kind=numbers.Integral,
            )
            last = update
        if self.schedule == "step" and not given:
            raise Refused(
                "optimizer.milestones=(): expected at least one where optimizer.schedule=step"
            )

    def _check_clipping(self) -> None:
        """Raises Refused where a field of clipping is set, but has no effect."""
        if self.clip_window != 1000 and not self.clip_percentile:
            raise Refused(
                f"optimizer.clip_window={self.clip_window} does not act on"
                " optimizer.clip_percentile=0: expected 1000 there, or a percentile above 0"
            )
        clips = self.clip or self.clip_percentile or self.clip_value
        if self.clip_from and not clips:
            raise Refused(
                f"optimizer.clip_from={self.clip_from} does not act where nothing is clipped:"
                " expected 0 there, or optimizer.clip above 0"
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

        Its `update` takes the keyword `finite` where `nonfinite` is "skip" or "zero"
        (core/gradients.py).

        Args:
          bank: the role is a bank of networks; each member is clipped by its own norm.
          axes: logical axis names of the weights (`Net.axes`), which say what decays and what is
            stacked.

        Raises:
          Refused: one of `rates` is the first match of no weight in `axes`.
        """
        if steps == 0:
            return optax.identity()
        if axes is not None:
            check_matches(self.rates, axes)
        chain = self._clipping(bank)
        if self.nonfinite == "zero":
            chain.append(zero_nonfinite())
        mask = functools.partial(decayed, axes=axes)
        own = own_axes(axes, bank)
        chain.append(self._core(self.learning_rate(steps), mask, own))
        if self.rates:
            chain.append(scale_by_path(self.rates))
        made = optax.chain(*chain)
        if self.nonfinite == "skip":
            return skipping(made, bank=bank)
        if self.nonfinite == "zero":
            return zeroing(made, bank=bank)
        return made

    def _clipping(self, bank: bool) -> list[optax.GradientTransformation]:
        """What clips gradients: by value, then by norm."""
        clips = []
        if self.clip_value:
            clips.append(optax.clip(self.clip_value))
        if self.clip_percentile:
            limit = self.clip or np.inf
            clips.append(
                clip_by_percentile(
                    limit, self.clip_percentile, self.clip_window, bank=bank
                )
            )
        elif self.clip:
            clip = clip_by_member_norm if bank else optax.clip_by_global_norm
            clips.append(clip(self.clip))
        if self.clip_from:
            return [clip_later(optax.chain(*clips), self.clip_from)]
        return clips

    def _core(
        self, lr: optax.Schedule, mask: Callable, own: OwnAxes
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
        if algorithm.by_layer:
            given["own"] = own
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
        elif self.schedule == "step":
            falls = {update - self.warmup: self.gamma for update in self.milestones}
            main = optax.piecewise_constant_schedule(self.lr, falls)
        else:
            main = optax.linear_schedule(self.lr, self.lr * self.final, end)
        if not self.warmup:
            return main
        rise = optax.linear_schedule(
            self.lr / self.warmup, self.lr, self.warmup - 1
        )
        return optax.join_schedules([rise, main], [self.warmup])


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
class Average:
    """Base of all averages of weights: `decay_from` says how, and `start` from when on.

    Up to update `start` the average equals the weights. The schedule of the decay then counts its
    updates from 1, as diffusers' EMAModel does after its `update_after_step`. This class and those
    below raise Refused on a field out of range.
    """

    start: int = 0  # updates of the role before averaging begins

    def __post_init__(self):
        check_range(
            "ema.start",
            self.start,
            "0 or a positive integer",
            lambda v: v >= 0,
            kind=numbers.Integral,
        )

    def decay(self, k: Array) -> Array:
        """Weight of the old average at update `k` of the role, k >= 1."""
        if not self.start:
            return self.decay_from(k)
        own = self.decay_from(jnp.maximum(k - self.start, 1))
        return jnp.where(k > self.start, own, 0.0)

    def decay_from(self, k: Array) -> Array:
        """Weight of the old average at the `k`-th update that is averaged, k >= 1."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema(Average):
    """Exponential average of weights with a constant decay.

    With `warmup` the decay at update k, k >= 1, is min(rate, (1 + k) / (10 + k)), so that early
    averages forget the initial weights.
    """

    rate: float = 0.999
    warmup: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_rate(self.rate)

    def decay_from(self, k: Array) -> Array:
        k = jnp.asarray(k, jnp.float32)
        return (
            jnp.minimum(self.rate, (1 + k) / (10 + k))
            if self.warmup
            else jnp.float32(self.rate)
        )


def check_rate(rate: Any) -> None:
    check_range("ema.rate", rate, "0 <= rate < 1", lambda v: 0 <= v < 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyEma(Average):
    """The schedule of diffusers: update 1 copies the weights, then decay min(rate, k / (9 + k))."""

    rate: float = 0.9999

    def __post_init__(self):
        super().__post_init__()
        check_rate(self.rate)

    def decay_from(self, k: Array) -> Array:
        k = jnp.asarray(k, jnp.float32)
        return jnp.where(k <= 1, 0.0, jnp.minimum(self.rate, k / (9 + k)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerEma(Average):
    """Power-function average (EDM2, arXiv:2312.02696): decay (1 - 1/k)^(gamma + 1)."""

    # relative width of the averaging window; .288 is a plain mean
    sigma_rel: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        check_range(
            "ema.sigma_rel",
            self.sigma_rel,
            "0.001 to 0.288",
            lambda v: 1e-3 <= v <= 0.288,
        )

    def decay_from(self, k: Array) -> Array:
        return (1 - 1 / jnp.asarray(k, jnp.float32)) ** (
            power_gamma(self.sigma_rel) + 1
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLifeEma(Average):
    """The average of EDM: its half-life in samples is min(half_life, ramp * samples so far)."""

    half_life: float = 500_000.0  # samples
    batch: int = 256  # samples per update
    ramp: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        for name in ("half_life", "batch", "ramp"):
            check_range(
                f"ema.{name}",
                getattr(self, name),
                "a number above 0",
                lambda v: v > 0,
            )

    def decay_from(self, k: Array) -> Array:
        half = jnp.minimum(
            self.half_life, self.ramp * jnp.asarray(k, jnp.float32) * self.batch
        )
        return 0.5 ** (self.batch / half)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RampEma(Average):
    """A decay that rises from 0 to `rate`: d <- d + (1 - d)(rate - d) / 2 at each update.

    Source: TwinFlow (arXiv:2512.05150).
    """

    rate: float = 0.99

    def __post_init__(self):
        super().__post_init__()
        check_rate(self.rate)

    def decay_from(self, k: Array) -> Array:
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
