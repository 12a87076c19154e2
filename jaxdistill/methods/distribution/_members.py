"""One method for every member of a bank of networks, each on the conditions of its own cell."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Batch, Ctx, Nets, Out, Refused, Turn
from jaxdistill.methods._hosted import Hosted
from jaxdistill.objectives.partition import Partition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Members(Hosted):
    """`host`, by all members of its banks side by side: member k sees conditions of cell k alone,
    except in `pair_...`.
    """

    partition: Partition

    def __post_init__(self):
        if self.host.memory():
            raise Refused(
                f"method: {type(self.host).__name__} has a memory, which members cannot share; expected one without"
            )

    @property
    def turns(self) -> tuple[Turn, ...]:
        each = lambda turn: dict(
            loss=functools.partial(self.loss, turn.loss),
            gather=functools.partial(self.deal, turn.gather),
        )
        return tuple(dataclasses.replace(turn, **each(turn)) for turn in self.host.turns)

    def side_by_side(self, call: Callable, net: Nets, ctx: Ctx):
        """`call(net, ctx)` of every member on its rows of the batch, stacked; the first one draws
        as a host alone would.

        Raises Refused where a role that moves is no bank of `cells` members.
        """
        banks = {role: part for role, part in vars(net).items() if hasattr(part, "weights")}
        cells = self.partition.cells
        for role in self.inits:
            size = getattr(getattr(net, role), "members", 0)
            if size != cells:
                raise Refused(
                    f"config.roles.{role}.bank={size}: expected {cells}, the number of cells of method.partition"
                )
        rows = jax.tree.map(lambda v: v.reshape(cells, -1, *v.shape[1:]), dict(ctx.batch))
        keys = jnp.stack([ctx.rng, *(jax.random.fold_in(ctx.rng, k) for k in range(1, cells))])

        def one(weights, batch, rng):
            mine = {
                role: functools.partial(bank.alone, weights[role]) for role, bank in banks.items()
            }
            return call(
                Nets(**{**vars(net), **mine}), dataclasses.replace(ctx, batch=batch, rng=rng)
            )

        return jax.vmap(one)({role: bank.weights for role, bank in banks.items()}, rows, keys)

    def deal(self, gather: Callable | None, net: Nets, ctx: Ctx) -> Batch:
        """F(D, V_k) of the batch for each k; then what the host gathers."""
        shared = {k: v for k, v in ctx.batch.items() if k.startswith("pair_")}
        own, present = self.partition.deal({k: v for k, v in ctx.batch.items() if k not in shared})
        batch = {**own, **shared}
        if gather is not None:
            made = self.side_by_side(gather, net, dataclasses.replace(ctx, batch=batch))
            batch = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), made)
        return {
            **batch,
            "present": jnp.repeat(present, own["cond"].shape[0] // self.partition.cells),
        }

    def loss(self, loss: Callable, net: Nets, ctx: Ctx) -> Out:
        """The sum of the members' losses, so that each has the gradient that it would have alone;
        metrics are their means.

        A member whose loss is no number, or whose cell is absent, stands still; without any other
        the run stops.
        """
        batch = dict(ctx.batch)
        present = batch.pop("present").reshape(self.partition.cells, -1)[:, 0]
        outs = self.side_by_side(loss, net, dataclasses.replace(ctx, batch=batch))
        sound = present & jnp.isfinite(outs.loss)
        total = lambda v: jnp.where(jnp.any(sound), jnp.sum(jnp.where(sound, v, 0.0)), jnp.nan)
        means = {
            k: total(v) / jnp.sum(sound) for k, v in {"loss": outs.loss, **outs.metrics}.items()
        }
        return Out(total(outs.loss), {**means, "diverged": jnp.sum(present & ~sound)})
