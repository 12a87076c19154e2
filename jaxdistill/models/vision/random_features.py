"""Networks with random weights that are never trained, to compare samples in the spaces that they
span.

He-normal weights, biases N(0, 1), average pooling, no batch statistics; features are divided by the
root of their number, so that a linear kernel on them has one scale for all. Without biases and
normalisation psi(c x) = c psi(x), which cannot tell two isotropic laws of equal E|x| apart, and a
normalised first layer does not see a sample's own scale and mean: hence the biases, and the `plain`
kinds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

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
    """A row of ARCHS. Raises Refused on an unknown name."""
    return lookup(ARCHS, name, "arch")


def random_feature_net(key: Array, arch: Arch, *, bias: float = 1.0) -> Features:
    """`psi(x, label=None)` -> one [B features] for each block, float32; pure, its weights drawn
    from `key` where it is called.

    `label` int [B] joins the first layer by a random vector N(0, 1) for each class: psi then
    compares joint laws. `bias` is the standard deviation of the biases.
    """

    def psi(x: Array, label: Array | None = None) -> tuple[Array, ...]:
        h = x.astype(jnp.float32)
        features = []
        if not arch.convolutional:
            h = h.reshape(len(h), -1)
        for i in range(arch.depth):
            at = jax.random.fold_in(key, i)
            joined = (
                _label_vectors(jax.random.fold_in(at, 2), label, arch.width)
                if i == 0 and label is not None
                else 0.0
            )
            h = _block(at, h, arch, bias, joined)
            features.append(h.reshape(len(h), -1))
        return tuple(f / f.shape[1] ** 0.5 for f in features)

    return psi


def _label_vectors(key: Array, label: Array, width: int) -> Array:
    return jax.vmap(lambda c: jax.random.normal(jax.random.fold_in(key, c), (width,)))(label)


def _block(key: Array, h: Array, arch: Arch, bias: float, joined: Array | float) -> Array:
    """One layer; convolutions are followed by pooling 2 x 2 while the map is larger than one
    position.
    """
    shift = bias * jax.random.normal(jax.random.fold_in(key, 1), (arch.width,)) + joined
    if not arch.convolutional:
        return jax.nn.relu(h @ _he(key, (h.shape[1], arch.width)) + shift)
    shift = shift.reshape(-1, 1, 1, arch.width)
    out = jax.nn.relu(
        _normalise(_convolve(h, _he(key, (3, 3, h.shape[3], arch.width))), arch) + shift
    )
    if arch.residual and h.shape[3] == arch.width:
        second = jax.random.fold_in(key, 3)
        out = jax.nn.relu(
            h + _normalise(_convolve(out, _he(second, (3, 3, arch.width, arch.width))), arch)
        )
    if min(out.shape[1:3]) < 2:
        return out
    pooled = jax.lax.reduce_window(out, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return pooled / 4


def _he(key: Array, shape: tuple[int, ...]) -> Array:
    fan_in = 1
    for n in shape[:-1]:
        fan_in *= n
    return jax.random.normal(key, shape) * (2 / fan_in) ** 0.5


def _convolve(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _normalise(h: Array, arch: Arch) -> Array:
    """Each channel of each sample to mean 0 and variance 1 (instance norm)."""
    if not arch.normalised or min(h.shape[1:3]) < 2:
        return h
    return (h - h.mean((1, 2), keepdims=True)) * jax.lax.rsqrt(h.var((1, 2), keepdims=True) + 1e-5)
