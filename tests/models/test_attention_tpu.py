"""Attention compiled for a TPU, without one: long caches, and masks by block at 32,768 tokens.

`python -m pytest -s tests/models/test_attention_tpu.py` prints the temporary memory of each
program (docs/scale.md).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxdistill.core import sharding
from jaxdistill.models.attention import attention, plain
from jaxdistill.models.masks import BlockMask
from jaxdistill.run import plan

pytestmark = pytest.mark.full

HEADS = 12
SIZE = 128
LONG = 32768
CACHE = (4736, 23424)
TEXT = (32760, 512)
MIB = 2**20


@pytest.fixture(scope="module")
def place():
    """A device of a TPU slice that exists only as a description."""
    pytest.importorskip(
        "libtpu", reason="no TPU compiler: pip install 'jaxdistill[tpu]'"
    )
    devices, _ = plan.topology("v5p:2x2x1")
    # a program for a TPU cannot be loaded from the cache of compiled programs
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield jax.sharding.SingleDeviceSharding(devices[0])
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def temporaries(place, path, queries, keys, *, gradient, **data) -> int:
    """Bytes on a device of the compiled program, besides its arguments and results."""
    made = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    q = made((1, queries, HEADS, SIZE), jnp.bfloat16)
    k = made((1, keys, HEADS, SIZE), jnp.bfloat16)
    arrays = {name: made(shape, bool) for name, shape in data.items()}

    def loss(q, k, v, arrays):
        return jnp.sum(path(q, k, v, **arrays).astype(jnp.float32))

    run = lambda q, k, v, arrays: path(q, k, v, **arrays)
    program = jax.jit(jax.grad(loss, (0, 1, 2)) if gradient else run)
    compiled = program.lower(q, k, k, arrays).compile()
    assert "tpu_custom_call" in compiled.as_text() or path is plain
    return compiled.memory_analysis().temp_size_in_bytes


def report(name, gradient, ours, queries, keys, theirs=None):
    scores = queries * keys * HEADS * 4
    kind = "gradient" if gradient else "forward"
    other = "" if theirs is None else f" plain {theirs / MIB:,.0f} MiB,"
    text = f"{name}, {kind}: {ours / MIB:,.0f} MiB,{other} scores {scores / MIB:,.0f} MiB"
    print("\n" + text)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("lengths", [CACHE, TEXT], ids=["cache", "text"])
def test_unlike_lengths(place, lengths, gradient):
    """A chunk of video on its cache, and video on masked text: no array of all scores."""
    mask = (1, 1, 1, lengths[1])
    ours = temporaries(place, attention, *lengths, gradient=gradient, mask=mask)
    theirs = temporaries(place, plain, *lengths, gradient=gradient, mask=mask)
    name = f"{lengths[0]:,} x {lengths[1]:,}"
    report(name, gradient, ours, *lengths, theirs)
    assert ours < theirs / 2


def attend_known(q, k, v, *, heads, block):
    """Attention by blocks that are known to the program, a fifth of them kept."""
    count = LONG // block
    shape = (heads, count, count) if heads > 1 else (count, count)
    seen = np.random.default_rng(0).random(shape) < 0.2
    return attention(q, k, v, blocks=BlockMask(seen, block, block))


def attend_made(q, k, v, *, seen, block):
    """Attention by blocks that are data."""
    return attention(q, k, v, blocks=BlockMask(seen, block, block))


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_known_blocks(place, heads, gradient):
    """Masks of 256 x 256 blocks, one for all heads and one for each."""
    path = functools.partial(attend_known, heads=heads, block=128)
    ours = temporaries(place, path, LONG, LONG, gradient=gradient)
    report(f"known blocks, masks: {heads}", gradient, ours, LONG, LONG)
    assert ours < LONG**2


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize(
    "shape", [(256, 256), (HEADS, 256, 256), (1, HEADS, 256, 256)]
)
def test_blocks_that_are_data(place, shape, gradient):
    """The same, made at run time."""
    path = functools.partial(attend_made, block=128)
    ours = temporaries(place, path, LONG, LONG, gradient=gradient, seen=shape)
    report(f"blocks as data, {shape}", gradient, ours, LONG, LONG)
    assert ours < LONG**2


def test_lists_that_exceed_the_scalar_memory(place):
    """131,072 tokens: the lists of one head take 3 MiB."""
    length = 4 * LONG
    path = functools.partial(attend_made, block=128)
    seen = (length // 128, length // 128)
    ours = temporaries(place, path, length, length, gradient=True, seen=seen)
    report(f"blocks as data, {seen}", True, ours, length, length)
    assert ours < length**2


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_frames(place, gradient):
    """21 frames of 1,560 tokens, which fill no tiles, and a mask by frames."""
    path = functools.partial(attend_made, block=1560)
    length = 21 * 1560
    ours = temporaries(
        place, path, length, length, gradient=gradient, seen=(21, 21)
    )
    report("frames", gradient, ours, length, length)
    assert ours < length**2


def test_blocks_on_four_devices(place):
    """Queries and heads in two parts each: the program of a device with its gradient."""
    devices, _ = plan.topology("v5p:2x2x1")
    shape = sharding.MeshShape(data=1, fsdp=1, sequence=2, tensor=2)
    mesh = sharding.make_mesh(shape, devices)
    tokens = sharding.Rules().spec((None, "seq", "heads", None))
    places = jax.sharding.NamedSharding(mesh, tokens)
    known = functools.partial(attend_known, heads=HEADS, block=128)
    with sharding.use(mesh):
        ours = temporaries(places, known, LONG, LONG, gradient=True)
    report("known blocks, four devices", True, ours, LONG, LONG)
    assert ours < LONG**2 / 2
