"""LAMB and CAME: their papers' equations, and each layer and each member as if it were alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxdistill.core import sharding
from jaxdistill.core.algorithms import own_axes
from jaxdistill.core.bank import Bank, bank
from jaxdistill.core.net import Net, make_net
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.step import init_state, make_train_step
from jaxdistill.core.types import Method, Out
from jaxdistill.models.denoisers.mlp import MLP
from tests.toys import EIGHT, ONE

RNG = np.random.default_rng(0)
NAMES = ("lamb", "came")
# two layers of a matrix and of a vector, a matrix outside of them, a vector
AXES = {
    "blocks": {"kernel": P("layers", "embed", "mlp"), "bias": P("layers", "mlp")},
    "table": P("vocab", "embed"),
    "scale": P("embed"),
}
SHAPES = {
    "blocks": {"kernel": (2, 3, 5), "bias": (2, 5)},
    "table": (4, 3),
    "scale": (3,),
}


def is_shape(node):
    return isinstance(node, tuple)


def draw(size=1.0, members=()):
    """Random arrays in the structure of the weights, float32."""

    def one(shape):
        return (size * RNG.standard_normal((*members, *shape))).astype(np.float32)

    return jax.tree.map(one, SHAPES, is_leaf=is_shape)


WEIGHTS = draw()
GRADS = [draw(size) for size in (0.5, 2.0, 0.1, 1.0)]


def follow(optimizer, grads, weights, **how):
    """Weights after an update by each of `grads`."""
    tx = optimizer.make(len(grads), **how)

    @jax.jit
    def update(g, state, weights):
        updates, state = tx.update(g, state, weights)
        return optax.apply_updates(weights, updates), state

    state = tx.init(weights)
    for g in grads:
        weights, state = update(g, state, weights)
    return jax.device_get(weights)


def close(a, b, rtol=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def layer(tree, k):
    """The tree with the weights of layer k in place of the stack."""
    return {**tree, "blocks": jax.tree.map(lambda w: w[k], tree["blocks"])}


@pytest.mark.parametrize("name", NAMES)
def test_a_stacked_layer_moves_as_if_it_were_alone(name):
    optimizer = Optimizer(algorithm=name, lr=0.1, weight_decay=0.1, clip=0.0)
    after = follow(optimizer, GRADS, WEIGHTS, axes=AXES)
    names = {**AXES, "blocks": {"kernel": P("embed", "mlp"), "bias": P("mlp")}}
    for k in range(2):
        grads = [layer(g, k) for g in GRADS]
        alone = follow(optimizer, grads, layer(WEIGHTS, k), axes=names)
        close(layer(after, k), alone)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_member_of_a_bank_moves_as_if_it_were_alone(name, named):
    optimizer = Optimizer(algorithm=name, lr=0.1, clip=0.0)
    weights = draw(members=(3,))
    grads = [draw(size, members=(3,)) for size in (0.5, 2.0)]
    axes = jax.tree.map(lambda n: P("bank", *n), AXES) if named else None
    after = follow(optimizer, grads, weights, bank=True, axes=axes)
    for k in range(3):
        of_member = lambda tree: jax.tree.map(lambda w: w[k], tree)
        own = [of_member(g) for g in grads]
        alone = follow(
            optimizer, own, of_member(weights), axes=AXES if named else None
        )
        close(of_member(after), alone)


def test_axes_of_one_layer_of_one_member():
    axes = {"a": P("bank", "layers", "embed", "mlp"), "b": P()}
    arrays = {"a": np.zeros((2, 3, 4, 5)), "b": np.zeros((3, 4))}
    own = own_axes(axes)
    found = jax.tree_util.tree_map_with_path(own, arrays)
    assert found == {"a": (2, 3), "b": (0, 1)}
    found = jax.tree_util.tree_map_with_path(own_axes(None, bank=True), arrays)
    assert found == {"a": (1, 2, 3), "b": (1,)}


def test_lamb_without_stacked_axes_is_optax_own():
    optimizer = Optimizer(
        algorithm="lamb", lr=0.1, b2=0.99, eps=1e-6, weight_decay=0.1, clip=0.0
    )
    mask = jax.tree.map(lambda w: w.ndim >= 2, {k: WEIGHTS[k] for k in ("table",)})
    grads = [{"table": g["table"]} for g in GRADS]
    theirs = optax.lamb(0.1, b2=0.99, eps=1e-6, weight_decay=0.1, mask=mask)
    weights = {"table": WEIGHTS["table"]}
    state = theirs.init(weights)
    for g in grads:
        updates, state = theirs.update(g, state, weights)
        weights = optax.apply_updates(weights, updates)
    close(follow(optimizer, grads, {"table": WEIGHTS["table"]}), weights)


def test_every_update_of_lamb_is_lr_times_the_norm_of_its_layer():
    after = follow(
        Optimizer(algorithm="lamb", lr=0.01), GRADS[:1], WEIGHTS, axes=AXES
    )
    for part in ("kernel", "bias"):
        for k in range(2):
            before = WEIGHTS["blocks"][part][k]
            step = np.linalg.norm(after["blocks"][part][k] - before)
            np.testing.assert_allclose(
                step, 0.01 * np.linalg.norm(before), rtol=1e-4
            )
    zero = jax.tree.map(np.zeros_like, WEIGHTS)
    moved = follow(Optimizer(algorithm="lamb", lr=0.01), GRADS[:1], zero)
    close(jax.tree.map(np.abs, moved), jax.tree.map(lambda w: w + 0.01, zero))


def came_of_paper(weight, grads, lr, b1=0.9, b2=0.999, b3=0.9999):
    """Algorithm 2 with sums, as it is written, in float64; of vectors without its factors."""
    weight = np.float64(weight)
    matrix = weight.ndim == 2
    mean = np.zeros_like(weight)
    rows = columns = doubt_rows = doubt_columns = 0.0
    for g in map(np.float64, grads):
        square = g**2 + 1e-30
        if matrix:
            rows = b2 * rows + (1 - b2) * square.sum(1)
            columns = b2 * columns + (1 - b2) * square.sum(0)
            second = np.outer(rows, columns) / rows.sum()
        else:
            rows = b2 * rows + (1 - b2) * square
            second = rows
        step = g / np.sqrt(second)
        step /= max(1.0, np.sqrt(np.mean(step**2)))
        mean = b1 * mean + (1 - b1) * step
        if not matrix:
            weight = weight - lr * mean
            continue
        doubt = (step - mean) ** 2 + 1e-16
        doubt_rows = b3 * doubt_rows + (1 - b3) * doubt.sum(1)
        doubt_columns = b3 * doubt_columns + (1 - b3) * doubt.sum(0)
        unsure = np.outer(doubt_rows, doubt_columns) / doubt_rows.sum()
        weight = weight - lr * mean / np.sqrt(unsure)
    return weight


def test_came_follows_its_paper():
    """The last gradients are so small that the root mean square of their updates is below 1."""
    optimizer = Optimizer(algorithm="came", lr=1.0, clip=0.0)
    grads = [*GRADS, draw(0.01), draw(0.02)]
    after = follow(optimizer, grads, WEIGHTS, axes=AXES)
    for name in ("table", "scale"):
        wanted = came_of_paper(WEIGHTS[name], [g[name] for g in grads], 1.0)
        np.testing.assert_allclose(after[name], wanted, rtol=1e-4)


def test_came_keeps_rows_and_columns_of_each_matrix():
    tx = Optimizer(algorithm="came", clip=0.0).make(1, axes=AXES)
    state = tx.init(WEIGHTS)[0][0]
    shapes = [w["blocks"]["kernel"].shape for w in state]
    assert shapes == [(2, 3, 5), (2, 3, 1), (2, 1, 5), (2, 3, 1), (2, 1, 5)]
    shapes = [w["blocks"]["bias"].shape for w in state]
    assert shapes == [(2, 5), (2, 5), (2, 1), (2, 1), (2, 1)]
    buffers = [w.unsafe_buffer_pointer() for w in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


def test_came_stands_where_there_is_no_gradient():
    """1e-30 and 1e-16 keep 0 / 0 away, also where a whole row has no gradient."""
    optimizer = Optimizer(algorithm="came", lr=0.1)
    zero = [jax.tree.map(np.zeros_like, g) for g in GRADS]
    same = follow(optimizer, zero, WEIGHTS, axes=AXES)
    for x, y in zip(jax.tree.leaves(same), jax.tree.leaves(WEIGHTS), strict=True):
        np.testing.assert_array_equal(x, y)
    partial = [
        {**g, "table": g["table"] * (np.arange(4) > 1)[:, None]} for g in GRADS
    ]
    after = follow(optimizer, partial, WEIGHTS, axes=AXES)
    assert all(np.isfinite(w).all() for w in jax.tree.leaves(after))
    np.testing.assert_array_equal(after["table"][:2], WEIGHTS["table"][:2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pull(Method):
    """A student that regresses fixed targets."""

    inits = {"student": None}
    frozen = ()

    def loss(self, net, ctx):
        x = ctx.batch["x"]
        t = ctx.batch["t"]
        found = net.student(x, t)
        return Out(jnp.mean((found - jnp.sin(3 * x)) ** 2))


def five_steps(net: Net, shape, optimizer: Optimizer):
    """(weights, optimiser state) after five updates on a mesh."""
    mesh = sharding.make_mesh(shape, jax.devices()[: 8 if shape is EIGHT else 1])
    rules = {"student": sharding.Rules(bank="data")}
    method = Pull()
    nets = {"student": net}
    is_bank = isinstance(net, Bank)
    txs = {"student": optimizer.make(5, bank=is_bank, axes=net.axes)}
    x = np.random.default_rng(1).standard_normal((2, 8, 2)).astype(np.float32)
    batch = {"x": x, "t": np.full((2, 8), 0.5, np.float32)}
    if not is_bank:
        batch = {name: value[0] for name, value in batch.items()}

    def build(key):
        return init_state(method, nets, txs, key, {})

    with sharding.use(mesh):
        key = jax.random.key(0)
        abstract = jax.eval_shape(build, key)
        places = sharding.state_shardings(mesh, rules, nets, txs, abstract)
        state = jax.jit(build, out_shardings=places)(key)
        step, active_at = make_train_step(method, nets, txs, shardings=places)
        for i in range(5):
            state, _ = step(state, batch, jax.random.key(1), active_at(i))
    return state.params["student"], state.opt["student"]


@pytest.mark.parametrize("members", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_equal_one(name, members):
    net = make_net(MLP(width=16, depth=1))
    net = bank(net, members) if members else net
    optimizer = Optimizer(
        algorithm=name,
        lr=1e-3,
        warmup=2,
        clip_percentile=75,
        clip_window=2,
        nonfinite="skip",
    )
    one, _ = five_steps(net, ONE, optimizer)
    eight, opt = five_steps(net, EIGHT, optimizer)
    # sums in another order, in five updates that move a weight by about 1e-3 each
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    if name == "came":
        state = opt.inner[1][0]
        rows = state.rows["up"][0]["kernel"]
        columns = state.columns["up"][0]["kernel"]
        part = (1,) if members else ()
        assert rows.sharding.shard_shape(rows.shape) == (*part, 8, 1)
        assert columns.sharding.shard_shape(columns.shape) == (*part, 1, 16)
