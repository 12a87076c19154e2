"""A role's weights in parts: what the optimiser moves, what rests, and running statistics.

A part is a nested dict with some of the leaves; together the parts have each leaf once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxdistill.core.fields import expression
from jaxdistill.core.net import Net, is_spec, paths
from jaxdistill.core.types import Params, Refused


class Parts(NamedTuple):
    """The weights of a trained role; without `Method.trains` and statistics all of them move."""

    moving: Params
    rest: Params
    statistics: Params


def split(net: Net, weights: Any, pattern: str | None) -> Parts:
    """A tree like the network's weights, in parts.

    Args:
        net: the network; it says which leaves are running statistics.
        weights: its weights, or a tree like them (axis names, say).
        pattern: regular expression of the paths "a/b/c" that move; None: all do. The path of an
            adapter is that of the matrix it is on.

    Raises:
        Refused: `pattern` matches no weight, or is no regular expression.
    """
    if pattern is None and not net.statistics:
        return Parts(weights, {}, {})
    moves = matcher(pattern, net) if pattern is not None else lambda path: True
    is_statistic = net.statistics.__contains__
    return Parts(
        leaves_where(weights, lambda path: not is_statistic(path) and moves(path)),
        leaves_where(
            weights, lambda path: not is_statistic(path) and not moves(path)
        ),
        leaves_where(weights, is_statistic),
    )


def matcher(pattern: str, net: Net) -> Callable[[str], bool]:
    """Whether a path, of an adapter that of its matrix, matches `pattern` in full.

    Raises:
        Refused: no weight of `net` matches, or `pattern` is no regular expression.
    """
    wanted = expression(pattern, "trains: ")
    own = [path for path in paths(net.shapes) if path not in net.statistics]
    names = dict.fromkeys(map(net.weight_of, own))
    if not any(map(wanted.fullmatch, names)):
        first = ", ".join(list(names)[:6]) or "none"
        raise Refused(
            f"trains: {pattern!r} matches no weight; there are {first}, ..."
        )
    return lambda path: wanted.fullmatch(net.weight_of(path)) is not None


def leaves_where(
    tree: Any, wanted: Callable[[str], bool], prefix: str = ""
) -> Params:
    """The leaves whose path is wanted, in nested dicts without empty ones."""
    found = {}
    for key, node in tree.items():
        path = f"{prefix}{key}"
        if isinstance(node, dict):
            inside = leaves_where(node, wanted, f"{path}/")
            if inside:
                found[key] = inside
        elif wanted(path):
            found[key] = node
    return found


def joined(*parts: Params) -> Params:
    """One tree of the leaves of all parts; the same object where only one part has any."""
    filled = [part for part in parts if part]
    if len(filled) < 2:
        return filled[0] if filled else {}
    found: Params = {}
    for part in filled:
        for key, node in part.items():
            both = key in found and isinstance(node, dict)
            found[key] = joined(found[key], node) if both else node
    return found


def like(tree: Any, part: Any) -> Any:
    """The leaves of `tree` that `part` has."""
    if not isinstance(part, Mapping) or is_spec(tree):
        return tree
    return {key: like(tree[key], node) for key, node in part.items()}
