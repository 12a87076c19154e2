"""Structured pruning of a language model: complete layers and MLP neurons, ranked by activations.

A layer's influence is how far it turns the residual stream, 1 - E cos(before, after) (ShortGPT,
arXiv:2403.03853). A neuron's importance is its mean absolute activation over a sequence, in L2 over
the batch (Minitron, arXiv:2407.14679). Both rank once, on a calibration batch, and train nothing:
the weights that are kept keep their bits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxdistill.core.net import Net, make_net
from jaxdistill.core.types import Array, Batch, Params, Refused
from jaxdistill.models.language.lm import context
from jaxdistill.models.layers import Inside


def importance(
    net: Net, params: Params, batch: Batch
) -> tuple[Float[Array, " L"], Float[Array, "L M"]]:
    """The influence of each layer and the importance of each of its neurons, in float32.

    Args:
        net: a language model.
        params: its weights.
        batch: "tokens" int [B T], and "segments" int [B T] (optional), 0 on padding, which does not
          count.
    """
    tokens = batch["tokens"]
    real = (
        batch["segments"] > 0
        if "segments" in batch
        else jnp.ones(tokens.shape, bool)
    )
    real = real.astype(jnp.float32)

    def read(before: Array, inside: Inside, after: Array) -> tuple[Array, Array]:
        before, neurons, after = (
            a.astype(jnp.float32) for a in (before, inside.neurons, after)
        )
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        cosine = jnp.sum(before * after, -1) / norms
        influence = 1 - jnp.sum(cosine * real) / real.sum()
        sums = jnp.einsum("bt,btm->bm", real, jnp.abs(neurons))
        means = sums / jnp.maximum(real.sum(1), 1)[:, None]
        return influence, jnp.linalg.norm(means, axis=0)

    @jax.jit
    def probe(params: Params) -> tuple[Array, Array]:
        return net.apply(params, read, tokens, **context(batch), method="probe")

    return probe(params)


def keep_layers(
    net: Net, params: Params, layers: Int[Array, " depth"]
) -> tuple[Net, Params]:
    """The model of these layers only, in the given order."""
    blocks = jax.tree.map(lambda w: w[layers], params["blocks"])
    return _resized(net, depth=len(layers)), {**params, "blocks": blocks}


def keep_neurons(
    net: Net, params: Params, neurons: Int[Array, "L mlp"]
) -> tuple[Net, Params]:
    """The model of these MLP neurons only, chosen for each layer."""
    blocks = params["blocks"]

    def columns(w: Array) -> Array:
        """Of a kernel or a bias, stacked over the layers."""
        indices = neurons[:, None, :] if w.ndim == 3 else neurons
        return jnp.take_along_axis(w, indices, -1)

    kernel = jnp.take_along_axis(blocks["down"]["kernel"], neurons[:, :, None], 1)
    kept = {
        name: jax.tree.map(columns, blocks[name])
        for name in ("gate", "up")
        if name in blocks
    }
    kept["down"] = {**blocks["down"], "kernel": kernel}
    return _resized(net, mlp=neurons.shape[1]), {
        **params,
        "blocks": {**blocks, **kept},
    }


def prune(
    net: Net, params: Params, batch: Batch, *, depth: int = 0, mlp: int = 0
) -> tuple[Net, Params]:
    """The `depth` most influential layers with their `mlp` most important neurons.

    Both stay in their old order and are ranked once, on the complete model; 0 keeps all.

    Raises:
        Refused: where more is asked for than there is.
    """
    for name, asked in (("depth", depth), ("mlp", mlp)):
        there = getattr(net.config, name)
        if not 0 <= asked <= there:
            raise Refused(
                f"{name}={asked}: the model has {there} to keep from (0 keeps all)"
            )
    influence, neurons = importance(net, params, batch)
    if mlp:
        net, params = keep_neurons(net, params, _highest(neurons, mlp))
    if depth:
        net, params = keep_layers(net, params, _highest(influence, depth))
    return net, params


def _highest(scores: Array, count: int) -> Array:
    """Indices of the `count` highest scores along the last axis, ascending."""
    return jnp.sort(jax.lax.top_k(scores, count)[1], -1)


def _resized(net: Net, **sizes: int) -> Net:
    config = dataclasses.replace(net.config, **sizes)
    return make_net(config, net.wrap, config)
