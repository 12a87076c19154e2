"""Five steps of AdamW on 2 x 2 x 2 devices against one: the weights agree to 1e-5. What is split
over what.
"""

import jax
import numpy as np
import pytest

from jaxdistill.core import sharding
from tests.toys import EIGHT, ONE, first_stage, toy


def five_steps(name: str, shape: sharding.MeshShape):
    """Weights of the moving roles after five steps at a learning rate of 1e-3, as numpy."""
    config = toy(name)
    for role in config.roles.values():
        role.optimizer.lr = 1e-3
        role.optimizer.schedule = "constant"
        role.optimizer.warmup = 0
    run = first_stage(name, shape, config)
    state = run.init()
    first = jax.device_get(state.params)
    for i in range(5):
        state, _ = run.step(state, run.programs.active_at(i))
    return first, jax.device_get(state.params)


@pytest.mark.parametrize("name", [pytest.param("dmd2", marks=pytest.mark.slow), "scm", "gkd"])
def test_eight_devices_equal_one_after_five_steps(name, record_property):
    largest = lambda a, b: max(
        np.abs(x - y).max()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        if x.size
    )
    (start, one), (_, eight) = five_steps(name, ONE), five_steps(name, EIGHT)
    record_property("largest", float(largest(one, eight)))
    assert largest(one, eight) < 1e-5 < 1e-3 < largest(start, one)


@pytest.mark.parametrize(("size", "part"), [(8, 2), (6, 3), (5, 5)])
def test_weights_are_split_over_the_sequence_axis_too(size, part):
    """As far as it divides them: first over fsdp alone, then not at all."""
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=2, sequence=2, tensor=2))
    shape = jax.ShapeDtypeStruct((size, 4), np.float32)
    where = sharding.fits(
        jax.sharding.NamedSharding(mesh, sharding.Rules().spec(("embed", "mlp"))), shape
    )
    assert where.shard_shape(shape.shape) == (part, 2)
