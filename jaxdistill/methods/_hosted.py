"""Methods that add something to another one, their host, which says everything else."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

from jaxdistill.core.types import Array, Method, Nets, Turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosted(Method):
    """Roles, turns, stages, sampler and export are the host's. A subclass wraps the turns, and adds to the memory."""

    host: Method = Method()

    inits = property(lambda self: self.host.inits)
    frozen = property(lambda self: self.host.frozen)
    ema = property(lambda self: self.host.ema)
    exports = property(lambda self: self.host.exports)
    process = property(lambda self: self.host.process)
    renoises = property(lambda self: self.host.renoises)

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self.host.turns

    def makers(self, turn: Turn) -> tuple[str, ...]:
        """The roles of a turn that move and make samples."""
        return tuple(role for role in turn.moves if role in self.exports)

    def memory(self):
        return self.host.memory()

    def stages(self, steps):
        wrapped = lambda stage: dataclasses.replace(self, host=stage.method)
        return tuple(dataclasses.replace(stage, method=wrapped(stage)) for stage in self.host.stages(steps))

    def controller(self):
        return self.host.controller()

    def exported(self, net, params):
        return self.host.exported(net, params)

    def generator(self, net):
        return self.host.generator(net)

    def initial(self, noise):
        return self.host.initial(noise)

    def sampling_times(self, steps: int) -> Array:
        return self.host.sampling_times(steps)

    def sample(self, net, noise, cond, key, steps):
        return self.host.sample(net, noise, cond, key, steps)


def tap(net: Nets, roles: tuple[str, ...], move: Array | float = 0.0) -> tuple[Nets, list[Array]]:
    """(networks, list): every x0 that the networks of `roles` predict is moved by `move` and appended to the list."""
    seen = []

    def tapped(call):
        def run(*args, **kwargs):
            pred = call(*args, **kwargs)
            pred = dataclasses.replace(pred, x0=pred.x0 + move)
            seen.append(pred.x0)
            return pred

        return run

    return SimpleNamespace(**{**vars(net), **{role: tapped(getattr(net, role)) for role in roles}}), seen
