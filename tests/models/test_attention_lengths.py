"""Attention of unlike lengths: every path gives the values and gradients of dense scores.

On eight devices too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core import sharding
from jaxdistill.core.net import forward_mode
from jaxdistill.models import attention as module
from jaxdistill.models import splash as kernel
from jaxdistill.models.attention import (
    attention,
    blockwise,
    kept_first,
    plain,
    splash,
)
from jaxdistill.models.masks import BlockMask
from tests.models.dense import (
    B,
    causal_mask,
    close,
    dense,
    grid,
    inputs,
    of_keys,
    results,
)

pytestmark = pytest.mark.usefixtures("interpreted")


UNLIKE = {
    "longer": (200, 330, {}),
    "shorter": (330, 200, {}),
    "masked": (200, 330, {"mask": of_keys(330, 330, 40)}),
    # another text as long as the queries: its mask says nothing about them
    "as many": (256, 256, {"mask": of_keys(256, 256, 40)}),
    "as many, causal, first keys masked": (
        256,
        256,
        {"causal": True, "mask": ~of_keys(256, 0, 40)},
    ),
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
    seen = 1.0
    if path is plain:  # what a query gives that sees nothing is not compared
        seen = np.swapaxes(visible.any(-1), 1, 2)[..., None]
        w = w * seen
    out, *gradients = results(path, q, k, v, w, **how)
    close((out * seen, *gradients), dense(q, k, v, w, visible))


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


@pytest.mark.skipif(
    jax.default_backend() != "gpu",
    reason="needs an NVIDIA GPU (JAX_PLATFORMS=cuda)",
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_on_a_gpu(masked):
    """cuDNN in bfloat16 with more keys than queries, to a few of its roundings (2^-8)."""
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(200, 330)]
    q, k, v, w = (np.asarray(x, np.float32) for x in arrays)
    mask = of_keys(330, 330, 40) if masked else None
    how = {} if mask is None else dict(mask=jnp.asarray(mask))
    found = results(module.cudnn, *arrays, **how)
    visible = np.ones((1, 1, 200, 330), bool) & (True if mask is None else mask)
    for a, b in zip(found, dense(q, k, v, w, visible), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b, atol=4 * 2**-8 * np.abs(b).max()
        )


def test_which_path_is_taken(monkeypatch):
    taken = []

    def stand_in(name):
        return lambda q, k, v, **kw: (taken.append(name), q)[1]

    for name in ("plain", "blockwise", "splash", "cudnn"):
        monkeypatch.setattr(module, name, stand_in(name))
    zeros = lambda length: jnp.zeros((1, length, 1, 8), jnp.bfloat16)

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
    "shape, causal",
    [((), False), ((), True), ((6, 4), True), ((4, 4, 6, 4), False)],
)
def test_unlike_lengths_and_blocks_per_shard(shape, causal, monkeypatch):
    """Eight devices, 2 each for samples, sequence and heads, compile the kernel for their part."""
    monkeypatch.setattr(kernel, "INTERPRET", False)
    mesh = sharding.make_mesh(
        sharding.MeshShape(data=1, fsdp=2, sequence=2, tensor=2)
    )
    queries, keys = (768, 512) if shape else (500, 300)
    q = jax.ShapeDtypeStruct((4, queries, 4, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((4, keys, 4, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((4, 1, 1, keys), bool)
    seen = jax.ShapeDtypeStruct(shape, bool) if shape else None

    def run(q, k, mask, seen):
        blocks = None if seen is None else BlockMask(seen, 128, 128)
        return splash(q, k, k, mask=mask, blocks=blocks, causal=causal)

    with sharding.use(mesh):
        exported = jax.export.export(jax.jit(run), platforms=["tpu"])(
            q, k, mask, seen
        )
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.parametrize("blocks", [None, BlockMask(grid(6, 4), 128, 128)])
def test_heads_that_devices_do_not_divide_are_blockwise(blocks):
    """Three heads on two devices: no kernel, and no array of all scores."""
    mesh = sharding.make_mesh(
        sharding.MeshShape(data=1, fsdp=2, sequence=2, tensor=2)
    )
    q = jax.ShapeDtypeStruct((4, 768, 3, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((4, 512, 3, 64), jnp.bfloat16)
    run = jax.jit(lambda q, k: splash(q, k, k, blocks=blocks))
    with sharding.use(mesh):
        text = jax.export.export(run, platforms=["tpu"])(q, k).mlir_module()
    assert "tpu_custom_call" not in text and "stablehlo.while" in text


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
