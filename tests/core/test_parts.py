"""A role in parts: what moves, what rests, running statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net, paths
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.parts import joined, leaves_where, like, split
from jaxdistill.core.step import init_state, make_train_step, results
from jaxdistill.core.types import Method, Out, Refused
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.language.lm import LM
from tests.run.staged import Normed

TREE = {"a": {"w": 1, "b": 2}, "c": 3}


def test_parts_hold_each_leaf_once_and_join_again():
    low = leaves_where(TREE, lambda path: path == "a/w")
    high = leaves_where(TREE, lambda path: path != "a/w")
    assert low == {"a": {"w": 1}}
    assert high == {"a": {"b": 2}, "c": 3}
    assert joined(low, high) == TREE
    assert like(TREE, low) == low
    assert joined({}, TREE) is TREE


def test_a_network_is_split_by_pattern_and_kind():
    net = make_net(Normed())
    assert net.statistics == {"norm/mean", "norm/var"}
    parts = split(net, net.shapes, r".*/kernel")
    assert sorted(paths(parts.moving)) == ["down/kernel", "up/kernel"]
    assert sorted(paths(parts.statistics)) == ["norm/mean", "norm/var"]
    assert len(paths(parts.rest)) == len(paths(net.shapes)) - 4


@pytest.mark.parametrize("pattern", ["up/kern", "norm/mean", "("])
def test_a_pattern_of_no_weight_is_refused(pattern):
    net = make_net(Normed())
    with pytest.raises(
        Refused, match="trains: .*" + ("regular" if pattern == "(" else "up")
    ):
        split(net, net.shapes, pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partly(Method):
    """Trains the last norm of a language model towards zero logits."""

    inits = {"student": None}
    frozen = ()
    trains = {"student": r"norm/scale"}

    def loss(self, net, ctx):
        return Out(jnp.mean(net.student(ctx.batch["tokens"]) ** 2))


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_small_part_has_moments_and_averages_of_that_part_alone():
    net = make_net(LM(depth=2))
    method = Partly()
    parts = split(net, net.axes, method.trains["student"])
    tx = Optimizer().make(10, axes=parts.moving)
    key = jax.random.key(0)
    state = jax.jit(
        lambda key: init_state(method, {"student": net}, {"student": tx}, key, {})
    )(key)
    scale = state.params["student"]["norm"]["scale"]
    # AdamW's two moments and two counters of updates
    assert bytes_of(state.opt["student"]) == 2 * scale.nbytes + 2 * 4
    assert bytes_of(state.ema["student"]) == scale.nbytes
    assert scale.size < 0.01 * net.size
    before = jax.device_get(results(state)["student"])
    step, _ = make_train_step(method, {"student": net}, {"student": tx})
    batch = {"tokens": jnp.arange(12).reshape(2, 6)}
    state, metrics = step(state, batch, key, (0,))
    after = jax.device_get(results(state)["student"])
    moved = [
        path
        for path, leaf in paths(before).items()
        if not np.array_equal(leaf, paths(after)[path])
    ]
    assert moved == ["norm/scale"]
    norm = np.linalg.norm  # the gradient's norm is that of the part
    grads = jax.grad(
        lambda w: method.loss(_bound(net, before, w), _Batch(batch)).loss
    )(before["norm"]["scale"])
    np.testing.assert_allclose(metrics["student/grad_norm"], norm(grads), rtol=1e-5)


class _Batch:
    def __init__(self, batch):
        self.batch = batch


class _bound:
    """The networks with another scale of the last norm."""

    def __init__(self, net, params, scale):
        weights = {**params, "norm": {"scale": scale}}
        self.student = lambda tokens: net.apply(weights, tokens)


def test_running_statistics_of_micro_batches_follow_each_other():
    """Two micro-batches move the statistics twice, as two batches do."""
    net = make_net(Normed())
    assert make_net(MLP()).statistics == frozenset()
    params = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 2))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Fit(Method):
        inits = {"student": None}
        frozen = ()
        ema = ()

        def loss(self, net, ctx):
            out, statistics = net.student.training(ctx.batch["x"])
            return Out(jnp.mean(out**2), statistics={"student": statistics})

    tx = Optimizer(lr=1e-9).make(10, axes=split(net, net.axes, None).moving)
    make = lambda key: init_state(
        Fit(), {"student": net}, {"student": tx}, key, {"student": params}
    )
    state = jax.jit(make)(jax.random.key(0))
    step, _ = make_train_step(
        Fit(), {"student": net}, {"student": tx}, accumulate=2
    )
    state, _ = step(state, {"x": x}, jax.random.key(2), (0,))
    expected = params
    for part in (x[::2], x[1::2]):
        _, statistics = net.apply_training(expected, part)
        expected = joined(
            like(expected, {"up": 0, "down": 0}),
            statistics,
            {
                "norm": {
                    "scale": params["norm"]["scale"],
                    "bias": params["norm"]["bias"],
                }
            },
        )
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            state.statistics["student"]["norm"][name],
            expected["norm"][name],
            rtol=1e-5,
            atol=1e-6,
        )
