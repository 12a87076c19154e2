import itertools
from math import factorial, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives.ranking import plackett_luce, reranked

RNG = np.random.default_rng(0)
S = jnp.asarray(RNG.standard_normal(5), jnp.float32)


def test_probabilities_of_all_orders_sum_to_1():
    orders = jnp.asarray(list(itertools.permutations(range(5))))
    np.testing.assert_allclose(
        jnp.exp(-plackett_luce(S[orders])).sum(), 1, rtol=1e-5
    )


def test_one_two_and_equal_items():
    value, grad = jax.value_and_grad(lambda s: plackett_luce(s))(S[:1])
    assert value == 0 and grad == 0
    np.testing.assert_allclose(
        plackett_luce(S[:2]), jax.nn.softplus(S[1] - S[0]), rtol=1e-6
    )
    for k in (2, 5, 10):
        np.testing.assert_allclose(
            plackett_luce(jnp.full(k, 3.0)), log(factorial(k)), rtol=1e-6
        )


def test_it_raises_the_favourite_and_lowers_the_last():
    grad = np.asarray(jax.jit(jax.grad(plackett_luce))(np.zeros(5, np.float32)))
    assert grad[0] < 0 < grad[-1] and (np.diff(grad) > 0).all()
    np.testing.assert_allclose(grad[0], 1 / 5 - 1, rtol=1e-5)


def test_a_constant_changes_nothing():
    both = jax.jit(jax.value_and_grad(plackett_luce))
    for a, b in zip(both(S), both(S + 7)):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_suffix_sums():
    s = np.asarray(S, np.float64)
    expected = sum(np.log(np.exp(s[j:]).sum()) - s[j] for j in range(5))
    np.testing.assert_allclose(plackett_luce(S), expected, rtol=1e-6)
    # the suffix is the prefix of the reversed
    np.testing.assert_allclose(
        jax.lax.cumlogsumexp(S, reverse=True),
        jax.lax.cumlogsumexp(S[::-1])[::-1],
        rtol=1e-6,
    )


@pytest.mark.parametrize("change", [lambda z: 3 * z + 1, jnp.exp, lambda z: z**3])
def test_only_the_teachers_order_counts(change):
    teacher, student = (
        jnp.asarray(RNG.standard_normal((4, 9)), jnp.float32) for _ in range(2)
    )
    loss = lambda z, p: plackett_luce(reranked(p, z, 4)).sum()
    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (grad, to_teacher) = both(student, teacher)
    other, (same, _) = both(student, change(teacher))
    assert value == other and (grad == same).all()
    assert not to_teacher.any()
    kept = np.sort(student, -1)[:, -4:-3]
    # nothing outside the candidates
    np.testing.assert_array_equal(grad != 0, student >= kept)


def test_candidates_come_in_the_teachers_order():
    teacher = jnp.array([0.0, 5.0, 1.0, 9.0])
    student = jnp.array([3.0, 2.0, 1.0, 0.0])
    np.testing.assert_array_equal(reranked(teacher, student, 3), [2.0, 1.0, 3.0])
    np.testing.assert_array_equal(
        reranked(teacher, student, 99), [0.0, 2.0, 1.0, 3.0]
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_one_law_learns_the_order(sign):
    """200 steps of the suffix form make the student's order the teacher's; the reversed ranking
    makes it the opposite.
    """
    teacher, start = (
        jnp.asarray(RNG.standard_normal(20), jnp.float32) for _ in range(2)
    )
    ids = jax.lax.top_k(start, 10)[1]
    order = ids[jnp.argsort(-teacher[ids])][::sign]

    def step(z, _):
        return z - 0.5 * jax.grad(lambda z: plackett_luce(z[order]))(z), None

    z, _ = jax.jit(lambda z: jax.lax.scan(step, z, length=200))(start)
    pairs = [(i, j) for i in ids.tolist() for j in ids.tolist() if i < j]
    tau = np.mean(
        [np.sign((z[i] - z[j]) * (teacher[i] - teacher[j])) for i, j in pairs]
    )
    assert tau == sign
