"""Differentiable augmentation whose draw several batches of images share, so that only what differs
between them counts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired:
    """One draw for all images of all batches (siamese augmentation, arXiv:2102.08259); points [B D]
    pass unchanged.
    """

    flip: float = 0.5  # probability of a mirror image
    shift: float = 0.125  # largest translation, as a share of the side; what comes in is 0
    brightness: float = 0.2  # largest offset, in units of the data
    contrast: float = 0.2  # largest relative change about each image's mean

    def __call__(self, key: Array, *batches: Array) -> tuple[Array, ...]:
        """Each [B H W C] (the same H and W) or [B D] -> the same shapes."""
        return tuple(self._apply(key, x) for x in batches)

    def _apply(self, key: Array, x: Array) -> Array:
        if x.ndim != 4:
            return x
        draw = lambda i: jax.random.uniform(jax.random.fold_in(key, i), minval=-1.0)
        x = jnp.where(draw(0) < 2 * self.flip - 1, x[:, :, ::-1], x)
        for axis in (1, 2):
            x = _translate(
                x, jnp.round(draw(axis) * self.shift * x.shape[axis]).astype(jnp.int32), axis
            )
        mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
        return (x - mean) * (1 + self.contrast * draw(3)) + mean + self.brightness * draw(4)


def _translate(x: Array, by: Array, axis: int) -> Array:
    """Moved by `by` positions along `axis`, zeros behind it."""
    at = jnp.arange(x.shape[axis]) - by
    inside = (at >= 0) & (at < x.shape[axis])
    moved = jnp.take(x, jnp.clip(at, 0, x.shape[axis] - 1), axis=axis)
    return jnp.where(inside.reshape([-1 if a == axis else 1 for a in range(x.ndim)]), moved, 0)
