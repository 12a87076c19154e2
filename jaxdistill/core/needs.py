"""What a method or a network needs of a batch, as typed shapes, held against what there is.

A need is a jaxtyping annotation of `Spec`: `Int[Spec, "B T"]`. Axes of one name have one length
over all needs of a mapping; `*name` stands for any number of axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import jaxtyped

from jaxdistill.core.types import Refused, nearest

Spec = jax.ShapeDtypeStruct
Needs = Mapping[str, Any]  # name -> a jaxtyping annotation of Spec, or a mapping of such


def check_needs(given: Mapping[str, Any], needs: Needs, who: str, where: str) -> None:
    """Raises Refused where `given` (name -> Spec or a mapping of these) lacks or misfits a need.

    `who` needs it ("DMD2"); `where` is what gives it, as messages name it ("config.data").
    """
    with jaxtyped("context"):
        _check(given, needs, who, where)


def _check(given: Mapping[str, Any], needs: Needs, who: str, where: str) -> None:
    for name, need in needs.items():
        if name not in given:
            near = nearest(name, [key for key in given if key not in needs])
            raise Refused(f"{where}: {who} needs {name!r} {_shown(need)} in a batch{near}")
        if isinstance(need, Mapping):
            if not isinstance(given[name], Mapping):
                raise Refused(f"{where}: {name!r} is one array, {who} needs {', '.join(need)}")
            _check(given[name], need, who, f"{where}[{name!r}]")
        elif not isinstance(given[name], need):
            found = given[name]
            had = f"{found.dtype} {list(found.shape)}" if isinstance(found, Spec) else "a group"
            raise Refused(f"{where}: {name!r} is {had}, {who} needs {_shown(need)}")


def _shown(need: Any) -> str:
    """A need in words: "float [B 77 768]"."""
    if isinstance(need, Mapping):
        return f"({', '.join(need)})"
    kind = need.__name__.partition("[")[0].lower().replace("shaped", "array")
    return f"{kind} [{need.dim_str.strip()}]"
