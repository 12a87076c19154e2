"""One method for every member of a bank of networks, each on the conditions of its own cell."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Refused, Turn
from jaxdistill.methods._hosted import Hosted
from jaxdistill.objectives.partition import Partition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Members(Hosted):
    """The host method on all members of its banks, side by side.

    Member k sees samples of cell k only, but in the batch's keys `pair_...` those of all cells.
    """

    partition: Partition

    def __post_init__(self):
        if self.host.memory():
            host = type(self.host).__name__
            raise Refused(
                f"method: {host} has a memory, which members cannot share"
            )

    @property
    def turns(self) -> tuple[Turn, ...]:
        turns = []
        for turn in self.host.turns:
            loss = functools.partial(self.total_loss, turn.loss)
            gather = functools.partial(self.split, turn.gather)
            turns.append(dataclasses.replace(turn, loss=loss, gather=gather))
        return tuple(turns)

    def side_by_side(self, call: Callable, net: Nets, ctx: Ctx) -> Any:
        """What `call(net, ctx)` returns for every member on its part of the batch, stacked.

        The first member has the host's own random numbers.

        Raises:
            Refused: A role that moves is not a bank of as many members as there are cells.
        """
        cells = self.partition.cells
        for role in self.inits:
            size = getattr(getattr(net, role), "members", 0)
            if size != cells:
                expected = (
                    f"expected {cells}, the number of cells of method.partition"
                )
                raise Refused(f"config.roles.{role}.bank={size}: {expected}")
        banks = {
            role: part
            for role, part in vars(net).items()
            if hasattr(part, "weights")
        }

        def call_member(weights: dict[str, Any], batch: Batch, rng: Array) -> Any:
            alone = {}
            for role, bank in banks.items():
                alone[role] = functools.partial(bank.alone, weights[role])
            own = dataclasses.replace(ctx, batch=batch, rng=rng)
            return call(Nets(**{**vars(net), **alone}), own)

        weights = {role: bank.weights for role, bank in banks.items()}
        batches = jax.tree.map(
            lambda v: v.reshape(cells, -1, *v.shape[1:]), dict(ctx.batch)
        )
        later = (jax.random.fold_in(ctx.rng, k) for k in range(1, cells))
        rngs = jnp.stack([ctx.rng, *later])
        return jax.vmap(call_member)(weights, batches, rngs)

    def split(self, gather: Callable | None, net: Nets, ctx: Ctx) -> Batch:
        """The batch, ordered by cell, as F(D, V_k) of the paper; then what the host gathers."""
        pairs = {key: v for key, v in ctx.batch.items() if key.startswith("pair_")}
        samples = {key: v for key, v in ctx.batch.items() if key not in pairs}
        samples, present = self.partition.split(samples)
        batch = {**samples, **pairs}
        if gather is not None:
            stacked = self.side_by_side(
                gather, net, dataclasses.replace(ctx, batch=batch)
            )
            batch = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), stacked)
        share = samples["cond"].shape[0] // self.partition.cells
        return {**batch, "present": jnp.repeat(present, share)}

    def total_loss(self, loss: Callable, net: Nets, ctx: Ctx) -> Out:
        """The sum of the members' losses, so that each member has the gradient of its own loss.

        Metrics are means over members. A member whose loss is not finite, or whose cell is absent
        from the batch, does not move; if no other member is left, the loss is NaN and the run
        stops.
        """
        batch = dict(ctx.batch)
        present = batch.pop("present").reshape(self.partition.cells, -1)[:, 0]
        outs = self.side_by_side(loss, net, dataclasses.replace(ctx, batch=batch))
        valid = present & jnp.isfinite(outs.loss)

        def total(values: Array) -> Array:
            return jnp.where(
                jnp.any(valid), jnp.sum(jnp.where(valid, values, 0.0)), jnp.nan
            )

        metrics = {}
        for name, values in {"loss": outs.loss, **outs.metrics}.items():
            metrics[name] = total(values) / jnp.sum(valid)
        metrics["diverged"] = jnp.sum(present & ~valid)
        return Out(total(outs.loss), metrics)
