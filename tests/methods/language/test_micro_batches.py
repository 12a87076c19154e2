"""Losses over masks: what a step makes of a batch does not depend on how many micro-batches it
comes in.

The engine adds the micro-batches' losses and counts up (tests/core/test_step.py); here each loss is
such a sum.
"""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx
from jaxdistill.run.experiment import Experiment

# Every loss over tokens that the data has (not those of texts that the student writes, whose sums
# these are too). TSD-KD, whose
# uncertain tokens are each micro-batch's, says so; pruning weighs its two terms alike in each.
TOYS = (
    "kd",
    "universalner",
    "step_by_step",
    "ernie_tiny",
    "cross_tokenizer_kd",
    "multi_teacher",
    "recursive_meta",
    "self_distillation",
)


def uneven(batch):
    """The second half of the odd rows is masked out, and where rows are left out, the odd ones."""

    def one(name, v):
        v = np.array(v)
        if name.endswith("mask") and v.ndim == 2:
            v[1::2, v.shape[1] // 2 :] = 0
        if name == "heldout":
            v[1::2] = 1
        return jnp.asarray(v)

    return {name: one(name, v) for name, v in batch.items()}


def weights(net, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), s.dtype),
        net.shapes,
    )


@pytest.mark.parametrize(
    ("name", "stage"), [*[(name, 0) for name in TOYS], ("ernie_tiny", -1)]
)
def test_a_loss_is_the_sum_of_its_micro_batches(name, stage):
    experiment = Experiment(
        importlib.import_module(f"configs.toy.{name}").get_config(), Path("unused")
    )
    nets = experiment.nets
    turn = experiment.method.stages(100)[stage].method.turns[0]
    params = {role: weights(net, i) for i, (role, net) in enumerate(nets.items())}
    ctx = lambda batch: Ctx(
        batch, jax.random.key(0), jnp.int32(0), experiment.method.memory()
    )
    whole = uneven(experiment.data.batch(0, slice(8)))
    gathered = turn.gather(bind(nets, params), ctx(whole)) if turn.gather else whole
    # (loss, count)
    loss = jax.jit(lambda batch: turn.loss(bind(nets, params), ctx(batch))[::3])
    count = lambda out: float(out[1])
    one = loss(gathered)
    halves = [loss({k: v[i::2] for k, v in gathered.items()}) for i in range(2)]
    mean = sum(float(out[0]) for out in halves) / sum(map(count, halves))
    np.testing.assert_allclose(mean, float(one[0]) / count(one), rtol=1e-5)
    alone = loss(whole)  # without the engine
    np.testing.assert_allclose(
        float(alone[0]) / count(alone), float(one[0]) / count(one), rtol=1e-6
    )
