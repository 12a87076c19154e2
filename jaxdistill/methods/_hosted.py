"""Methods that add something to another one, their host, which says everything else."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from jaxdistill.core.types import Array, Method, Nets, Stage, Turn

MEMBERS = tuple(
    name for name in vars(Method) if not name.startswith("_")
)  # all that a method may say


def of_host(name: str) -> property:
    """The host's own member of this name; where it is a method, bound to the host."""
    return property(lambda self: getattr(self.host, name))


class Delegating(Method):
    """Every member of `Method` is that of `self.host`, a method that a subclass supplies, but for
    what the subclass overrides.
    """

    vars().update({name: of_host(name) for name in MEMBERS})

    def __getattr__(self, name: str) -> Any:
        """What only the host's class has, such as its process."""
        if name == "host" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.host, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosted(Delegating):
    """One host, whose stages are wrapped one by one."""

    host: Method

    def stages(self, steps: int) -> tuple[Stage, ...]:
        wrapped = lambda stage: dataclasses.replace(self, host=stage.method)
        return tuple(
            dataclasses.replace(stage, method=wrapped(stage)) for stage in self.host.stages(steps)
        )

    def makers(self, turn: Turn) -> tuple[str, ...]:
        """The roles of a turn that move and make samples."""
        return tuple(role for role in turn.moves if role in self.exports)


def tap(net: Nets, roles: tuple[str, ...], move: Array | float = 0.0) -> tuple[Nets, list[Array]]:
    """(networks, list): every x0 that the networks of `roles` predict is moved by `move` and
    appended to the list.
    """
    seen = []

    def tapped(call):
        def run(*args, **kwargs):
            pred = call(*args, **kwargs)
            pred = dataclasses.replace(pred, x0=pred.x0 + move)
            seen.append(pred.x0)
            return pred

        return run

    return SimpleNamespace(
        **{**vars(net), **{role: tapped(getattr(net, role)) for role in roles}}
    ), seen
