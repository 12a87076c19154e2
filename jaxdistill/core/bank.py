"""Several networks of one kind as one Net, their weights stacked on a leading axis `bank`.

A bank of students trains in one program, and `Rules.bank` may spread it over a mesh axis. A bank
can also store checkpoints of a teacher, which one program reads in turn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdistill.core.net import Net, is_spec, scoped
from jaxdistill.core.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Bank(Net):
    """`members` networks like `one`, each with weights of its own."""

    one: Net | None = None
    members: int = 0

    def init(self, key):
        """Fresh weights, each member from a key of its own."""
        return jax.vmap(self.one.init)(jax.random.split(key, self.members))

    def from_source(self, params: Params) -> Params:
        """The weights of one network, repeated for every member; those of a bank unchanged."""
        single = jax.tree.map(
            lambda w, s: w.ndim < len(s.shape), params, self.shapes
        )
        if not any(jax.tree.leaves(single)):
            return params
        return jax.tree.map(
            lambda w: jnp.broadcast_to(w, (self.members, *w.shape)), params
        )

    @property
    def source(self) -> Net:
        return self.one.source

    def finite(self, grads: Params) -> Array:
        """Whether all entries of each member's gradients are finite, bool [K]."""

        def all_finite(g: Array) -> Array:
            return jnp.all(jnp.isfinite(g).reshape(self.members, -1), axis=1)

        return jnp.all(
            jnp.stack([all_finite(g) for g in jax.tree.leaves(grads)]), axis=0
        )

    def sanitise(self, grads: Params) -> Params:
        """Gradients with zeros for members that have a non-finite one; the others train on."""
        finite = self.finite(grads)

        def keep(g: Array) -> Array:
            mask = finite.reshape(-1, *[1] * (g.ndim - 1))
            return jnp.where(mask, g, 0.0)

        return jax.tree.map(keep, grads)

    def bind(self, role: str, params: Any):
        """The bound callable, with `members`, `weights` (stacked) and `alone(weights, *inputs)`.

        `alone` runs one member; a loss that runs members side by side maps over it.
        """
        call = super().bind(role, params)
        call.members = self.members
        call.weights = params[role]
        call.alone = scoped(role, self.one.apply)
        return call

    def apply(self, params: Params, *args, member: Any = None, **kwargs) -> Any:
        """The outputs of members.

        Without `member`, inputs and outputs are [K B ...], and member k gets inputs[k]. With a
        scalar `member` that network alone runs. With an array [B] each sample gets the output of
        its own member, and every member runs on the full batch.
        """
        if member is None:
            return jax.vmap(lambda p, *a: self.one.apply(p, *a, **kwargs))(
                params, *args
            )
        if jnp.ndim(member) == 0:
            return self.one.apply(
                jax.tree.map(lambda w: w[member], params), *args, **kwargs
            )
        every = jax.vmap(lambda p: self.one.apply(p, *args, **kwargs))(params)
        return jax.tree.map(lambda y: y[member, jnp.arange(y.shape[1])], every)


def bank(net: Net, size: int) -> Bank:
    """A bank of `size` members like `net`. Weights from elsewhere are the same for all members."""
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((size, *s.shape), s.dtype), net.shapes
    )
    axes = jax.tree.map(lambda names: P("bank", *names), net.axes, is_leaf=is_spec)
    return Bank(
        net.build,
        net.graphdef,
        shapes,
        axes,
        net.wrap,
        net.config,
        one=net,
        members=size,
    )
