"""Paired augmentation: one draw for everything, and each change by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.objectives.augment import Paired

OFF = dict(flip=0.0, shift=0.0, brightness=0.0, contrast=0.0)
IMAGE = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))


def runs(paired, n=64):
    return jax.jit(jax.vmap(lambda key: paired(key, IMAGE)[0]))(
        jax.random.split(jax.random.key(1), n)
    )


def test_both_batches_and_all_images_share_the_draw():
    a, b = Paired()(jax.random.key(3), IMAGE, IMAGE[::-1])
    np.testing.assert_array_equal(a, b[::-1])
    assert not np.allclose(a, IMAGE)


def test_points_pass_and_so_does_everything_at_no_strength():
    x = jnp.ones((4, 2))
    assert Paired()(jax.random.key(0), x)[0] is x
    np.testing.assert_allclose(
        runs(Paired(**OFF), 8),
        jnp.broadcast_to(IMAGE, (8, *IMAGE.shape)),
        atol=1e-6,
    )


def test_mirrors_every_other_draw():
    out = runs(Paired(**{**OFF, "flip": 0.5}))
    mirrored = np.array([np.allclose(o, IMAGE[:, :, ::-1], atol=1e-6) for o in out])
    plain = np.array([np.allclose(o, IMAGE, atol=1e-6) for o in out])
    assert np.all(mirrored != plain) and 16 < mirrored.sum() < 48


def test_moves_by_whole_pixels_and_fills_with_zeros():
    seen = set()
    for o in runs(Paired(**{**OFF, "shift": 0.25})):
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                want = np.zeros(IMAGE.shape)
                to = lambda d: slice(max(d, 0), 8 + min(d, 0))
                from_ = lambda d: slice(max(-d, 0), 8 + min(-d, 0))
                want[:, to(dy), to(dx)] = IMAGE[:, from_(dy), from_(dx)]
                if np.allclose(o, want, atol=1e-6):
                    seen.add((dy, dx))
                    break
            else:
                continue
            break
        else:
            raise AssertionError("no translation by up to 2 pixels")
    assert len(seen) > 10


def test_colour_changes_mean_and_contrast_within_bounds():
    out = runs(Paired(**{**OFF, "brightness": 0.2, "contrast": 0.3}))
    offset = out.mean((2, 3, 4)) - IMAGE.mean((1, 2, 3))
    stretch = out.std((2, 3, 4)) / IMAGE.std((1, 2, 3))
    assert (
        0.1 < np.abs(offset).max() <= 0.2 + 1e-5
        and 0.15 < np.abs(stretch - 1).max() <= 0.3 + 1e-5
    )
    np.testing.assert_allclose(offset, offset[:, :1] * np.ones(3), atol=1e-5)


def test_is_differentiable():
    grad = jax.grad(lambda x: Paired()(jax.random.key(3), x)[0].sum())(IMAGE)
    assert np.all(np.isfinite(grad)) and np.any(grad != 0)
