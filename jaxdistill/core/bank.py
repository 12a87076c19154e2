"""Several networks of one kind as a combinator Net -> Net: their weights are stacked on a leading
axis called `bank`.

A bank of students is trained in one program (or spread over a mesh axis, by `Rules.bank`), and a
stored path of teachers is walked without compiling again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdistill.core.net import Net, is_spec, scoped
from jaxdistill.core.types import Params


@dataclasses.dataclass(frozen=True)
class Bank(Net):
    """`members` copies of the network `one`, each with weights of its own."""

    one: Net | None = None
    members: int = 0

    def init(self, key):
        """Every member from a key of its own."""
        return jax.vmap(self.one.init)(jax.random.split(key, self.members))

    def from_source(self, params: Params) -> Params:
        """One network's weights for every member; a bank's own as they are."""
        single = jax.tree.map(lambda w, s: w.ndim < len(s.shape), params, self.shapes)
        if not any(jax.tree.leaves(single)):
            return params
        return jax.tree.map(lambda w: jnp.broadcast_to(w, (self.members, *w.shape)), params)

    @property
    def source(self) -> Net:
        return self.one.source

    def sanitise(self, grads: Params) -> Params:
        """Zero for a member whose gradient is not finite: it stands still, the others go on."""
        each = lambda reduce, g: reduce(g.reshape(self.members, -1), axis=1)
        finite = jnp.all(
            jnp.stack([each(jnp.all, jnp.isfinite(g)) for g in jax.tree.leaves(grads)]), axis=0
        )
        return jax.tree.map(
            lambda g: jnp.where(finite.reshape(-1, *[1] * (g.ndim - 1)), g, 0.0), grads
        )

    def bind(self, role: str, params: Any):
        """As every network's; with it `members`, their stacked `weights`, and `alone(weights of one
        member, *inputs)`: what a loss that runs members side by side maps over.
        """
        call = super().bind(role, params)
        call.members = self.members
        call.weights = params[role]
        call.alone = scoped(role, self.one.apply)
        return call

    def apply(self, params: Params, *args, member: Any = None, **kwargs) -> Any:
        """Without `member`, inputs and result have a leading bank axis [K B ...], member k
        computing row k.

        A scalar `member` (traced or not) is that network alone; an array [B] routes each sample to
        its own, at the cost of running every member on the whole batch.
        """
        if member is None:
            return jax.vmap(lambda p, *a: self.one.apply(p, *a, **kwargs))(params, *args)
        if jnp.ndim(member) == 0:
            return self.one.apply(jax.tree.map(lambda w: w[member], params), *args, **kwargs)
        every = jax.vmap(lambda p: self.one.apply(p, *args, **kwargs))(params)
        return jax.tree.map(lambda y: y[member, jnp.arange(y.shape[1])], every)


def bank(net: Net, size: int) -> Bank:
    """`size` members of `net`'s kind. Frozen roles and warm starts give every member the same
    weights.
    """
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct((size, *s.shape), s.dtype), net.shapes)
    axes = jax.tree.map(lambda names: P("bank", *names), net.axes, is_leaf=is_spec)
    return Bank(net.build, net.graphdef, shapes, axes, net.wrap, net.config, one=net, members=size)
