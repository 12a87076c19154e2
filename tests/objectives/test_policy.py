import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives import policy
from jaxdistill.objectives.divergence import sequence_mean

RNG = np.random.default_rng(0)


def test_advantages_have_mean_0_and_std_1_in_each_group():
    reward = jnp.asarray(RNG.random(24), jnp.float32)
    a = np.asarray(policy.group_advantages(reward, 8)).reshape(3, 8)
    np.testing.assert_allclose(a.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(a.std(1), 1, atol=1e-5)  # eps / std
    r = np.asarray(reward).reshape(3, 8)
    np.testing.assert_allclose(
        a,
        (r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-6),
        atol=1e-5,
    )


@pytest.mark.parametrize(("ddof", "eps"), [(0, 1e-6), (1, 1e-4), (1, 1e-6)])
def test_which_standard_deviation(x64, ddof, eps):
    """The sample's with 1e-4, as TRL divides, and the population's."""
    reward = RNG.random(24)
    r = reward.reshape(3, 8)
    wanted = (r - r.mean(1, keepdims=True)) / (
        r.std(1, ddof=ddof, keepdims=True) + eps
    )
    np.testing.assert_allclose(
        policy.group_advantages(jnp.asarray(reward), 8, eps=eps, ddof=ddof),
        wanted.ravel(),
        rtol=1e-11,
    )


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.3, 1 / 3])
def test_equal_rewards_give_exactly_nothing(value):
    """Also where the mean of eight equal float32 would be rounded."""
    assert not policy.group_advantages(jnp.full(16, value), 8).any()


LOW = 0.2
HIGH = 0.28


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.5, 1, 0.0),
        (0.5, 1, 0.5),
        (1.1, 1, 1.1),
        (0.5, -1, 0.0),
        (1.5, -1, -1.5),
        (0.9, -1, -0.9),
        (1.5, 0, 0.0),
        (0.5, 0, 0.0),
    ],
)
def test_where_the_clipped_surrogate_has_a_gradient(ratio, advantage, slope):
    """d/d log q of what is maximised: r A, or nothing beyond the clip on the side that the
    advantage pushes to.
    """
    grad = jax.grad(
        lambda x: policy.clipped_surrogate(x, jnp.float32(advantage), LOW, HIGH)
    )(jnp.float32(np.log(ratio)))
    np.testing.assert_allclose(grad, -slope, rtol=1e-6)


def test_values_of_the_clipped_surrogate():
    ratio = np.exp(RNG.standard_normal(200))
    a = RNG.standard_normal(200)
    got = policy.clipped_surrogate(jnp.log(ratio), jnp.asarray(a), LOW, HIGH)
    np.testing.assert_allclose(
        got, -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.28) * a), rtol=2e-5
    )


@pytest.fixture(scope="module")
def laws():
    z = RNG.standard_normal((2, 6))
    return jnp.asarray(z[0]), jnp.asarray(z[1])


def expected(kind, laws, tokens_from="q"):
    """(E_q of the estimator, gradient in q's logits of that expectation with the tokens held
    fixed), enumerated.
    """
    p, q = laws

    def value(z):
        log_q = jax.nn.log_softmax(z)
        log_p = jax.nn.log_softmax(p)
        return jnp.sum(
            jax.lax.stop_gradient(jnp.exp(log_q))
            * policy.KL_ESTIMATORS[kind](log_p, log_q)
        )

    return jax.value_and_grad(value)(q)


def kl(log_a, log_b):
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b))


def test_estimators_of_the_kl(laws):
    log_p, log_q = map(jax.nn.log_softmax, laws)
    exact = kl(log_q, log_p)
    for kind in ("k1", "k3"):
        np.testing.assert_allclose(expected(kind, laws)[0], exact, rtol=1e-5)
    assert (policy.k3(log_p, log_q) >= 0).all() and (
        policy.k2(log_p, log_q) >= 0
    ).all()
    # k2 is right to leading order
    near = (
        laws[1] + 1e-2 * (laws[0] - laws[1]),
        laws[1],
    )
    np.testing.assert_allclose(
        expected("k2", near)[0], kl(log_q, jax.nn.log_softmax(near[0])), rtol=2e-2
    )


def test_gradients_of_the_estimators(laws):
    p, q = laws
    reverse = jax.grad(lambda z: kl(jax.nn.log_softmax(z), jax.nn.log_softmax(p)))(
        q
    )
    forward = jax.grad(lambda z: kl(jax.nn.log_softmax(p), jax.nn.log_softmax(z)))(
        q
    )
    for kind, exact in (("k1", 0 * q), ("k2", reverse), ("k3", forward)):
        np.testing.assert_allclose(expected(kind, laws)[1], exact, atol=1e-6)


def test_clamps_agree_in_value_and_differ_in_gradient():
    x = jnp.array([-3.0, -0.5, 0.2, 4.0])
    for name, slope in (
        ("literal", [0, 1, 1, 0]),
        ("straight_through", [1, 1, 1, 1]),
    ):
        clamp = policy.CLAMPS[name]
        np.testing.assert_allclose(clamp(x, 1.0), [-1, -0.5, 0.2, 1], rtol=1e-6)
        np.testing.assert_array_equal(
            jax.vmap(jax.grad(lambda y, clamp=clamp: clamp(y, 1.0)))(x), slope
        )


def test_sequence_mean():
    x = jnp.array([[1.0, 3, jnp.nan], [5, jnp.inf, 1], [jnp.nan] * 3])
    mask = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    np.testing.assert_array_equal(sequence_mean(x, mask), [2, 5, 0])
