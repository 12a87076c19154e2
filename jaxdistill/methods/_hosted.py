"""Wrappers that add a term to another method, their host, and delegate the rest to it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from jaxdistill.core.types import Array, Method, Nets, Stage, Turn
from jaxdistill.diffusion.process import Pred

MEMBERS = tuple(name for name in vars(Method) if not name.startswith("_"))


def of_host(name: str) -> property:
    """A property that reads the host's member of this name; a method stays bound to the host."""

    def read(self):
        return getattr(self.host, name)

    return property(read)


class Delegating(Method):
    """All members of `Method` are those of `self.host`, except for what a subclass overrides.

    The subclass supplies `host`, a method.
    """

    def __getattr__(self, name: str) -> Any:
        """Members that only the host's class has, such as its process."""
        if name == "host" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.host, name)


for member in MEMBERS:
    setattr(Delegating, member, of_host(member))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosted(Delegating):
    """A wrapper of one host. It wraps the method of each of the host's stages."""

    host: Method

    def wrap(self, host: Method) -> Hosted:
        """The same wrapper around another host."""
        return dataclasses.replace(self, host=host)

    def settled(self) -> Method:
        return self.wrap(self.host.settled())

    def stages(self, steps: int) -> tuple[Stage, ...]:
        stages = []
        for stage in self.host.stages(steps):
            stages.append(
                dataclasses.replace(stage, method=self.wrap(stage.method))
            )
        return tuple(stages)

    def sampling_roles(self, turn: Turn) -> tuple[str, ...]:
        """The roles that a turn moves and that make samples."""
        return tuple(role for role in turn.moves if role in self.exports)


def record_samples(
    net: Nets, roles: tuple[str, ...], shift: Array | float = 0.0
) -> tuple[Nets, list[Array]]:
    """Networks whose predicted samples are recorded.

    Args:
        net: All networks of a loss.
        roles: Those whose predictions are recorded.
        shift: What is added to each x0 that they predict. The gradient in it is that in a sample.

    Returns:
        (the networks, a list to which each x0 is appended when a loss calls them).
    """
    samples: list[Array] = []

    def recorded(network):
        def call(*args, **kwargs) -> Pred:
            pred = network(*args, **kwargs)
            pred = dataclasses.replace(pred, x0=pred.x0 + shift)
            samples.append(pred.x0)
            return pred

        return call

    wrapped = {role: recorded(getattr(net, role)) for role in roles}
    return SimpleNamespace(**{**vars(net), **wrapped}), samples
