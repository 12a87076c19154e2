"""f-divergences D_f = E_fake f(r), r = p_real / p_fake, with f convex and f(1) = 0.

Their gradients weigh terms by functions of r, in two forms. At one noise level, D_f moves samples
along h(r) (s_fake - s_real) with h = r^2 f'' (f-distill, arXiv:2502.15681). Expanded over noise
levels, D_f = int g^2/2 E[h(r) |s_fake - s_real|^2] dt + the rest at the end, whose gradient has
three terms, weighed by h, r^2 h'' and h - r h' (Uni-Instruct, arXiv:2505.20755).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.types import Array, lookup


@dataclasses.dataclass(frozen=True, kw_only=True)
class FDivergence:
    """Base of all f-divergences: f and three weights, each a function of r > 0."""

    def f(self, r: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The convex function that defines the divergence."""
        raise NotImplementedError

    def h(self, r: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """r^2 f''."""
        raise NotImplementedError

    def di(self, r: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """r^2 h'': the weight of Uni-Instruct's Diff-Instruct term."""
        raise NotImplementedError

    def fgm(self, r: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """h - r h': the weight of Uni-Instruct's third term."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardKL(FDivergence):
    """KL(real || fake)."""

    def f(self, r):
        return r * jnp.log(r)

    def h(self, r):
        return r

    def di(self, r):
        return jnp.zeros_like(r)

    def fgm(self, r):
        return jnp.zeros_like(r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseKL(FDivergence):
    """KL(fake || real)."""

    def f(self, r):
        return -jnp.log(r)

    def h(self, r):
        return jnp.ones_like(r)

    def di(self, r):
        return jnp.zeros_like(r)

    def fgm(self, r):
        return jnp.ones_like(r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jeffreys(FDivergence):
    """A weighted sum of the forward KL(real || fake) and the reverse KL(fake || real)."""

    # Uni-Instruct's best: 0.4 and 0.6; Jeffreys' divergence: 1 and 1
    forward: float = 0.4
    reverse: float = 0.6

    def f(self, r):
        return self.forward * ForwardKL().f(r) + self.reverse * ReverseKL().f(r)

    def h(self, r):
        return self.forward * ForwardKL().h(r) + self.reverse * ReverseKL().h(r)

    def di(self, r):
        return self.forward * ForwardKL().di(r) + self.reverse * ReverseKL().di(r)

    def fgm(self, r):
        return self.forward * ForwardKL().fgm(r) + self.reverse * ReverseKL().fgm(r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChiSquare(FDivergence):
    """Pearson's chi-square divergence."""

    def f(self, r):
        return (r - 1) ** 2

    def h(self, r):
        return 2 * r**2

    def di(self, r):
        return 4 * r**2

    def fgm(self, r):
        return -2 * r**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class JensenShannon(FDivergence):
    """Twice the Jensen-Shannon divergence."""

    def f(self, r):
        return r * jnp.log(r) - (1 + r) * jnp.log((1 + r) / 2)

    def h(self, r):
        return r / (1 + r)

    def di(self, r):
        return -2 * r**2 / (1 + r) ** 3

    def fgm(self, r):
        return (r / (1 + r)) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftenedReverseKL(FDivergence):
    """f-distill's softened reverse KL."""

    def f(self, r):
        return (1 + r) * jnp.log((1 + r) / r) - 2 * math.log(2)

    def h(self, r):
        return 1 / (1 + r)

    def di(self, r):
        return 2 * r**2 / (1 + r) ** 3

    def fgm(self, r):
        return (1 + 2 * r) / (1 + r) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hellinger(FDivergence):
    """Four times the squared Hellinger distance."""

    def f(self, r):
        return 4 * (1 - jnp.sqrt(r))

    def h(self, r):
        return jnp.sqrt(r)

    def di(self, r):
        return -jnp.sqrt(r) / 4

    def fgm(self, r):
        return jnp.sqrt(r) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neyman(FDivergence):
    """Half of Neyman's chi-square divergence."""

    def f(self, r):
        return (1 - r) ** 2 / (2 * r)

    def h(self, r):
        return 1 / r

    def di(self, r):
        return 2 / r

    def fgm(self, r):
        return 2 / r


NAMES = {  # as configs of version 0.1 name them
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jeffreys": Jeffreys(forward=1.0, reverse=1.0),
    "jkl": Jeffreys(forward=0.4, reverse=0.6),
    "chi2": ChiSquare(),
    "js": JensenShannon(),
    "softened_rkl": SoftenedReverseKL(),
    "hellinger": Hellinger(),
    "neyman": Neyman(),
}


def from_name(given: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields of a method in which a `divergence` that is text is the one of this name.

    Raises:
      Refused: on a name that is not in NAMES.
    """
    name = given.get("divergence")
    if not isinstance(name, str):
        return dict(given)
    found = lookup(NAMES, name, "divergence")
    described = {"name": f"objectives.fdivergence:{type(found).__name__}"}
    return {**given, "divergence": {**described, **dataclasses.asdict(found)}}


def ratio(
    logit: Float[Array, "*B"], low: float = 1e-3, high: float = 1e3
) -> Float[Array, "*B"]:
    """r = exp(logit) within [low, high], differentiable inside.

    `logit` is a discriminator's estimate of log p_real - log p_fake.
    """
    return jnp.exp(jnp.clip(logit, math.log(low), math.log(high)))


def f_ratio(
    logit: Float[Array, "*B"], low: float = 0.0, high: float = math.inf
) -> Float[Array, "*B"]:
    """f-distill's r: exp of logits clipped to [-10, 10], within [low, high].

    It is under stop_gradient.
    """
    clipped = jnp.clip(jax.lax.stop_gradient(logit), -10.0, 10.0)
    return jnp.clip(jnp.exp(clipped), low, high)


def f_weight(
    divergence: FDivergence,
    logit: Float[Array, " B"],
    low: float = 0.0,
    high: float = math.inf,
    scale: float | Array = 1.0,
) -> Float[Array, " B"]:
    """h(r / scale) over its batch mean, with r of `f_ratio` (f-distill)."""
    h = divergence.h(f_ratio(logit, low, high) / scale)
    return h / jnp.mean(h)


def binned_means(
    means: Float[Array, " K"],
    r: Float[Array, " B"],
    t: Float[Array, " B"],
    low: float,
    high: float,
    rate: float,
) -> tuple[Float[Array, " K"], Float[Array, " B"]]:
    """Running means of r by K equal bins of the times in low..high, and each sample's own mean.

    A bin keeps a share `rate` of its old mean, and all of it where no time of the batch is in it.
    The 1e-6 is that of f-distill's code.
    """
    width = (high - low) / len(means)
    index = jnp.clip(
        jnp.floor((t - low) / width).astype(jnp.int32), 0, len(means) - 1
    )
    count = jnp.zeros_like(means).at[index].add(jnp.ones_like(r))
    total = jnp.zeros_like(means).at[index].add(r)
    moved = rate * means + (1 - rate) * total / (count + 1e-6)
    means = jnp.where(count > 0, moved, means)
    return means, means[index]
