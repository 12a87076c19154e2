"""Differentiable augmentation with one draw for several batches of images.

Since the draw is shared, it does not add to the differences between the batches.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Key, Shaped

from jaxdistill.core.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired:
    """One draw for all images of all batches (siamese augmentation, arXiv:2102.08259)."""

    flip: float = 0.5  # probability of a mirror image
    # largest translation, as a share of the side; pixels moved in are 0
    shift: float = 0.125
    brightness: float = 0.2  # largest offset, in units of the data
    contrast: float = 0.2  # largest relative change about each image's mean

    def __call__(
        self, key: Key[Array, ""], *batches: Shaped[Array, "*_"]
    ) -> tuple[Shaped[Array, "*_"], ...]:
        """Images [B H W C], augmented; points [B D] stay as they are."""
        return tuple(self._augment(key, x) for x in batches)

    def _augment(self, key: Array, x: Array) -> Array:
        if x.ndim != 4:
            return x

        def draw(i: int) -> Array:
            return jax.random.uniform(jax.random.fold_in(key, i), minval=-1.0)

        x = jnp.where(draw(0) < 2 * self.flip - 1, x[:, :, ::-1], x)
        for axis in (1, 2):
            pixels = jnp.round(draw(axis) * self.shift * x.shape[axis]).astype(
                jnp.int32
            )
            x = _translate(x, pixels, axis)
        mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
        return (
            (x - mean) * (1 + self.contrast * draw(3))
            + mean
            + self.brightness * draw(4)
        )


def _translate(x: Array, pixels: Array, axis: int) -> Array:
    """`x` moved by `pixels` positions along `axis`; what is moved in is 0."""
    source = jnp.arange(x.shape[axis]) - pixels
    inside = (source >= 0) & (source < x.shape[axis])
    moved = jnp.take(x, jnp.clip(source, 0, x.shape[axis] - 1), axis=axis)
    shape = [1] * x.ndim
    shape[axis] = -1
    return jnp.where(inside.reshape(shape), moved, 0)
