"""Attention by blocks and of unlike lengths: every path gives the values and gradients of dense
scores, with masks that are known to the program and masks that are data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core import sharding
from jaxdistill.core.net import forward_mode
from jaxdistill.core.types import Refused
from jaxdistill.models import attention as module
from jaxdistill.models import splash as kernel
from jaxdistill.models.attention import (
    attention,
    blockwise,
    kept_first,
    plain,
    splash,
)
from jaxdistill.models.masks import BlockMask, attending, expand

B = 2
H = 4
G = 2
K = 8


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The kernel runs without a TPU."""
    monkeypatch.setattr(kernel, "INTERPRET", True)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(queries, keys, heads=H, groups=G):
    """q, k, v and the weights of a loss."""
    q = draw(B, queries, heads, K)
    k = draw(B, keys, groups, K, seed=1)
    v = draw(B, keys, groups, K, seed=2)
    return q, k, v, draw(B, queries, heads, K, seed=3)


def of_keys(keys, *counts):
    """A mask with the first so many keys of each sample."""
    return (np.arange(keys) < np.array(counts)[:, None])[:, None, None]


def grid(*shape, seed=4):
    """A mask by blocks of which about half is kept; the last queries see nothing."""
    seen = np.random.default_rng(seed).random(shape) < 0.5
    seen[..., -1, :] = False
    return seen


def dense(q, k, v, visible, scale=None):
    """Softmax attention written out: `visible` is bool [#B #H T S]."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * scale
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)) * visible
    norm = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(norm == 0, 1, norm)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def results(path, q, k, v, w, **how):
    """Value and gradients; what of `how` is a jax array is data of the program."""

    def loss(q, k, v, how):
        out = path(q, k, v, **how)
        return jnp.sum(out * w), out

    graded = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    known = {name: x for name, x in how.items() if _is_known(x)}
    data = {name: x for name, x in how.items() if not _is_known(x)}
    run = jax.jit(lambda q, k, v, data: graded(q, k, v, data | known))
    (_, out), gradients = run(q, k, v, data)
    return out, *gradients


def _is_known(x):
    if isinstance(x, BlockMask):
        return x.static
    return not isinstance(x, jax.Array)


def close(found, expected):
    # float32 sums of some hundred terms of order 1, in another order
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max())
        )


def causal_mask(queries, keys):
    return np.tri(queries, keys, dtype=bool)


UNLIKE = {
    "longer": (200, 330, {}),
    "shorter": (330, 200, {}),
    "masked": (200, 330, {"mask": of_keys(330, 330, 40)}),
    "nothing to see": (130, 256, {"mask": of_keys(256, 256, 0)}),
    "causal": (200, 330, {"causal": True}),
    "causal, fewer keys": (330, 200, {"causal": True}),
    "causal, first keys masked": (
        200,
        330,
        {"causal": True, "mask": ~of_keys(330, 0, 40)},
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("path", [plain, blockwise, splash])
def test_unlike_lengths(name, path):
    queries, keys, how = UNLIKE[name]
    q, k, v, w = inputs(queries, keys)
    visible = how.get("mask", True) & np.ones((1, 1, queries, keys), bool)
    if how.get("causal"):
        visible = visible & causal_mask(queries, keys)
    how = {name: jnp.asarray(x) if name == "mask" else x for name, x in how.items()}
    close(
        results(path, q, k, v, w, **how), results(dense, q, k, v, w, visible=visible)
    )


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
        results(dense, q, k, v, w, visible=visible),
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
    close(
        results(path, q, k, v, w, **how), results(dense, q, k, v, w, visible=visible)
    )


def test_expanded_blocks_are_those_of_the_tokens():
    seen = grid(B, H, 3, 4)
    found = expand(BlockMask(seen, 70, 50), 200, 190)
    for t, s in ((0, 0), (69, 49), (70, 50), (199, 189), (139, 150)):
        np.testing.assert_array_equal(found[..., t, s], seen[..., t // 70, s // 50])


@pytest.mark.parametrize("shape", [(H, 3, 2), (B, H, 3, 2)])
def test_scalar_memory_for_one_head_at_a_time(shape, monkeypatch):
    """Masks of several heads that do not fit into one call give the same."""
    q, k, v, w = inputs(384, 512)
    how = dict(blocks=BlockMask(grid(*shape), 128, 256))
    at_once = results(splash, q, k, v, w, **how)
    for bytes_of_heads in (1, 30):
        monkeypatch.setattr(kernel, "SCALARS", bytes_of_heads)
        close(results(splash, q, k, v, w, **how), at_once)


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

    exact = lambda q, _: dense(q, k, v, visible)
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


def test_keys_that_count_come_first():
    """What cuDNN sees of a mask of keys is the same attention."""
    q, k, v, _ = inputs(50, 60)
    mask = np.random.default_rng(5).random((B, 1, 1, 60)) < 0.6
    front_k, front_v, counts = kept_first(k, v, mask)
    np.testing.assert_array_equal(counts, mask.sum((1, 2, 3)))
    front = of_keys(60, *counts)
    np.testing.assert_allclose(
        plain(q, front_k, front_v, mask=front), plain(q, k, v, mask=mask), atol=1e-5
    )


def test_which_path_is_taken(monkeypatch):
    taken = []

    def stand_in(name):
        return lambda q, k, v, **kw: (taken.append(name), q)[1]

    for name in ("plain", "blockwise", "splash", "cudnn"):
        monkeypatch.setattr(module, name, stand_in(name))
    zeros = lambda length: jnp.zeros((1, length, 1, 1), jnp.bfloat16)

    def path(queries, keys, **kw):
        taken.clear()
        q, k = zeros(queries), zeros(keys)
        jax.eval_shape(lambda: attention(q, k, k, **kw))
        return set(taken)

    mask = np.ones((1, 1, 1, 4096), bool)
    every = BlockMask(np.ones((2, 2), bool), 1024, 2048)
    assert path(4096, 512) == {"plain"}
    assert path(1, 4096, mask=mask) == {"plain"}
    assert path(32760, 512) == {"splash", "blockwise"}
    assert path(2048, 4096, mask=mask) == {"splash", "blockwise"}
    assert path(2048, 4096, mask=np.ones((1, 1, 2048, 4096), bool)) == {"plain"}
    assert path(2048, 4096, blocks=every) == {"splash", "blockwise"}
    assert path(2048, 4096, blocks=every, mask=np.ones((1, 1, 2048, 1), bool)) == {
        "blockwise"
    }
    small = BlockMask(np.ones((2, 2), bool), 128, 128)
    assert path(256, 256, blocks=small) == {"plain"}
    assert path(2048, 4096, cap=1.0, blocks=every) == {"plain"}
    with forward_mode():
        assert path(2048, 4096, blocks=every) == {"blockwise"}
        assert path(256, 256, blocks=small) == {"plain"}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert path(2048, 4096, mask=mask) == {"splash", "blockwise", "cudnn"}
    assert path(2048, 4096, causal=True) == {"splash", "blockwise"}
    assert path(2048, 4096, blocks=every) == {"splash", "blockwise"}


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


@pytest.mark.parametrize("shape", [(), (3, 2), (4, 1, 3, 2), (4, 4, 3, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_unlike_lengths_and_blocks_per_shard(shape, causal, monkeypatch):
    """Eight devices, 2 each for samples, sequence and heads, compile the kernel for their part."""
    monkeypatch.setattr(kernel, "INTERPRET", False)
    mesh = sharding.make_mesh(
        sharding.MeshShape(data=1, fsdp=2, sequence=2, tensor=2)
    )
    queries, keys = (384, 512) if shape else (500, 300)
    q = jax.ShapeDtypeStruct((4, queries, 4, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((4, keys, 4, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((4, 1, 1, keys), bool)
    seen = None
    if shape:
        # a sequence of three tiles is not divided by two devices: six
        shape = (*shape[:-2], 6, 4)
        q = jax.ShapeDtypeStruct((4, 768, 4, 64), jnp.bfloat16)
        seen = jax.ShapeDtypeStruct(shape, bool)

    def run(q, k, mask, seen):
        blocks = None if seen is None else BlockMask(seen, 128, 128)
        return splash(q, k, k, mask=mask, blocks=blocks, causal=causal)

    with sharding.use(mesh):
        exported = jax.export.export(jax.jit(run), platforms=["tpu"])(
            q, k, mask, seen
        )
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.parametrize("shape", [(), (6, 4), (4, 6, 4), (2, 1, 6, 4)])
def test_eight_devices_give_the_values_of_one(shape):
    mesh = sharding.make_mesh(
        sharding.MeshShape(data=1, fsdp=2, sequence=2, tensor=2)
    )
    q, k, v, w = inputs(768, 512)
    how = dict(mask=jnp.asarray(of_keys(512, 512, 200)))
    if shape:
        how["blocks"] = BlockMask(grid(*shape), 128, 128)
    expected = results(plain, q, k, v, w, **how)
    with sharding.use(mesh):
        close(results(splash, q, k, v, w, **how), expected)
