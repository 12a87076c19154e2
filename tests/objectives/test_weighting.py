"""The same error in another target: weights against the processes themselves (00-foundations,
sections 2 and 3).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.diffusion.process import EDM, VP, Flow, Trig
from jaxdistill.objectives import weighting as w

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(
    "process",
    [Flow(), Flow(shift=3.0), VP(), EDM(), Trig()],
    ids=lambda p: type(p).__name__,
)
def test_conversion_factors(process):
    """Two predictions at the same x_t: their gap in eps and in v is the weighted gap in x0."""
    t = jnp.linspace(process.t_min + 0.1, 0.9 * process.t_max, 5)
    xt, one, two = (
        jnp.asarray(np.random.default_rng(s).standard_normal((5, 3)))
        for s in range(3)
    )
    a = process.from_x0(one, xt, t)
    b = process.from_x0(two, xt, t)
    gap = lambda name: jnp.sum((getattr(a, name) - getattr(b, name)) ** 2, -1)
    alpha, sigma, d_alpha, d_sigma = process.coefs(t)
    np.testing.assert_allclose(
        gap("eps"), w.snr(alpha, sigma) * gap("x0"), rtol=1e-12
    )
    np.testing.assert_allclose(
        gap("v"), w.velocity(alpha, sigma, d_alpha, d_sigma) * gap("x0"), rtol=1e-12
    )
    vp = lambda p: alpha[:, None] * p.eps - sigma[:, None] * p.x0
    if process == VP():
        np.testing.assert_allclose(
            jnp.sum((vp(a) - vp(b)) ** 2, -1),
            w.vp_velocity(alpha, sigma) * gap("x0"),
            rtol=1e-12,
        )
        np.testing.assert_allclose(
            w.vp_velocity(alpha, sigma), 1 / sigma**2, rtol=1e-12
        )
    if process == Flow():
        np.testing.assert_allclose(
            w.velocity(alpha, sigma, d_alpha, d_sigma), 1 / t**2, rtol=1e-12
        )


def test_edm_weight_undoes_c_out():
    s = jnp.asarray([0.002, 0.5, 80.0])
    c_out = s * 0.5 / jnp.sqrt(s**2 + 0.25)
    np.testing.assert_allclose(w.edm(s) * c_out**2, 1.0, rtol=1e-14)


def test_clamped_snr():
    alpha = jnp.ones(3)
    sigma = jnp.asarray([0.1, 0.5, 2.0])
    np.testing.assert_allclose(
        w.min_snr(alpha, sigma), [5.0, 4.0, 0.25], rtol=1e-14
    )
    np.testing.assert_allclose(
        w.truncated_snr(alpha, sigma), [100.0, 4.0, 1.0], rtol=1e-14
    )


def test_uncertainty_is_best_at_the_log_of_the_loss():
    loss = jnp.asarray([0.01, 1.0, 30.0])
    best = jnp.log(loss)
    np.testing.assert_allclose(
        jax.grad(lambda u: w.uncertainty(loss, u).sum())(best), 0.0, atol=1e-14
    )
    np.testing.assert_allclose(w.uncertainty(loss, best), 1 + best, rtol=1e-14)
    np.testing.assert_allclose(
        jax.grad(
            lambda l: w.uncertainty(l, jnp.log(jax.lax.stop_gradient(l))).sum()
        )(loss),
        1 / loss,
        rtol=1e-14,
    )


def test_adaptive_weight():
    """Under stop_gradient: at p = 1 a weighted loss L / (L + c) near 1, with the gradient of log(L
    + c).
    """
    loss = jnp.asarray([1e-4, 1.0, 1e4])
    value, grad = jax.value_and_grad(lambda l: (w.adaptive(l, c=1e-3) * l).sum())(
        loss
    )
    np.testing.assert_allclose(value, (loss / (loss + 1e-3)).sum(), rtol=1e-14)
    np.testing.assert_allclose(
        grad, jax.grad(lambda l: jnp.log(l + 1e-3).sum())(loss), rtol=1e-13
    )
    np.testing.assert_array_equal(w.adaptive(loss, p=0.0), 1.0)


def test_barron_weight():
    """alpha = 1 is |.| / c beyond c, with the gradient of 2 sqrt(L); alpha = 2 is squared error;
    the weight takes no gradient.
    """
    loss = jnp.asarray([1e-9, 1e-2, 4.0])
    c = 1e-3
    value, grad = jax.value_and_grad(lambda l: (w.barron(l) * l).sum())(loss)
    weight = (loss / (c**2 + 1e-8) + 1) ** -0.5 / c
    np.testing.assert_allclose(value, (weight * loss).sum(), rtol=1e-13)
    np.testing.assert_allclose(grad, weight, rtol=1e-13)
    # 1e-8 beside c^2 is half a percent of the root
    np.testing.assert_allclose(grad[1:], 1 / jnp.sqrt(loss[1:]), rtol=6e-3)
    np.testing.assert_allclose(w.barron(loss, alpha=2.0, c=0.5), 2.0, rtol=1e-15)
    np.testing.assert_allclose(
        w.barron(loss, alpha=0.0, c=1.0),
        1 / (loss / (2 * (1 + 1e-8)) + 1),
        rtol=1e-13,
    )


def test_gap_weight():
    """1 for the whole way, 1 + tan(72 degrees) for none, by the size of signed times."""
    t = jnp.asarray([1.0, 0.5, -0.5, 0.8])
    r = jnp.asarray([0.0, 0.5, -0.5, 0.2])
    want = [
        1.0,
        1 + np.tan(np.deg2rad(72)),
        1 + np.tan(np.deg2rad(72)),
        1 + np.tan(np.deg2rad(72 * 0.4)),
    ]
    np.testing.assert_allclose(w.gap(t, r), want, rtol=1e-12)
    np.testing.assert_allclose(w.gap(t, r)[1], 4.078, atol=5e-4)
