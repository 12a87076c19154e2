"""Pictures for frozen networks: against transformers' processors, and the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives import pixels


def picture(size):
    """A smooth picture of three waves, uint8 [size size 3]."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(9 * x + 4 * y), np.cos(7 * y * x), np.sin(3 * x - 8 * y)]
    return np.uint8(np.round(127.5 + 120 * np.stack(waves, -1)))


def test_as_it_stands_nothing_changes():
    x = jax.random.normal(jax.random.key(0), (5, 2))
    np.testing.assert_array_equal(pixels.Preprocess()(x), x)


@pytest.mark.parametrize("size", [96, 224, 512])
def test_clips_processor(size):
    """PIL rounds to whole steps of 255 after each of two passes: half a step, times 1.25 (the sum
    of a cubic's absolute weights) in the second pass, and half a step more.
    """
    transformers = pytest.importorskip(
        "transformers", reason="CLIP's processor is transformers'"
    )
    pytest.importorskip(
        "torch", reason="transformers' processors need torch (extra [torch])"
    )
    image = picture(size)
    theirs = transformers.CLIPImageProcessor()(image, return_tensors="np")[
        "pixel_values"
    ][0].transpose(1, 2, 0)
    ours = pixels.CLIP(jnp.asarray(image[None], jnp.float32) / 127.5 - 1)[0]
    assert ours.shape == theirs.shape == (224, 224, 3)
    assert (
        np.abs(ours - theirs) * np.array(pixels.CLIP.std) * 255
    ).max() <= 1.125 + 1e-3


def test_linear_interpolation_is_pytorchs(x64):
    torch = pytest.importorskip(
        "torch", reason="compares with PyTorch (extra [torch])"
    )
    image = np.random.default_rng(0).standard_normal((2, 32, 32, 3))
    want = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(0, 3, 1, 2), size=224, mode="bilinear"
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(
        pixels.Preprocess(size=224, filter="linear")(jnp.asarray(image)),
        want.numpy(),
        atol=1e-12,
    )


def test_sams_statistics():
    """Pixel values of 0..255 less (123.675, 116.28, 103.53) over (58.395, 57.12, 57.375), as the
    released code has them.
    """
    image = picture(64)
    want = (image - np.array([123.675, 116.28, 103.53])) / np.array(
        [58.395, 57.12, 57.375]
    )
    np.testing.assert_allclose(
        pixels.SAM(jnp.asarray(image[None], jnp.float32) / 127.5 - 1)[0],
        want,
        atol=1e-5,
    )


def test_gradients_pass_and_dtypes_stay():
    x = jnp.zeros((1, 32, 32, 3), jnp.bfloat16)
    assert pixels.CLIP(x).dtype == jnp.bfloat16
    grad = jax.grad(lambda x: jnp.sum(pixels.CLIP(x) ** 2))(x.astype(jnp.float32))
    assert np.all(grad != 0)


def test_decoded_scales_back_first():
    decoder = lambda x, method: {
        "denormalise": lambda x: x + 1,
        "decode": lambda x: 10 * x,
    }[method](x)
    np.testing.assert_array_equal(
        pixels.decoded(decoder, jnp.ones(3)), 20 * jnp.ones(3)
    )
