"""Pictures to look at."""

from __future__ import annotations

import numpy as np
from einops import rearrange
from jaxtyping import Shaped
from PIL import Image

COLUMNS = 10
WIDTH = 320  # pixels, about


def grid(x: Shaped[np.ndarray, "B H W C"]) -> Image.Image:
    """Pictures of 1 or 3 channels in [-1, 1] in 10 columns, about 320 pixels wide."""
    x = np.clip((x + 1) * 127.5, 0, 255).astype(np.uint8)
    x = np.pad(
        x, ((0, -len(x) % COLUMNS), (0, 1), (0, 1), (0, 0)), constant_values=96
    )
    pixels = rearrange(x, "(r c) h w d -> (r h) (c w) d", c=COLUMNS)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    scale = max(1, round(WIDTH / image.width))
    size = (image.width * scale, image.height * scale)
    return image.resize(size, Image.Resampling.NEAREST)
