"""Samples as the frozen networks that judge pictures see them: decoded, resized, in units of their
own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array


def decoded(decoder: Callable, x0: Array) -> Array:
    """What a student makes, as pictures in -1..1 [B H W C]; `decoder` is a role with the methods
    `denormalise` and `decode`.
    """
    return decoder(decoder(x0, method="denormalise"), method="decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Pictures in -1..1 for a network that wants them at its own size, less `mean` and over `std`
    of pixels in 0..1. As it stands it changes nothing. Differentiable.
    """

    mean: tuple[float, ...] = (0.5,)  # of each channel, or of all
    std: tuple[float, ...] = (0.5,)
    size: int = 0  # pixels a side, by interpolation (antialiased, as PIL's); 0: as they are
    filter: str = "cubic"  # cubic | linear

    def __call__(self, image: Array) -> Array:
        """[B H W C] -> [B size size C] in the same dtype."""
        if self.size:
            image = jax.image.resize(
                image, (len(image), self.size, self.size, image.shape[-1]), self.filter
            )
        mean = jnp.asarray(self.mean, image.dtype)
        std = jnp.asarray(self.std, image.dtype)
        return image * (0.5 / std) + (0.5 - mean) / std


CLIP = Preprocess(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), size=224
)
SAM = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # at 1024 pixels
