"""Several networks bound as one role, so that a stage's teacher may be made of what earlier stages
left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxdistill.core.net import Net
from jaxdistill.core.types import Params, Refused


@dataclasses.dataclass(frozen=True)
class Ensemble(Net):
    """Called as its `members` are, it gives the tuple of their outputs. Its weights are theirs
    under "0", "1", ...
    """

    members: tuple[Net, ...] = ()

    def init(self, key):
        return {str(i): net.init(key) for i, net in enumerate(self.members)}

    def apply(self, params: Params, *args, **kwargs) -> tuple:
        return tuple(
            net.apply(params[str(i)], *args, **kwargs) for i, net in enumerate(self.members)
        )


def gather(pairs: Sequence[tuple[Net, Params]]) -> tuple[Ensemble, Params]:
    """(network, weights) of an ensemble of these. Raises Refused on adapters, whose weights are not
    their own.
    """
    for net, _ in pairs:
        if net.adapts:
            raise Refused(
                f"lora: adapters of {net.adapts!r} cannot join an ensemble; train full weights"
            )
    named = lambda part: {str(i): part(*pair) for i, pair in enumerate(pairs)}
    ensemble = Ensemble(
        None,
        None,
        named(lambda net, _: net.shapes),
        named(lambda net, _: net.axes),
        members=tuple(net for net, _ in pairs),
    )
    return ensemble, named(lambda _, params: params)


def split(net: Net, params: Params) -> list[tuple[Net, Params]]:
    """The (network, weights) that `gather` took; a plain network is a list of one."""
    if not isinstance(net, Ensemble):
        return [(net, params)]
    return [(member, params[str(i)]) for i, member in enumerate(net.members)]
