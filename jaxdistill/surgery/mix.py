"""Weights of one network drawn towards those of another."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Params, Refused


def mix(
    params: Mapping[str, Params], role: str, other: str, keep: float
) -> dict[str, Params]:
    """The weights of `role` drawn towards those of `other`: keep * role + (1 - keep) * other.

    Args:
        params: Role -> weights.
        role: The network that moves.
        other: A network of the same weights' names and shapes.
        keep: Share of its own weights that the network keeps.

    Returns:
        `role` -> its new weights, as `Turn.after` gives them.

    Raises:
        Refused: The two networks have weights of different names or shapes.
    """
    own = params[role]
    towards = params[other]
    if jax.tree.map(jnp.shape, own) != jax.tree.map(jnp.shape, towards):
        raise Refused(
            f"roles.{role}: its weights are mixed with those of roles.{other}; expected the same "
            f"model in both, and either two adapters of one rank or none"
        )
    return {
        role: jax.tree.map(lambda w, o: keep * w + (1 - keep) * o, own, towards)
    }
