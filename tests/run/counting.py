"""A method and a data set that let a run be audited: every sample has a number, and every step says
which it saw.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxdistill.core.types import Controller
from jaxdistill.data.base import InMemory
from jaxdistill.data.mixtures import Mixture
from jaxdistill.methods.distribution.dmd2 import DMD2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbered(InMemory):
    """40 points with their numbers."""

    def arrays(self, split):
        rng = np.random.default_rng(3)
        return {
            "x": rng.standard_normal((40, 2)).astype(np.float32),
            "number": np.arange(40, dtype=np.float32),
        }

    def net(self, process):
        return Mixture(labelled=False).net(process)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisoned(Numbered):
    """The same, with a point 7 that is not finite."""

    def arrays(self, split):
        found = super().arrays(split)
        found["x"][7] = np.nan
        return found


class Tally(Controller):
    """Counts its calls and adds up what it was told."""

    def __init__(self):
        self.calls = 0
        self.total = 0.0

    def update(self, metrics):
        self.calls = self.calls + 1
        self.total = self.total + metrics["fake/numbers"]
        return {}

    def state(self):
        return {"calls": self.calls, "total": self.total}

    def restore(self, state):
        self.calls = state["calls"]
        self.total = state["total"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted(DMD2):
    """DMD2 whose critics report the sum and the sum of squares of the numbers in their batch; exact
    in float32.
    """

    def critic_loss(self, net, ctx):
        out = super().critic_loss(net, ctx)
        number = ctx.batch["number"]
        sums = {
            "numbers": (jnp.sum(number), 1.0),
            "squares": (jnp.sum(number**2), 1.0),
        }
        return out._replace(metrics={**out.metrics, **sums})

    def controller(self):
        return Tally()
