"""Attention by blocks: every path gives the values and gradients of dense scores.

The masks are known to the program, or data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.models import splash as kernel
from jaxdistill.models.attention import (
    attention,
    blockwise,
    plain,
    splash,
)
from jaxdistill.models.masks import BlockMask, attending, expand
from tests.models.dense import (
    B,
    H,
    causal_mask,
    close,
    dense,
    grid,
    inputs,
    of_keys,
    results,
)

pytestmark = pytest.mark.usefixtures("interpreted")


# (seen, query block, key block, queries, keys)
BLOCKS = {
    "one for all": (grid(3, 2), 128, 256, 384, 512),
    "by head": (grid(H, 3, 2), 128, 256, 384, 512),
    "by sample": (grid(B, 1, 3, 2), 128, 256, 384, 512),
    "by sample and head, blocks that fill no tile": (
        grid(B, H, 3, 4),
        70,
        50,
        200,
        190,
    ),
}


@pytest.mark.parametrize("known", [True, False], ids=["static", "at run time"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("path", [plain, blockwise, splash])
def test_blocks(name, path, known):
    seen, query_block, key_block, queries, keys = BLOCKS[name]
    blocks = BlockMask(seen if known else jnp.asarray(seen), query_block, key_block)
    q, k, v, w = inputs(queries, keys)
    visible = expand(BlockMask(seen, query_block, key_block), queries, keys)
    close(
        results(path, q, k, v, w, blocks=blocks),
        dense(q, k, v, w, visible),
    )


@pytest.mark.parametrize("path", [plain, blockwise, splash])
def test_blocks_with_masked_keys_and_causal(path):
    q, k, v, w = inputs(200, 190)
    blocks = BlockMask(grid(H, 3, 4), 70, 50)
    mask = ~of_keys(190, 60, 0)
    visible = expand(blocks, 200, 190) & mask & causal_mask(200, 190)
    seen = np.broadcast_to(visible.any(-1), (B, H, 200))
    assert not seen.all() and seen.any()
    np.testing.assert_array_equal(
        np.broadcast_to(attending(mask, blocks, True, 200, 190), seen.shape), seen
    )
    how = dict(blocks=blocks, mask=jnp.asarray(mask), causal=True)
    close(results(path, q, k, v, w, **how), dense(q, k, v, w, visible))


def test_expanded_blocks_are_those_of_the_tokens():
    seen = grid(B, H, 3, 4)
    found = expand(BlockMask(seen, 70, 50), 200, 190)
    for t, s in ((0, 0), (69, 49), (70, 50), (199, 189), (139, 150)):
        np.testing.assert_array_equal(found[..., t, s], seen[..., t // 70, s // 50])


@pytest.mark.parametrize(
    "shape, causal", [((H, 3, 2), True), ((B, H, 3, 2), False)]
)
def test_lists_that_exceed_the_scalar_memory(shape, causal, monkeypatch):
    """Some heads, or one head and some queries, at a time give the same as all at once."""
    q, k, v, w = inputs(384, 512)
    mask = jnp.asarray(of_keys(512, 500, 30))
    how = dict(blocks=BlockMask(grid(*shape), 128, 256), causal=causal, mask=mask)
    at_once = results(splash, q, k, v, w, **how)
    heads_of_two = 2 * 32 * 128 * 2
    for most in (heads_of_two, 1):
        monkeypatch.setattr(kernel, "SCALARS", most)
        close(results(splash, q, k, v, w, **how), at_once)


def test_lists_of_many_tiles_have_wider_indices():
    seen = np.zeros((1, 1, 300), bool)
    seen[..., [127, 128, 299]] = True
    indices, flags = kernel._visits(jnp.asarray(seen), 4)
    assert indices.tolist() == [[[127, 128, 299, 299]]]
    assert flags.tolist() == [[[2, 2, 2, 0]]]


@pytest.mark.parametrize("path", [plain, blockwise, splash])
def test_masks_of_layers_are_scanned(path):
    """A stack of masks, one a layer, as data beside the weights; against the layers one by one."""
    q, k, v, _ = inputs(256, 256)
    seen = grid(3, 2, 2)
    seen[:, 1, 0] = True

    def stack(x, seen):
        def layer(x, seen):
            return x + path(x, k, v, blocks=BlockMask(seen, 128, 128)), None

        return jnp.sum(jax.lax.scan(layer, x, seen)[0] ** 2)

    expected = lambda x: jnp.sum(
        functools.reduce(
            lambda x, seen: x + plain(x, k, v, blocks=BlockMask(seen, 128, 128)),
            seen,
            x,
        )
        ** 2
    )
    found = jax.jit(jax.grad(stack))(q, jnp.asarray(seen))
    np.testing.assert_allclose(
        found, jax.jit(jax.grad(expected))(q), rtol=1e-4, atol=1e-4
    )


def test_masks_are_mapped():
    """vmap over masks, of the kernel and of the blockwise path."""
    q, k, v, _ = inputs(256, 256)
    seen = jnp.asarray(grid(3, H, 2, 2))
    mapped = lambda path: jax.vmap(
        lambda seen: path(q, k, v, blocks=BlockMask(seen, 128, 128))
    )
    expected = jax.jit(mapped(plain))(seen)
    for path in (blockwise, splash):
        np.testing.assert_allclose(
            jax.jit(mapped(path))(seen), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("known", [True, False], ids=["static", "at run time"])
def test_blockwise_in_forward_mode(known):
    """The tangent, and the gradient of its square, at unlike lengths with blocks."""
    q, k, v, w = inputs(200, 190)
    seen = grid(H, 3, 4)
    visible = expand(BlockMask(seen, 70, 50), 200, 190)

    def both(path, q, data):
        tangent = lambda q: jax.jvp(lambda q: path(q, data), (q,), (w,))[1]
        return tangent(q), jax.grad(lambda q: jnp.sum(tangent(q) ** 2))(q)

    def ours(q, data):
        blocks = BlockMask(seen if known else data, 70, 50)
        return blockwise(q, k, v, blocks=blocks, block=64)

    exact = lambda q, _: plain(q, k, v, mask=visible)
    run = jax.jit(both, static_argnums=0)
    close(run(ours, q, seen), run(exact, q, seen))


def test_blockwise_skips_blocks():
    """Keys of blocks that nothing sees are not read: NaN in them does no harm."""
    q, k, v, _ = inputs(128, 256)
    blocks = BlockMask(np.array([[True, False]]), 128, 128)
    broken = k.copy()
    broken[:, 128:] = np.nan
    run = jax.jit(functools.partial(blockwise, blocks=blocks, block=128))
    np.testing.assert_array_equal(run(q, broken, v), run(q, k, v))


def test_the_kernel_visits_kept_tiles_alone():
    """Static masks: as many steps as the fullest line has tiles; behind them nothing is loaded."""
    seen = np.zeros((4, 8), bool)
    seen[0, [1, 5]] = True
    seen[2, 7] = True
    sides = kernel._sides(BlockMask(seen, 128, 128), 512, 1024)
    lists = kernel._Lists.of(BlockMask(seen, 128, 128), *sides, causal=False)
    indices, flags = kernel._visits(lists.tiles[0], lists.most_keys)
    # lines that see nothing visit the first tile
    np.testing.assert_array_equal(indices[0], [[1, 5], [0, 0], [7, 7], [0, 0]])
    np.testing.assert_array_equal(flags[0], [[2, 2], [2, 0], [2, 0], [2, 0]])
    data = kernel._Lists.of(
        BlockMask(jnp.asarray(seen), 128, 128), *sides, causal=False
    )
    assert (data.most_keys, data.most_queries) == (8, 4)


@pytest.mark.parametrize(
    "seen, sizes, told",
    [
        (np.ones((2, 2), bool), (100, 128), "expected [.. 3 2]"),
        (np.ones((3, 2), bool), (0, 128), "query_block=0"),
        (np.ones((3, 2)), (100, 128), "expected bool"),
        (np.ones(2, bool), (100, 128), "expected [I J]"),
        (np.ones((3, 3, 2), bool), (100, 128), "4 heads"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(seen, sizes, told):
    q, k, v, _ = inputs(256, 256)
    with pytest.raises(Refused, match=r".*") as refused:
        attention(q, k, v, blocks=BlockMask(seen, *sizes))
    assert told in str(refused.value)
