"""MeanFlow (arXiv:2505.13447) from the paper's equations in plain JAX, without this library.

`python tools/bench.py --case=meanflow_reference` times the library's step against it, in the place
of the hand-written one. The same DiT (arXiv:2212.09748) and batch; a list of layers, one after the
other; one JVP over the batch, the adaptive weight, Adam, and an average of the weights, in one
jitted step that donates its state.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from launch._command import main, no_command
from tools.bench_cases import DIT, Case

FREQUENCIES = 128  # of the features of a time
TIME_SCALE = 1000.0  # the network is given TIME_SCALE * t
MEAN, STD = -0.4, 1.0  # of the logit-normal times
FLOW_SHARE = 0.75  # of the batch, with r = t
WEIGHT_C, WEIGHT_P = 1e-2, 1.0  # of the weight 1 / (error + c)^p
LR, B1, B2, EPS = 1e-4, 0.9, 0.999, 1e-8  # of Adam
DECAY = 0.9999  # of the averaged weights
SIZES = {"patch": DIT["patch"], "heads": DIT["heads"]}  # that no weight has


class State(NamedTuple):
    """Weights, Adam's moments and the averaged weights."""

    step: jax.Array
    params: Any
    first: Any
    second: Any
    average: Any


def start(params: Any) -> State:
    """The state before the first step."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    again = jax.tree.map(jnp.zeros_like, params)
    average = jax.tree.map(jnp.copy, params)
    return State(jnp.int32(0), params, zeros, again, average)


def separate(params: Any) -> Any:
    """Weights of the library's DiT with a list of layers in place of stacked ones."""
    stacked = params["blocks"]
    depth = len(jax.tree.leaves(stacked)[0])
    layers = [jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(depth)]
    return {**params, "blocks": layers}


def linear(w: Any, x: jax.Array) -> jax.Array:
    return x @ w["kernel"] + w["bias"]


def normed(x: jax.Array, eps: float) -> jax.Array:
    """Layer norm without gain and bias."""
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, -1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + eps)


def embedded(w: Any, t: jax.Array) -> jax.Array:
    """Sinusoidal features of times [B], through two layers."""
    powers = jnp.arange(FREQUENCIES) / (FREQUENCIES - 1)
    angles = t[:, None] * 10000.0**-powers
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
    return linear(w["linear_2"], jax.nn.silu(linear(w["linear_1"], features)))


def positions(side: int, dim: int) -> jax.Array:
    """Sinusoidal positions of a grid side x side; columns, then rows."""
    angles = jnp.arange(side)[:, None] * 10000.0 ** -(
        jnp.arange(dim // 4) * 4 / dim
    )
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    columns = jnp.tile(table, (side, 1))
    rows = jnp.repeat(table, side, 0)
    return jnp.concatenate([columns, rows], -1)


def attention(w: Any, x: jax.Array, heads: int) -> jax.Array:
    batch, tokens, dim = x.shape
    cut = (batch, tokens, heads, dim // heads)
    q, k, v = (linear(w[name], x).reshape(cut) for name in ("to_q", "to_k", "to_v"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(dim // heads)
    weights = jax.nn.softmax(scores)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    return linear(w["to_out"], mixed)


def block(w: Any, x: jax.Array, cond: jax.Array, heads: int) -> jax.Array:
    """Attention and an MLP with adaLN-Zero."""
    parts = jnp.split(linear(w["modulation"], cond)[:, None], 6, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    h = normed(x, 1e-6) * (1 + scale1) + shift1
    x = x + gate1 * attention(w, h, heads)
    h = normed(x, 1e-5) * (1 + scale2) + shift2
    h = jax.nn.gelu(linear(w["up"], h), approximate=True)
    return x + gate2 * linear(w["down"], h)


def network(
    w: Any,
    x: jax.Array,
    t: jax.Array,
    r: jax.Array,
    label: jax.Array,
    *,
    patch: int,
    heads: int,
) -> jax.Array:
    """The average velocity u(x, r, t) of samples [B S S C]."""
    batch, size, _, channels = x.shape
    side = size // patch
    cut = x.reshape(batch, side, patch, side, patch, channels)
    h = cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * side, -1)
    h = linear(w["patch_embed"], h)
    h = h + positions(side, h.shape[-1])
    cond = embedded(w["time_embed"], TIME_SCALE * t)
    cond = cond + embedded(w["gap_embed"], TIME_SCALE * (t - r))
    cond = jax.nn.silu(cond + w["label_embed"]["embedding"][label])
    for layer in w["blocks"]:
        h = block(layer, h, cond, heads)
    shift, scale = jnp.split(linear(w["modulation_out"], cond)[:, None], 2, -1)
    h = linear(w["proj_out"], normed(h, 1e-6) * (1 + scale) + shift)
    h = h.reshape(batch, side, side, patch, patch, channels)
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def loss(
    params: Any,
    x: jax.Array,
    label: jax.Array,
    eps: jax.Array,
    t: jax.Array,
    r: jax.Array,
    *,
    patch: int,
    heads: int,
) -> jax.Array:
    """The adaptively weighted error of MeanFlow, eq. 9 to 11 and section 4.3, without guidance."""
    wide = t[:, None, None, None]
    z = (1 - wide) * x + wide * eps
    v = eps - x

    def u(z, t, r):
        return network(params, z, t, r, label, patch=patch, heads=heads)

    tangents = (v, jnp.ones_like(t), jnp.zeros_like(r))
    predicted, derivative = jax.jvp(u, (z, t, r), tangents)
    gap = (t - r)[:, None, None, None]
    target = jax.lax.stop_gradient(v - gap * derivative)
    error = jnp.sum((predicted - target) ** 2, (1, 2, 3))
    weight = jax.lax.stop_gradient(1 / (error + WEIGHT_C) ** WEIGHT_P)
    return jnp.mean(weight * error)


def draw(key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Noise, and times r <= t, which are equal for FLOW_SHARE of the batch."""
    of_noise, of_times = jax.random.split(key)
    eps = jax.random.normal(of_noise, x.shape)
    both = jax.nn.sigmoid(MEAN + STD * jax.random.normal(of_times, (2, len(x))))
    t = jnp.max(both, 0)
    r = jnp.min(both, 0)
    flow = jnp.arange(len(x)) < FLOW_SHARE * len(x)
    return eps, t, jnp.where(flow, t, r)


def updated(state: State, grads: Any) -> State:
    """The state after Adam's update and that of the averaged weights."""
    n = state.step + 1
    first = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, state.first, grads)
    second = jax.tree.map(
        lambda v, g: B2 * v + (1 - B2) * g**2, state.second, grads
    )
    of_first = 1 - B1**n
    of_second = 1 - B2**n

    def moved(w, m, v):
        return w - LR * (m / of_first) / (jnp.sqrt(v / of_second) + EPS)

    def averaged(a, w):
        return DECAY * a + (1 - DECAY) * w

    params = jax.tree.map(moved, state.params, first, second)
    average = jax.tree.map(averaged, state.average, params)
    return State(n, params, first, second, average)


def step(
    state: State, x: jax.Array, label: jax.Array, key: jax.Array, **sizes: int
) -> tuple[State, jax.Array]:
    """One step of training, and its loss."""
    eps, t, r = draw(jax.random.fold_in(key, state.step), x)
    differentiate = jax.value_and_grad(loss)
    value, grads = differentiate(state.params, x, label, eps, t, r, **sizes)
    return updated(state, grads), value


class Reference(Case):
    """The case of MeanFlow whose other side is this file's step."""

    def prepare_hand(self):
        """Makes the first state and the program of the reference."""
        params = separate(self.state.params["student"])
        self.reference = start(jax.tree.map(jnp.copy, params))

        def train(state, x, label, key):
            return step(state, x, label, key, **SIZES)

        self.by_hand = jax.jit(train, donate_argnums=0)

    def hand(self, i):
        x = self.batch["x"]
        label = self.batch["cond"]
        self.reference, value = self.by_hand(self.reference, x, label, self.rng)
        return value


if __name__ == "__main__":
    main(no_command, __doc__)
