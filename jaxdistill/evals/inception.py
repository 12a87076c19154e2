"""Inception-V3's pool features, as every published FID uses them.

The network is TensorFlow's of 2015 in pytorch-fid's layout. It differs from torchvision's in its
pooling branches: averages leave the padding out, and the last block takes a maximum. The user gives
the weights: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, saved again as safetensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped
from safetensors import safe_open

from jaxdistill.core.types import Array, Refused

CONVERT = "torch.load the .pth file, then safetensors.torch.save_file it"
BATCH = 64  # images at once
SIZE = 299  # pixels that images are resized to
EPS = 1e-3  # of the batch norms


def forward(conv: Callable, x: Float[Array, "B H W 3"]) -> Float[Array, "B 2048"]:
    """The mean over positions of the last block, of images in [-1, 1].

    Args:
        conv: (name, x, channels, kernel, stride, padding) -> a convolution with its batch norm and
            rectifier.
    """

    def same(name, x, channels, *kernel):
        return conv(name, x, channels, kernel or (1, 1), 1, "SAME")

    def halve(name, x, channels):
        return conv(name, x, channels, (3, 3), 2, "VALID")

    def chain(name, x, *layers):
        """Convolutions name_1, name_2, ..., each of (channels, *kernel)."""
        for i, layer in enumerate(layers, 1):
            x = same(f"{name}_{i}", x, *layer)
        return x

    def block_a(name, x, pool):
        return _join(
            same(f"{name}.branch1x1", x, 64),
            chain(f"{name}.branch5x5", x, (48,), (64, 5, 5)),
            chain(f"{name}.branch3x3dbl", x, (64,), (96, 3, 3), (96, 3, 3)),
            same(f"{name}.branch_pool", _average(x), pool),
        )

    def block_b(name, x):
        double = chain(f"{name}.branch3x3dbl", x, (64,), (96, 3, 3))
        return _join(
            halve(f"{name}.branch3x3", x, 384),
            halve(f"{name}.branch3x3dbl_3", double, 96),
            _max(x, 2, "VALID"),
        )

    def block_c(name, x, c):
        return _join(
            same(f"{name}.branch1x1", x, 192),
            chain(f"{name}.branch7x7", x, (c,), (c, 1, 7), (192, 7, 1)),
            chain(
                f"{name}.branch7x7dbl",
                x,
                (c,),
                (c, 7, 1),
                (c, 1, 7),
                (c, 7, 1),
                (192, 1, 7),
            ),
            same(f"{name}.branch_pool", _average(x), 192),
        )

    def block_d(name, x):
        three = same(f"{name}.branch3x3_1", x, 192)
        seven = chain(f"{name}.branch7x7x3", x, (192,), (192, 1, 7), (192, 7, 1))
        return _join(
            halve(f"{name}.branch3x3_2", three, 320),
            halve(f"{name}.branch7x7x3_4", seven, 192),
            _max(x, 2, "VALID"),
        )

    def block_e(name, x, pool):
        def fork(stem, x):
            across = same(f"{name}.{stem}a", x, 384, 1, 3)
            down = same(f"{name}.{stem}b", x, 384, 3, 1)
            return _join(across, down)

        return _join(
            same(f"{name}.branch1x1", x, 320),
            fork("branch3x3_2", same(f"{name}.branch3x3_1", x, 384)),
            fork(
                "branch3x3dbl_3",
                chain(f"{name}.branch3x3dbl", x, (448,), (384, 3, 3)),
            ),
            same(f"{name}.branch_pool", pool(x), 192),
        )

    x = halve("Conv2d_1a_3x3", x, 32)
    x = conv("Conv2d_2a_3x3", x, 32, (3, 3), 1, "VALID")
    x = _max(same("Conv2d_2b_3x3", x, 64, 3, 3), 2, "VALID")
    x = same("Conv2d_3b_1x1", x, 80)
    x = _max(conv("Conv2d_4a_3x3", x, 192, (3, 3), 1, "VALID"), 2, "VALID")
    x = block_a("Mixed_5b", x, 32)
    x = block_a("Mixed_5c", x, 64)
    x = block_a("Mixed_5d", x, 64)
    x = block_b("Mixed_6a", x)
    for name, c in (
        ("Mixed_6b", 128),
        ("Mixed_6c", 160),
        ("Mixed_6d", 160),
        ("Mixed_6e", 192),
    ):
        x = block_c(name, x, c)
    x = block_d("Mixed_7a", x)
    x = block_e("Mixed_7b", x, _average)
    x = block_e("Mixed_7c", x, lambda x: _max(x, 1, "SAME"))
    return jnp.mean(x, (1, 2))


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, -1)


def _max(x: Array, stride: int, padding: str) -> Array:
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding
    )


def _average(x: Array) -> Array:
    """3 x 3 means at stride 1 over the pixels inside the image."""

    def total(a):
        return jax.lax.reduce_window(
            a, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
        )

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def shapes() -> dict[str, tuple[int, ...]]:
    """Name of every convolution -> shape of its kernel, (out, in, height, width)."""
    found = {}

    def conv(name, x, channels, kernel, stride, padding):
        found[name] = (channels, x.shape[-1], *kernel)
        return _convolve(x, jnp.zeros(found[name]), stride, padding)

    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    jax.eval_shape(lambda x: forward(conv, x), image)
    return found


def _convolve(x: Array, kernel: Array, stride: int, padding: str) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )


def read(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name of every convolution -> (kernel, bias) with the batch norm folded in, float32.

    Raises:
        Refused: where the file is missing or is no safetensors file, and where an array in it is
            missing or has another shape.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise Refused(
            f"{path}: no such file; expected pytorch-fid's Inception weights as .safetensors "
            f"({CONVERT})"
        )
    try:
        file = safe_open(path, framework="numpy")
    except Exception as error:
        raise Refused(
            f"{path}: not a whole safetensors file ({error}); {CONVERT}"
        ) from error
    with file as weights:
        keys = set(weights.keys())

        def tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
            if key not in keys:
                raise Refused(
                    f"{path}: no key {key!r}; expected pytorch-fid's pt_inception-2015-12-05"
                )
            value = weights.get_tensor(key)
            if value.shape != shape:
                raise Refused(
                    f"{path}: {key} has shape {value.shape}, expected {shape}"
                )
            return value.astype(np.float64)

        folded = {}
        for name, shape in shapes().items():
            channels = shape[:1]
            weight = tensor(f"{name}.bn.weight", channels)
            shift = tensor(f"{name}.bn.bias", channels)
            mean = tensor(f"{name}.bn.running_mean", channels)
            var = tensor(f"{name}.bn.running_var", channels)
            gain = weight / np.sqrt(var + EPS)
            kernel = (
                tensor(f"{name}.conv.weight", shape) * gain[:, None, None, None]
            )
            bias = shift - gain * mean
            folded[name] = (kernel.astype(np.float32), bias.astype(np.float32))
        return folded


def pool_features(
    weights: dict[str, tuple[Array, Array]], x: Shaped[Array, "B H W C"]
) -> Float[Array, "B 2048"]:
    """Features of images of 1 or 3 channels in [-1, 1].

    The images are resized to 299 x 299, bilinear and without antialiasing.
    """

    def conv(name, x, channels, kernel, stride, padding):
        kernel, bias = weights[name]
        return jax.nn.relu(_convolve(x, kernel, stride, padding) + bias)

    x = jnp.broadcast_to(x.astype(jnp.float32), (*x.shape[:3], 3))
    return forward(
        conv,
        jax.image.resize(x, (len(x), SIZE, SIZE, 3), "linear", antialias=False),
    )


def load(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """The feature extractor of an evaluation, from numpy arrays to numpy arrays.

    Returns:
        Images [B H W C] of 1 or 3 channels in [-1, 1] -> features float32 [B 2048].

    Raises:
        Refused: as `read`.
    """
    weights = read(path)
    run = jax.jit(pool_features)

    def features(x: np.ndarray) -> np.ndarray:
        size = min(BATCH, len(x))
        parts = []
        for i in range(0, len(x), size):
            part = x[i : i + size]
            # The last batch is filled up, so that one program serves all.
            filling = np.repeat(part[-1:], size - len(part), 0)
            padded = np.concatenate([part, filling])
            parts.append(np.asarray(run(weights, padded))[: len(part)])
        return np.concatenate(parts)

    return features
