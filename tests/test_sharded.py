"""Five steps of AdamW on 2 x 2 x 2 devices agree with one device to 1e-5; axes that weights are
sharded over.
"""

import jax
import numpy as np
import pytest

from jaxdistill.core import sharding
from tests.toys import EIGHT, ONE, first_stage, toy


def five_steps(run):
    """Weights of the moving roles before and after five steps, as numpy."""
    state = run.init()
    first = jax.device_get(state.params)
    for i in range(5):
        state, _ = run.step(state, run.programs.active_at(i))
    return first, jax.device_get(state.params)


def largest(a, b) -> float:
    """The largest difference of two trees of weights."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs if x.size)


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("dmd2", marks=pytest.mark.slow),  # a minute
        "scm",
        pytest.param("gkd", marks=pytest.mark.full),
    ],
)
def test_eight_devices_equal_one_after_five_steps(name, record_property):
    config = toy(name)
    for role in config.roles.values():
        role.optimizer.lr = 1e-3
        role.optimizer.schedule = "constant"
        role.optimizer.warmup = 0
    run = first_stage(name, ONE, config)
    start, one = five_steps(run)
    _, eight = five_steps(run.on(EIGHT))
    record_property("largest", largest(one, eight))
    assert largest(one, eight) < 1e-5 < 1e-3 < largest(start, one)


@pytest.mark.parametrize(("size", "part"), [(8, 2), (6, 3), (5, 5)])
def test_weights_are_sharded_over_the_sequence_axis_too(size, part):
    """Over fsdp and sequence where they divide the size, else over fsdp alone, else not at all."""
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=2, sequence=2, tensor=2))
    shape = jax.ShapeDtypeStruct((size, 4), np.float32)
    spec = sharding.Rules().spec(("embed", "mlp"))
    where = sharding.fits(jax.sharding.NamedSharding(mesh, spec), shape)
    assert where.shard_shape(shape.shape) == (part, 2)
