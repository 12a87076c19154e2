"""Several networks bound as one role: a stage's teacher made of what earlier stages trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxtyping import Key

from jaxdistill.core.net import Net
from jaxdistill.core.types import Array, Params, Refused


@dataclasses.dataclass(frozen=True)
class Ensemble(Net):
    """Called as its `members` are, it gives the tuple of their outputs.

    Its weights are theirs under "0", "1", ...
    """

    members: tuple[Net, ...] = ()

    def init(self, key: Key[Array, ""]) -> Params:
        return {str(i): net.init(key) for i, net in enumerate(self.members)}

    def apply(self, params: Params, *args, **kwargs) -> tuple:
        outputs = []
        for i, net in enumerate(self.members):
            outputs.append(net.apply(params[str(i)], *args, **kwargs))
        return tuple(outputs)


def gather(pairs: Sequence[tuple[Net, Params]]) -> tuple[Ensemble, Params]:
    """The ensemble of these networks, with its weights.

    Raises:
        Refused: on adapters, whose weights are not all their own.
    """
    for net, _ in pairs:
        if net.adapts:
            raise Refused(
                f"lora: adapters of {net.adapts!r} cannot join an ensemble; train full weights"
            )
    members = tuple(net for net, _ in pairs)
    shapes = {str(i): net.shapes for i, net in enumerate(members)}
    axes = {str(i): net.axes for i, net in enumerate(members)}
    params = {str(i): params for i, (_, params) in enumerate(pairs)}
    return Ensemble(None, None, shapes, axes, members=members), params


def split(net: Net, params: Params) -> list[tuple[Net, Params]]:
    """The (network, weights) that `gather` took; a plain network is a list of one."""
    if not isinstance(net, Ensemble):
        return [(net, params)]
    return [(member, params[str(i)]) for i, member in enumerate(net.members)]
