"""Samples as pictures, in the size and the units that frozen networks for pictures take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from jaxdistill.core.types import Array


def decoded(
    decoder: Callable, x0: Shaped[Array, "B ..."]
) -> Shaped[Array, "B ..."]:
    """Samples of a student as pictures in -1..1.

    `decoder` is a role with the methods `denormalise` and `decode`.
    """
    return decoder(decoder(x0, method="denormalise"), method="decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Pictures in -1..1 for a network that takes them at its own size, less `mean` and over `std`
    of pixels in 0..1.

    With its defaults it changes nothing. It is differentiable.
    """

    mean: tuple[float, ...] = (0.5,)  # of each channel, or of all
    std: tuple[float, ...] = (0.5,)
    # pixels a side, by interpolation (antialiased, as PIL's); 0: as they are
    size: int = 0
    filter: str = "cubic"  # cubic | linear

    def __call__(self, image: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
        """The pictures as the network takes them, in the same dtype."""
        if self.size:
            shape = (len(image), self.size, self.size, image.shape[-1])
            image = jax.image.resize(image, shape, self.filter)
        mean = jnp.asarray(self.mean, image.dtype)
        std = jnp.asarray(self.std, image.dtype)
        return image * (0.5 / std) + (0.5 - mean) / std


CLIP = Preprocess(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    size=224,
)
# at 1024 pixels
SAM = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
