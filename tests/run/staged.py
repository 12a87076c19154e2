"""A method of two stages that uses every piece of a stage, on a mixture of points.

The first stage measures the scale of the data, and trains a network with batch norms. The second
makes a pool of records with the first stage's last weights, and trains the output layer alone.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.sums import summed
from jaxdistill.core.types import Calibrate, Method, Out, Pool, Stage, stage_lengths
from jaxdistill.data import arrayrecord
from jaxdistill.data.mixtures import Mixture
from jaxdistill.models.layers import BatchNorm, dense

ITEMS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normed:
    """A perceptron with a batch norm, from points to points."""

    width: int = 16

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        return NormedModule(self, rngs)


class NormedModule(nnx.Module):
    def __init__(self, cfg: Normed, rngs: nnx.Rngs):
        self.up = dense(2, cfg.width, (None, "mlp"), rngs=rngs)
        self.norm = BatchNorm(cfg.width, rngs=rngs)
        self.down = dense(cfg.width, 2, ("mlp", None), rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.norm(self.up(x))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged(Method):
    """Learns to halve points, with noise of the measured scale on them."""

    scale: float | None = None  # of the data; None: measured
    last: bool = False  # this is the second stage

    inits = {"student": None}
    frozen = ()

    @property
    def trains(self) -> Mapping[str, str]:
        return {"student": r"down/.*"} if self.last else {}

    def stages(self, steps: int) -> tuple[Stage, ...]:
        first, second = stage_lengths(steps, 2)
        calibrate = Calibrate(self.measure, {"scale": 1.0})
        pool = Pool(self.items, self.make, self.read)
        tuned = dataclasses.replace(self, last=True)
        return (
            Stage(self, first, calibrate=calibrate, last=("student",)),
            Stage(tuned, second, pool=pool),
        )

    def measure(self, nets, params, batches) -> Method:
        def terms(net, batch):
            return {
                "square": jnp.sum(batch["x"] ** 2),
                "count": jnp.sum(batch["x"] ** 0),
            }

        sums = summed(nets, params, itertools.islice(batches, 4), terms)
        return dataclasses.replace(
            self, scale=float(sums["square"] / sums["count"]) ** 0.5
        )

    def items(self, data: Any) -> list[str]:
        return [f"item{i}" for i in range(ITEMS)]

    def make(self, net, data, item: str):
        """As many records as the item's number says: outputs of the first stage's last weights."""
        number = int(item.removeprefix("item"))
        x = np.random.default_rng(number).standard_normal((number + 12, 2))
        made = np.asarray(jax.jit(net.last_student)(x.astype(np.float32)))
        for one in made:
            yield {"x": one}

    def read(self, data: Any, folder):
        return arrayrecord.stored(
            folder, batch_size=data.batch_size, seed=data.seed
        )

    def loss(self, net, ctx) -> Out:
        x0 = ctx.batch["x"]
        noise = jax.random.normal(ctx.key("noise"), x0.shape)
        x = x0 + 0.1 * self.scale * noise
        if self.last:
            return Out(jnp.mean((net.student(x) - 0.5 * x0) ** 2))
        made, statistics = net.student.training(x)
        loss = jnp.mean((made - 0.5 * x0) ** 2)
        return Out(loss, statistics={"student": statistics})


def get_config(variant=""):
    """The experiment; "given" states the scale."""
    return experiment(
        steps=20,
        log_every=1,
        checkpoint_every=3,
        tensorboard=False,
        mesh=MeshShape(data=1, fsdp=1, tensor=1),
        data=Mixture(batch_size=16, labelled=False),
        method=Staged(scale=0.25 if variant == "given" else None),
        roles=dict(
            student=Role(
                model=Normed(), optimizer=Optimizer(lr=1e-2), ema=Ema(rate=0.9)
            )
        ),
    )
