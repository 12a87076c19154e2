"""f-divergences D_f = E_fake f(r), r = p_real / p_fake, f convex, f(1) = 0, and what their
gradients weigh terms by.

Two forms have gradients. At one noise level, D_f moves samples along h(r) (s_fake - s_real) with h
= r^2 f'' (f-distill, arXiv:2502.15681). Expanded over noise levels, D_f = int g^2/2 E[h(r) |s_fake
- s_real|^2] dt + the rest at the end, which has three terms, weighed by h, r^2 h'' and h - r h'
(Uni-Instruct, arXiv:2505.20755).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, lookup

Weight = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """f and the three weights, each a function of r > 0 of any shape."""

    f: Weight
    h: Weight  # r^2 f''
    di: Weight  # r^2 h''
    fgm: Weight  # h - r h'


def _blend(*parts: tuple[float, Divergence]) -> Divergence:
    """The sum of divergences with weights; all parts of one are linear in f."""
    add = lambda name: lambda r: sum(share * getattr(part, name)(r) for share, part in parts)
    return Divergence(*(add(field.name) for field in dataclasses.fields(Divergence)))


_FORWARD = Divergence(lambda r: r * jnp.log(r), lambda r: r, jnp.zeros_like, jnp.zeros_like)
_REVERSE = Divergence(lambda r: -jnp.log(r), jnp.ones_like, jnp.zeros_like, jnp.ones_like)
DIVERGENCES = {
    "forward_kl": _FORWARD,
    "reverse_kl": _REVERSE,
    "jeffreys": _blend((1.0, _FORWARD), (1.0, _REVERSE)),
    "jkl": _blend((0.4, _FORWARD), (0.6, _REVERSE)),  # Uni-Instruct's
    "chi2": Divergence(
        lambda r: (r - 1) ** 2, lambda r: 2 * r**2, lambda r: 4 * r**2, lambda r: -2 * r**2
    ),
    "js": Divergence(  # twice the Jensen-Shannon divergence
        lambda r: r * jnp.log(r) - (1 + r) * jnp.log((1 + r) / 2),
        lambda r: r / (1 + r),
        lambda r: -2 * r**2 / (1 + r) ** 3,
        lambda r: (r / (1 + r)) ** 2,
    ),
    "softened_rkl": Divergence(
        lambda r: (1 + r) * jnp.log((1 + r) / r) - 2 * math.log(2),
        lambda r: 1 / (1 + r),
        lambda r: 2 * r**2 / (1 + r) ** 3,
        lambda r: (1 + 2 * r) / (1 + r) ** 2,
    ),
    "hellinger": Divergence(
        lambda r: 4 * (1 - jnp.sqrt(r)),
        lambda r: jnp.sqrt(r),
        lambda r: -jnp.sqrt(r) / 4,
        lambda r: jnp.sqrt(r) / 2,
    ),
    "neyman": Divergence(
        lambda r: (1 - r) ** 2 / (2 * r), lambda r: 1 / r, lambda r: 2 / r, lambda r: 2 / r
    ),
}


def divergence(kind: str) -> Divergence:
    """A row of DIVERGENCES. Raises Refused on an unknown kind."""
    return lookup(DIVERGENCES, kind, "divergence")


def ratio(logit: Array, low: float = 1e-3, high: float = 1e3) -> Array:
    """r = exp(logit) within [low, high], of a discriminator's estimate of log p_real - log p_fake;
    differentiable inside.
    """
    return jnp.exp(jnp.clip(logit, math.log(low), math.log(high)))


def f_ratio(logit: Array, low: float = 0.0, high: float = math.inf) -> Array:
    """f-distill's r, under stop_gradient: exp of logits clipped to [-10, 10], within [low, high]."""
    return jnp.clip(jnp.exp(jnp.clip(jax.lax.stop_gradient(logit), -10.0, 10.0)), low, high)


def f_weight(
    kind: str, logit: Array, low: float = 0.0, high: float = math.inf, scale: Array | float = 1.0
) -> Array:
    """h(r / scale) over its batch mean, r of `f_ratio`; [B] -> [B] (f-distill). Raises Refused on
    an unknown kind.
    """
    h = divergence(kind).h(f_ratio(logit, low, high) / scale)
    return h / jnp.mean(h)


def binned_means(
    means: Array, r: Array, t: Array, low: float, high: float, rate: float
) -> tuple[Array, Array]:
    """(means [bins], moved towards those of r [B] by equal bins of the times t [B] in low..high;
    each sample's own [B]).

    A bin keeps `rate` of its old mean, all of it where the batch has no time in it (f-distill's
    code, with its 1e-6).
    """
    index = jnp.clip(
        jnp.floor((t - low) / ((high - low) / len(means))).astype(jnp.int32), 0, len(means) - 1
    )
    count, total = (jnp.zeros_like(means).at[index].add(value) for value in (jnp.ones_like(r), r))
    means = jnp.where(count > 0, rate * means + (1 - rate) * total / (count + 1e-6), means)
    return means, means[index]
