"""Structured pruning of a language model: whole layers and MLP neurons, ranked once by activations
on a calibration batch.

A layer's influence is how far it turns the residual stream, 1 - E cos(before, after) (ShortGPT,
arXiv:2403.03853); a neuron's importance is its mean absolute activation over a sequence, in L2 over
the batch (Minitron, arXiv:2407.14679).
Both rank and never train: what is kept is bit for bit what it was.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.net import Net, make_net
from jaxdistill.core.types import Array, Batch, Params, Refused
from jaxdistill.models.language.lm import context


def importance(net: Net, params: Params, batch: Batch) -> tuple[Array, Array]:
    """(influence of layers [L], importance of their neurons [L M]), float32, on batch["tokens"] int
    [B T].

    Where batch["segments"] is 0 stands padding, which does not count.
    """
    tokens = batch["tokens"]
    real = (batch["segments"] > 0 if "segments" in batch else jnp.ones(tokens.shape, bool)).astype(
        jnp.float32
    )

    def read(before: Array, neurons: Array, after: Array) -> tuple[Array, Array]:
        before, neurons, after = (a.astype(jnp.float32) for a in (before, neurons, after))
        cosine = jnp.sum(before * after, -1) / (
            jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        )
        mean = (
            jnp.einsum("bt,btm->bm", real, jnp.abs(neurons)) / jnp.maximum(real.sum(1), 1)[:, None]
        )
        return 1 - jnp.sum(cosine * real) / real.sum(), jnp.linalg.norm(mean, axis=0)

    return jax.jit(
        lambda params: net.apply(params, read, tokens, **context(batch), method="probe")
    )(params)


def keep_layers(net: Net, params: Params, layers: Array) -> tuple[Net, Params]:
    """The model of these layers only, int [depth], in the given order."""
    blocks = jax.tree.map(lambda w: w[layers], params["blocks"])
    return _resized(net, depth=len(layers)), {**params, "blocks": blocks}


def keep_neurons(net: Net, params: Params, neurons: Array) -> tuple[Net, Params]:
    """The model of these MLP neurons only, int [L, mlp]: each layer its own."""
    blocks = params["blocks"]
    columns = lambda w: jnp.take_along_axis(
        w, neurons[:, None, :] if w.ndim == 3 else neurons, -1
    )  # of a kernel or a bias
    rows = {"kernel": jnp.take_along_axis(blocks["down"]["kernel"], neurons[:, :, None], 1)}
    into = {name: jax.tree.map(columns, blocks[name]) for name in ("gate", "up") if name in blocks}
    blocks = {**blocks, **into, "down": blocks["down"] | rows}
    return _resized(net, mlp=neurons.shape[1]), {**params, "blocks": blocks}


def prune(
    net: Net, params: Params, batch: Batch, *, depth: int = 0, mlp: int = 0
) -> tuple[Net, Params]:
    """The `depth` most influential layers with their `mlp` most important neurons, in their old
    order; 0 keeps all.

    Ranked once, on the whole model. Raises Refused where more is asked for than there is.
    """
    for name, asked in (("depth", depth), ("mlp", mlp)):
        if not 0 <= asked <= getattr(net.config, name):
            raise Refused(
                f"{name}={asked}: the model has {getattr(net.config, name)} to keep from (0 keeps all)"
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
