"""A bank of networks: members are independent, routing equals running each alone, one network's
weights serve all.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.bank import bank
from jaxdistill.core.net import make_net
from jaxdistill.models.denoisers.mlp import MLP


@pytest.fixture(scope="module")
def made():
    one = make_net(MLP(width=8, depth=2))
    three = bank(one, 3)
    params = jax.tree.map(
        lambda w: w + 0.1, three.init(jax.random.key(0))
    )  # the last layer starts at zero
    x = jax.random.normal(jax.random.key(1), (4, 2))
    t = jnp.linspace(0.1, 0.9, 4)
    return one, three, params, x, t


def member(params, k):
    return jax.tree.map(lambda w: w[k], params)


def test_members_start_apart(made):
    _, three, params, _, _ = made
    kernels = [w for w in jax.tree.leaves(params) if w.ndim > 2 and np.ptp(w)]
    assert kernels and all(not np.array_equal(w[0], w[1]) for w in kernels)
    assert all(
        axes[0] == "bank"
        for axes in jax.tree.leaves(
            three.axes, is_leaf=lambda a: isinstance(a, jax.sharding.PartitionSpec)
        )
    )


def test_every_way_of_calling_equals_each_member_alone(made):
    one, three, params, x, t = made
    alone = jnp.stack([one.apply(member(params, k), x, t) for k in range(3)])
    same = lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-6
    )  # float32, other order of summation
    same(three.apply(params, jnp.stack([x] * 3), jnp.stack([t] * 3)), alone)
    same(jax.jit(lambda k: three.apply(params, x, t, member=k))(2), alone[2])
    route = jnp.array([2, 0, 1, 2])
    same(three.apply(params, x, t, member=route), alone[route, jnp.arange(4)])


def test_gradients_stay_with_their_member(made):
    _, three, params, x, t = made
    grads = jax.grad(lambda p: jnp.sum(three.apply(p, x, t, member=1) ** 2))(params)
    for g in jax.tree.leaves(grads):
        assert not g[0].any() and not g[2].any()
    assert any(g[1].any() for g in jax.tree.leaves(grads))


def test_adopts_one_network_for_all_and_a_bank_as_it_is(made):
    one, three, params, _, _ = made
    single = one.init(jax.random.key(3))
    adopted = three.from_source(single)
    for w, s in zip(jax.tree.leaves(adopted), jax.tree.leaves(single), strict=True):
        assert all(np.array_equal(w[k], s) for k in range(3))
    assert three.from_source(params) is params


def test_members_can_be_mapped_over(made):
    """`weights` and `alone` of a bound bank: a function of one network, mapped, is the bank's own
    program.
    """
    _, three, params, x, t = made
    bound = three.bind("student", {"student": params})
    mapped = jax.vmap(lambda w: bound.alone(w, x, t))(bound.weights)
    np.testing.assert_allclose(
        mapped, bound(jnp.stack([x] * 3), jnp.stack([t] * 3)), rtol=1e-5, atol=1e-6
    )


def test_gradients_that_are_no_numbers_stop_their_member_alone(made):
    _, three, params, _, _ = made
    hurt = jax.tree.map(lambda w: jnp.ones_like(w), params)
    hurt["inp"]["bias"] = hurt["inp"]["bias"].at[1, 0].set(jnp.inf)
    for w in jax.tree.leaves(three.sanitise(hurt)):
        assert not w[1].any() and (w[0] == 1).all() and (w[2] == 1).all()
    assert three.one.sanitise(hurt) is hurt
