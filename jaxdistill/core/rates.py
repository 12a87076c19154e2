"""Learning-rate factors by weight: `Optimizer.rates`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill.core.fields import check_range, expression
from jaxdistill.core.net import is_spec, listed, path_name, paths
from jaxdistill.core.types import Array, Params, Refused

Rates = Sequence[tuple[str, float]]  # (regular expression, factor)


def checked_rates(rates: Any) -> tuple[tuple[str, float], ...]:
    """`Optimizer.rates` as tuples. Raises Refused unless they are pairs of pattern and factor."""
    if not isinstance(rates, (list, tuple)):
        raise Refused(f"optimizer.rates={rates!r}: expected a list of pairs")
    checked = []
    for i, pair in enumerate(rates):
        where = f"optimizer.rates[{i}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Refused(
                f"{where}={pair!r}: expected (regular expression, factor)"
            )
        pattern, factor = pair
        if not isinstance(pattern, str):
            raise Refused(f"{where}[0]={pattern!r}: expected a regular expression")
        expression(pattern, f"{where}[0]=", ": expected a regular expression")
        expected = "a factor of 0 or a number above it"
        check_range(f"{where}[1]", factor, expected, lambda v: v >= 0)
        checked.append((pattern, float(factor)))
    return tuple(checked)


def first_matches(rates: Rates, names: Iterable[str]) -> dict[str, int]:
    """Path of a weight -> the index of the first pattern that matches it, where one does."""
    found = {}
    for name in names:
        matches = (i for i, (p, _) in enumerate(rates) if re.fullmatch(p, name))
        first = next(matches, None)
        if first is not None:
            found[name] = first
    return found


def check_matches(rates: Rates, axes: Params) -> None:
    """Raises Refused where one of `rates` is the first match of no weight in `axes`."""
    names = paths(axes, is_leaf=is_spec)
    used = set(first_matches(rates, names).values())
    for i, (pattern, _) in enumerate(rates):
        if i in used:
            continue
        matched = any(re.fullmatch(pattern, name) for name in names)
        problem = "matches weights of earlier patterns only"
        if not matched:
            problem = f"matches no weight: {listed(names)}"
        raise Refused(f"optimizer.rates[{i}][0]={pattern!r} {problem}")


def rate_factors(rates: Rates, weights: Params) -> dict[str, float]:
    """Path of a weight -> the factor that `Optimizer.rates` gives its learning rate."""
    names = paths(weights)
    matches = first_matches(rates, names)
    return {
        name: rates[matches[name]][1] if name in matches else 1.0 for name in names
    }


def scale_by_path(
    rates: Rates,
) -> optax.GradientTransformation:
    """Updates times the factors of `rates`; those of factor 0 change no bit of their weights."""

    def update(updates, state, params=None):
        factors = rate_factors(rates, updates)

        def scaled(path: tuple, u: Array) -> Array:
            factor = factors[path_name(path)]
            # x + -0.0 is x to the bit, x + 0.0 is not where x is -0.0
            return u * factor if factor else jnp.full_like(u, -0.0)

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
