"""Total derivatives: exact against a closed form, and the two ways against each other."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.diffusion.tangent import (
    DERIVATIVES,
    backward_difference,
    central_difference,
    total_derivative,
)


def path(t):
    """A curve x(t) [2 3] and its tangent."""
    a = jnp.arange(1.0, 7.0).reshape(2, 3)
    return jnp.sin(a * t[:, None]), a * jnp.cos(a * t[:, None])


def field(x, t, scale):
    return x**2 * scale + jnp.exp(-x) * t[:, None]


def test_total_derivative_is_the_derivative_along_a_path():
    with jax.enable_x64(True):
        t = jnp.array([0.3, 0.8])
        x, dx = path(t)
        value, slope = total_derivative(
            lambda x, t: field(x, t, 3.0), (x, t), (dx, jnp.ones(2))
        )
        np.testing.assert_array_equal(value, field(x, t, 3.0))
        along = lambda s: field(path(t + s)[0], t + s, 3.0)
        np.testing.assert_allclose(slope, jax.jacfwd(along)(0.0), rtol=1e-13)


def test_central_difference_agrees_to_its_order():
    """Truncation h^2 |f'''| / 6 with h = eps^(1/3); f''' of these paths is below 1e3."""
    with jax.enable_x64(True):
        t = jnp.array([0.3, 0.8])
        x, dx = path(t)
        args = (lambda x, t: field(x, t, 3.0), (x, t), (dx, jnp.ones(2)))
        exact = total_derivative(*args)
        near = central_difference(*args)
        np.testing.assert_array_equal(near[0], exact[0])
        np.testing.assert_allclose(
            near[1], exact[1], atol=1e3 * np.finfo(np.float64).eps ** (2 / 3)
        )
        assert not np.array_equal(near[1], exact[1])


def test_backward_difference_has_the_given_step():
    """Of a cubic: 3 x^2 - 3 x h + h^2 with a step h, which the derivative alone is not."""
    with jax.enable_x64(True):
        x = jnp.array([0.5, 2.0])
        value, slope = backward_difference(0.01)(
            lambda x: x**3, (x,), (jnp.ones(2),)
        )
        np.testing.assert_array_equal(value, x**3)
        np.testing.assert_allclose(slope, 3 * x**2 - 0.03 * x + 1e-4, rtol=1e-12)
        low = backward_difference(0.01)(lambda x: x**3, (x,), (2 * jnp.ones(2),))[1]
        # over the step 0.02 of x, at twice the speed
        np.testing.assert_allclose(
            low, 2 * (3 * x**2 - 0.06 * x + 4e-4), rtol=1e-12
        )


def test_central_difference_in_float32():
    t = jnp.array([0.3, 0.8], jnp.float32)
    x, dx = path(t)
    args = (lambda x, t: field(x, t, 3.0), (x, t), (dx, jnp.ones(2)))
    near = central_difference(*args)[1]
    exact = total_derivative(*args)[1]
    assert near.dtype == jnp.float32
    np.testing.assert_allclose(
        near, exact, atol=1e3 * float(np.finfo(np.float32).eps) ** (2 / 3)
    )


def test_only_the_value_is_differentiated_where_the_slope_is_stopped():
    def loss(w):
        value, slope = total_derivative(lambda x: w * x**3, (2.0,), (1.0,))
        return value * jax.lax.stop_gradient(slope)

    assert jax.grad(loss)(1.0) == 8.0 * 12.0


def test_names():
    assert {"jvp": total_derivative, "central": central_difference} == DERIVATIVES
