"""Maximum mean discrepancy: definitions, bias, and the linear kernel's shortcuts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.objectives import mmd

pytestmark = pytest.mark.usefixtures("x64")


def draw(n, dim=3, seed=0, shift=0.0, std=1.0):
    return jnp.asarray(
        np.random.default_rng(seed).standard_normal((n, dim)) * std + shift
    )


DOT = lambda a, b: a @ b.T
PAIRS = [
    (kernel, estimator) for kernel in mmd.ESTIMATES for estimator in ("u", "v")
]


def test_linear_shortcuts_are_the_double_sums():
    x = draw(7)
    y = draw(9, seed=1, shift=0.5)
    np.testing.assert_allclose(
        mmd.linear_v(x, y), mmd.v_statistic(DOT, x, y), rtol=1e-12
    )
    np.testing.assert_allclose(
        mmd.linear_u(x, y), mmd.u_statistic(DOT, x, y), rtol=1e-12
    )
    traces = [
        np.trace(np.cov(np.asarray(a), rowvar=False)) / len(a) for a in (x, y)
    ]
    np.testing.assert_allclose(
        mmd.linear_u(x, y), mmd.linear_v(x, y) - sum(traces), rtol=1e-12
    )


@pytest.mark.parametrize("kernel", mmd.ESTIMATES)
def test_equal_sets_have_no_v_statistic_and_no_gradient(kernel):
    x = draw(8)
    value, grad = jax.jit(
        jax.value_and_grad(lambda y: mmd.mmd2(x, y, kernel, "v"))
    )(x[::-1])
    np.testing.assert_allclose(value, 0.0, atol=1e-14)
    np.testing.assert_allclose(grad, 0.0, atol=1e-14)


@pytest.mark.parametrize("kernel", mmd.ESTIMATES)
def test_u_statistic_has_mean_zero_for_one_law(kernel):
    values = jax.jit(jax.vmap(lambda a: mmd.mmd2(a[:16], a[16:], kernel, "u")))(
        draw(300 * 36).reshape(300, 36, 3)
    )
    assert abs(values.mean()) < 3 * values.std() / 300**0.5
    assert values.min() < 0 < values.max()


def test_bias_of_the_v_statistic():
    """E[V] - MMD^2 = tr Cov(x) / n + tr Cov(y) / m: here 3 / 10 + 12 / 20, MMD^2 = 3 / 4."""
    x = draw(4000 * 10).reshape(4000, 10, 3)
    y = draw(4000 * 20, seed=1, shift=0.5, std=2.0).reshape(4000, 20, 3)
    values = jax.jit(jax.vmap(mmd.linear_v))(x, y)
    np.testing.assert_allclose(
        values.mean(), 0.75 + 0.3 + 0.6, atol=4 * float(values.std()) / 4000**0.5
    )


def test_gradient_of_the_linear_v_statistic():
    """(2 / m) (mean y - mean x) for every y_j."""
    x = draw(7)
    y = draw(9, seed=1)
    grad = jax.grad(lambda y: mmd.mmd2(x, y, "linear", "v"))(y)
    np.testing.assert_allclose(
        grad, jnp.broadcast_to(2 / 9 * (y.mean(0) - x.mean(0)), y.shape), rtol=1e-12
    )


@pytest.mark.parametrize(("kernel", "estimator"), PAIRS)
def test_order_does_not_matter(kernel, estimator):
    x = draw(7)
    y = draw(9, seed=1, shift=0.3)
    mmd2 = jax.jit(lambda x, y: mmd.mmd2(x, y, kernel, estimator))
    np.testing.assert_allclose(
        mmd2(x[::-1], np.roll(y, 2, 0)), mmd2(x, y), rtol=1e-10
    )


def test_random_fourier_features_tend_to_the_rbf_kernel():
    """sqrt(2 / D) cos(w x + b), w ~ N(0, 1 / h^2), linear kernel: MMD^2 to O(1 / sqrt(D))."""
    x = draw(50)
    y = draw(50, seed=1, shift=0.7)
    rng = np.random.default_rng(2)
    want = mmd.v_statistic(lambda a, b: jnp.exp(-mmd.squared(a, b) / 2), x, y)
    w = rng.standard_normal((3, 40_000))
    b = rng.uniform(0, 2 * np.pi, 40_000)
    psi = lambda a: (2 / 40_000) ** 0.5 * jnp.cos(a @ w + b)
    np.testing.assert_allclose(mmd.linear_v(psi(x), psi(y)), want, atol=3 / 200)
    assert want > 0.1


def test_the_width_is_the_median_distance_and_is_held():
    x = draw(6)
    y = draw(6, seed=1, shift=1.0)
    width = mmd.median_distance(np.asarray(x), np.asarray(y))
    got = jax.jit(jax.value_and_grad(lambda y: mmd.mmd2(x, y, "rbf", "u")))(y)
    want = jax.jit(
        jax.value_and_grad(lambda y: mmd.u_statistic(mmd.rbf(width), x, y))
    )(y)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, want
    )


def test_numpy_and_jax_give_the_same():
    x = draw(6)
    y = draw(8, seed=1, shift=0.2)
    both = [
        mmd.u_statistic(mmd.rbf(mmd.median_distance(a, b)), a, b)
        for a, b in ((x, y), (np.asarray(x), np.asarray(y)))
    ]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-12)
    assert isinstance(both[1], np.floating)


def test_low_precision_is_summed_in_float32():
    x = draw(6).astype(jnp.bfloat16)
    assert mmd.mmd2(x, x).dtype == jnp.float32


def test_refuses_other_names():
    with pytest.raises(Refused, match=r"kernel='lin'.*linear"):
        mmd.mmd2(draw(4), draw(4), "lin")
    with pytest.raises(Refused, match="estimator='w'"):
        mmd.mmd2(draw(4), draw(4), "rbf", "w")
