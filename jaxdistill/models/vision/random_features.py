"""Networks with random weights that are never trained, to compare samples by their features.

Weights are He-normal, biases N(0, 1); there is average pooling and no batch statistics. Features
are divided by the root of their number, so that a linear kernel on them has one scale for all
networks. Without biases and normalisation psi(c x) = c psi(x), which cannot tell two isotropic
distributions of equal E|x| apart, and a normalised first layer does not see a sample's own scale
and mean: hence the biases, and the `plain` kinds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key, Num

from jaxdistill.core.types import Array, lookup

Features = Callable[..., tuple[Array, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arch:
    """One kind of random network: an MLP for [B dim], convolutions for [B H W C]."""

    depth: int
    width: int  # channels
    convolutional: bool = True
    normalised: bool = True  # each sample's channels, before the biases
    residual: bool = False


ARCHS = {
    "convnet-2": Arch(depth=2, width=128),
    "convnet-3": Arch(depth=3, width=128),
    "convnet-4": Arch(depth=4, width=128),
    "plain-2": Arch(depth=2, width=128, normalised=False),
    "plain-3": Arch(depth=3, width=128, normalised=False),
    "resnet": Arch(depth=3, width=64, residual=True),
    "mlp": Arch(depth=2, width=256, convolutional=False, normalised=False),
}


def arch(name: str) -> Arch:
    """The entry of ARCHS. Raises Refused on an unknown name."""
    return lookup(ARCHS, name, "arch")


def random_feature_net(
    key: Key[Array, ""], arch: Arch, *, bias: float = 1.0
) -> Features:
    """A pure function psi(x, label=None) -> features [B F] of each block, in float32.

    Its weights are drawn from `key` where it is called. Labels int [B] add a random vector N(0, 1)
    of their class to the first layer: psi then compares joint distributions.

    Args:
        key: of the weights.
        arch: kind of network.
        bias: standard deviation of the biases.
    """

    def psi(
        x: Num[Array, "B ..."], label: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B _"], ...]:
        h = x.astype(jnp.float32)
        features = []
        if not arch.convolutional:
            h = h.reshape(len(h), -1)
        for i in range(arch.depth):
            block_key = jax.random.fold_in(key, i)
            label_shift = 0.0
            if i == 0 and label is not None:
                label_key = jax.random.fold_in(block_key, 2)
                label_shift = _label_vectors(label_key, label, arch.width)
            h = _block(block_key, h, arch, bias, label_shift)
            features.append(h.reshape(len(h), -1))
        return tuple(f / f.shape[1] ** 0.5 for f in features)

    return psi


def _label_vectors(key: Array, label: Array, width: int) -> Array:
    """[B width]: the random vector of each label's class."""
    vector = lambda c: jax.random.normal(jax.random.fold_in(key, c), (width,))
    return jax.vmap(vector)(label)


def _block(
    key: Array, h: Array, arch: Arch, bias: float, label_shift: Array | float
) -> Array:
    """One layer, with 2 x 2 pooling behind a convolution while the map has several positions."""
    shift = (
        bias * jax.random.normal(jax.random.fold_in(key, 1), (arch.width,))
        + label_shift
    )
    if not arch.convolutional:
        return jax.nn.relu(h @ _he(key, (h.shape[1], arch.width)) + shift)
    shift = shift.reshape(-1, 1, 1, arch.width)
    kernel = _he(key, (3, 3, h.shape[3], arch.width))
    out = jax.nn.relu(_normalise(_convolve(h, kernel), arch) + shift)
    if arch.residual and h.shape[3] == arch.width:
        kernel = _he(jax.random.fold_in(key, 3), (3, 3, arch.width, arch.width))
        out = jax.nn.relu(h + _normalise(_convolve(out, kernel), arch))
    if min(out.shape[1:3]) < 2:
        return out
    window = (1, 2, 2, 1)
    pooled = jax.lax.reduce_window(out, 0.0, jax.lax.add, window, window, "VALID")
    return pooled / 4


def _he(key: Array, shape: tuple[int, ...]) -> Array:
    """Weights N(0, 2 / fan-in), the last axis that of the outputs."""
    fan_in = math.prod(shape[:-1])
    return jax.random.normal(key, shape) * (2 / fan_in) ** 0.5


def _convolve(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _normalise(h: Array, arch: Arch) -> Array:
    """Each channel of each sample to mean 0 and variance 1 (instance norm)."""
    if not arch.normalised or min(h.shape[1:3]) < 2:
        return h
    centred = h - h.mean((1, 2), keepdims=True)
    return centred * jax.lax.rsqrt(h.var((1, 2), keepdims=True) + 1e-5)
