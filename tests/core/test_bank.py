"""A bank of networks: members are independent, routing equals running each alone, and one network's
weights start all.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.bank import bank
from jaxdistill.core.net import is_spec, make_net
from jaxdistill.models.denoisers.mlp import MLP

X = jax.random.normal(jax.random.key(1), (4, 2))
T = jnp.linspace(0.1, 0.9, 4)


@pytest.fixture(scope="module")
def made():
    """(one network, a bank of three, weights of the bank)"""
    one = make_net(MLP(width=8, depth=2))
    three = bank(one, 3)

    @jax.jit
    def weights(key):
        # the last layer starts at zero
        return jax.tree.map(lambda w: w + 0.1, three.init(key))

    return one, three, weights(jax.random.key(0))


def close(a, b):
    # float32 sums in another order
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def member(params, k):
    return jax.tree.map(lambda w: w[k], params)


def test_members_start_apart(made):
    _, three, params = made
    kernels = [w for w in jax.tree.leaves(params) if w.ndim > 2 and np.ptp(w)]
    assert kernels
    assert all(not np.array_equal(w[0], w[1]) for w in kernels)
    every = jax.tree.leaves(three.axes, is_leaf=is_spec)
    assert all(axes[0] == "bank" for axes in every)


def test_every_way_of_calling_equals_each_member_alone(made):
    one, three, params = made
    alone = jnp.stack([one.apply(member(params, k), X, T) for k in range(3)])
    close(three.apply(params, jnp.stack([X] * 3), jnp.stack([T] * 3)), alone)
    close(jax.jit(lambda k: three.apply(params, X, T, member=k))(2), alone[2])
    route = jnp.array([2, 0, 1, 2])
    close(three.apply(params, X, T, member=route), alone[route, jnp.arange(4)])


def test_gradients_stay_with_their_member(made):
    _, three, params = made
    loss = lambda p: jnp.sum(three.apply(p, X, T, member=1) ** 2)
    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    for g in grads:
        assert not g[0].any()
        assert not g[2].any()
    assert any(g[1].any() for g in grads)


def test_takes_one_network_for_all_and_a_bank_as_it_is(made):
    one, three, params = made
    single = one.init(jax.random.key(3))
    taken = three.from_source(single)
    for w, s in zip(jax.tree.leaves(taken), jax.tree.leaves(single), strict=True):
        assert all(np.array_equal(w[k], s) for k in range(3))
    assert three.from_source(params) is params


def test_members_can_be_mapped_over(made):
    """`weights` and `alone` of a bound bank: a function of one network, mapped, is the bank's own
    program.
    """
    _, three, params = made
    bound = three.bind("student", {"student": params})
    mapped = jax.vmap(lambda w: bound.alone(w, X, T))(bound.weights)
    close(mapped, bound(jnp.stack([X] * 3), jnp.stack([T] * 3)))


def test_gradients_that_are_no_numbers_stop_their_member_alone(made):
    _, three, params = made
    hurt = jax.tree.map(lambda w: jnp.ones_like(w), params)
    hurt["inp"]["bias"] = hurt["inp"]["bias"].at[1, 0].set(jnp.inf)
    assert three.finite(hurt).tolist() == [True, False, True]
    assert not three.one.finite(hurt)
    assert three.one.finite(params)
    for w in jax.tree.leaves(three.sanitise(hurt)):
        assert not w[1].any()
        assert (w[0] == 1).all()
        assert (w[2] == 1).all()
    assert three.one.sanitise(hurt) is hurt
