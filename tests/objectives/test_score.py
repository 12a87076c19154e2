"""Distribution matching on Gaussians of equal variance, where every denoiser is closed form
(00-foundations, section 8).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives import score

M_G = 0.3
M_R = -0.8
STD = 0.7
EPS64 = np.finfo(np.float64).eps


pytestmark = pytest.mark.usefixtures("x64")


def denoiser(mean, alpha, sigma):
    """E[x0 | x_t] for data N(mean, STD^2)."""
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return lambda x: mean + gain * (x - alpha * mean)


def noised(alpha=1.0, sigma=0.9, mean=M_G, n=6):
    rng = np.random.default_rng(0)
    z, eps = jnp.asarray(rng.standard_normal((2, n, 3)))
    x0 = mean + STD * z
    return x0, alpha * x0 + sigma * eps


def test_surrogate_gradient_is_grad_over_numel():
    x, grad = (
        jnp.asarray(
            np.random.default_rng(s).standard_normal((4, 2, 3)), jnp.float32
        )
        for s in (0, 1)
    )
    value, got = jax.value_and_grad(score.gradient_surrogate)(x, grad)
    np.testing.assert_array_equal(got, grad / np.float32(grad.size))
    np.testing.assert_allclose(value, np.mean(np.asarray(grad) ** 2) / 2, rtol=1e-6)
    np.testing.assert_array_equal(
        jax.grad(score.gradient_surrogate, argnums=1)(x, grad), 0.0
    )
    # a gradient far below the sample's rounding survives
    tiny = jax.grad(score.gradient_surrogate)(x + 1e4, jnp.full_like(x, 1e-6))
    np.testing.assert_allclose(tiny, 1e-6 / x.size, rtol=1e-6)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.9), (0.6, 0.4), (0.1, 1.0)])
def test_gap_of_the_denoisers_is_the_gradient_of_the_kl(alpha, sigma):
    """D_psi - D_phi = sigma^2 (m_g - m_r) / S; times (alpha/sigma)^2 it is dKL_t/dm_g with KL_t =
    alpha^2 (m_g - m_r)^2 / 2S.
    """
    var = alpha**2 * STD**2 + sigma**2
    _, xt = noised(alpha, sigma)
    real = denoiser(M_R, alpha, sigma)(xt)
    fake = denoiser(M_G, alpha, sigma)(xt)
    np.testing.assert_allclose(
        fake - real, sigma**2 * (M_G - M_R) / var, rtol=1e-12
    )
    slope = jax.grad(lambda m: alpha**2 * (m - M_R) ** 2 / (2 * var))(M_G)
    grad = score.diff_instruct_gradient(
        real, fake, jnp.full((6, 1), (alpha / sigma) ** 2)
    )
    np.testing.assert_allclose(grad, slope, rtol=1e-12)
    scores = [-(xt - alpha * m) / var for m in (M_G, M_R)]
    np.testing.assert_allclose(alpha * (scores[0] - scores[1]), slope, rtol=1e-12)
    np.testing.assert_allclose(
        score.diff_instruct_gradient(real, fake), fake - real, rtol=0
    )


def test_dmd_gradient_divides_by_each_samples_mean_distance():
    x0, xt = noised()
    real = denoiser(M_R, 1.0, 0.9)(xt)
    fake = denoiser(M_G, 1.0, 0.9)(xt)
    grad = score.dmd_gradient(x0, real, fake)
    for i in range(len(x0)):
        np.testing.assert_allclose(
            grad[i],
            (fake[i] - real[i]) / np.mean(np.abs(x0[i] - real[i])),
            rtol=1e-12,
        )
    np.testing.assert_allclose(
        score.dmd_gradient(3 * x0, 3 * real, 3 * fake), grad, rtol=1e-12
    )
    flow = jax.grad(
        lambda x, r, f: score.dmd_gradient(x, r, f).sum(), argnums=(0, 1, 2)
    )(x0, real, fake)
    assert all(not np.any(g) for g in flow)


def test_dmd_gradient_is_zero_where_its_normaliser_is():
    x0 = jnp.ones((3, 2))
    real = x0.at[1].add(1.0)
    fake = (x0 + 0.5).at[2].set(1.0)
    np.testing.assert_array_equal(
        score.dmd_gradient(x0, real, fake), [[0, 0], [-0.5, -0.5], [0, 0]]
    )


@pytest.mark.parametrize("name", ["dmd", "diff_instruct", "sid"])
def test_equal_laws_give_zero(name):
    """psi = phi: nothing left to move."""
    x0, xt = noised(mean=M_R)
    d = denoiser(M_R, 1.0, 0.9)
    grads = {
        "dmd": lambda: score.dmd_gradient(x0, d(xt), d(xt)),
        "diff_instruct": lambda: score.diff_instruct_gradient(d(xt), d(xt)),
        "sid": lambda: jax.grad(
            lambda x: score.sid_loss(x, d(xt + x - x0), d(xt + x - x0)).sum()
        )(x0),
    }
    np.testing.assert_array_equal(grads[name](), 0.0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_sid_gradient_does_not_depend_on_alpha_and_its_value_does(alpha):
    """With the weight taken out: gradient c^2 (m_g - m_r), mean value (1 - alpha) c^2 (m_g -
    m_r)^2, c = sigma^2 / S.
    """
    sigma = 0.9
    c = sigma**2 / (STD**2 + sigma**2)
    x0, xt = noised(1.0, sigma)
    psi = denoiser(M_G, 1.0, sigma)
    phi = denoiser(M_R, 1.0, sigma)
    weight = np.mean(np.abs(x0 - phi(xt)), -1)

    def loss(x0):
        xt_of = xt + x0 - jax.lax.stop_gradient(x0)
        return weight * score.sid_loss(
            x0, phi(xt_of), psi(xt_of), alpha=alpha, scale=1.0
        )

    np.testing.assert_allclose(
        jax.grad(lambda x: loss(x).sum())(x0), c**2 * (M_G - M_R), rtol=1e-12
    )
    # D_phi - x0 has mean c (m_r - m_g) over the law: take out the deviation of these samples
    gap = c * (M_R - M_G)
    deviation = np.sum(gap * (phi(xt) - x0 - gap), -1)
    np.testing.assert_allclose(
        loss(x0) - deviation, 3 * (1 - alpha) * gap**2, rtol=1e-11, atol=1e-13
    )


def test_sid_weight_is_floored_and_one_value_comes_per_sample():
    x0, xt = noised()
    real = xt
    fake = xt + 1e-3
    out = score.sid_loss(x0, real, fake)
    assert out.shape == (6,)
    at_zero = score.sid_loss(x0, x0, x0 - 1e-6, alpha=1.2)
    np.testing.assert_allclose(at_zero, 100 / 1e-5 * 3 * -1.2e-12, rtol=1e-5)


def test_exact_fake_score_makes_the_loop_converge_exponentially():
    """Inner psi exact, outer descent on m_g: m_g - m_r shrinks by 1 - eta c each update."""
    sigma = 0.9
    eta = 0.2
    m = jnp.asarray(2.0)
    c = sigma**2 / (STD**2 + sigma**2)
    for k in range(5):
        _, xt = noised(1.0, sigma, mean=m)
        grad = score.diff_instruct_gradient(
            denoiser(M_R, 1.0, sigma)(xt), denoiser(m, 1.0, sigma)(xt)
        )
        m = m - eta * jnp.mean(grad)
        np.testing.assert_allclose(
            m - M_R, (2.0 - M_R) * (1 - eta * c) ** (k + 1), rtol=1e-12
        )


def test_summed_surrogate_gradient_is_grad_for_each_sample():
    x, grad = (
        jnp.asarray(np.random.default_rng(s).standard_normal((4, 2, 3)))
        for s in (0, 1)
    )
    assert score.summed_surrogate(x, grad).shape == (4,)
    np.testing.assert_array_equal(
        jax.grad(lambda x: score.summed_surrogate(x, grad)[1])(x),
        grad * (jnp.arange(4) == 1)[:, None, None],
    )
    np.testing.assert_allclose(
        score.summed_surrogate(x, grad).sum() / x.size,
        score.gradient_surrogate(x, grad),
        rtol=1e-12,
    )


def test_dmd_gradient_with_a_floor():
    """A normaliser below the floor is the floor; above it nothing changes."""
    real = jnp.zeros((2, 3))
    fake = jnp.full((2, 3), 1e-3)
    x0 = jnp.asarray([[1e-6] * 3, [0.5] * 3])
    np.testing.assert_allclose(
        score.dmd_gradient(x0, real, fake, floor=1e-4),
        [[10.0] * 3, [2e-3] * 3],
        rtol=1e-12,
    )


@pytest.mark.parametrize("s", [0.0, 0.5])
def test_kl_gradient_is_the_difference_of_scores_at_a_sample_between(s):
    """w (v_phi - v_psi) = alpha_{t|s} (s_psi - s_phi), w = alpha_t alpha_{t|s} / (alpha_t sigma_t +
    sigma_t^2), on rectified flow.
    """
    t = 0.8
    ratio = (1 - t) / (1 - s)
    var = (1 - t) ** 2 * STD**2 + t**2
    _, xt = noised(1 - t, t)
    real = denoiser(M_R, 1 - t, t)(xt)
    fake = denoiser(M_G, 1 - t, t)(xt)
    got = score.kl_gradient(real, fake, 1 - t, t, ratio)
    scores = [-(xt - (1 - t) * m) / var for m in (M_G, M_R)]
    np.testing.assert_allclose(got, ratio * (scores[0] - scores[1]), rtol=1e-11)
    velocity = lambda x0: (xt - x0) / t
    weight = (1 - t) * ratio / ((1 - t) * t + t**2)
    np.testing.assert_allclose(
        got, weight * (velocity(real) - velocity(fake)), rtol=1e-11
    )
    for v, true in ((velocity(real), scores[1]), (velocity(fake), scores[0])):
        np.testing.assert_allclose(-(xt + (1 - t) * v) / t, true, rtol=1e-11)
    # d KL_t / d m_g through x_s = (1 - s) m_g + ...: alpha_t = ratio (1 - s)
    np.testing.assert_allclose(
        (1 - s) * got,
        jax.grad(lambda m: (1 - t) ** 2 * (m - M_R) ** 2 / (2 * var))(M_G),
        rtol=1e-11,
    )


def test_sim_loss_tends_to_the_score_identity_and_to_unit_gaps():
    """c -> inf: c times it is SiD's at alpha = 1 without the weight. c -> 0: the unit direction of
    the gap times (D_psi - x0).
    """
    x0, xt = noised()
    psi = denoiser(M_G, 1.0, 0.9)
    phi = denoiser(M_R, 1.0, 0.9)
    plain = lambda x: jnp.sum(
        (phi(xt + x - x0) - psi(xt + x - x0)) * (psi(xt + x - x0) - x), -1
    )
    huge = lambda x: (
        1e6 * score.sim_loss(x, phi(xt + x - x0), psi(xt + x - x0), 1e6)
    )
    np.testing.assert_allclose(huge(x0), plain(x0), rtol=1e-10)
    np.testing.assert_allclose(
        jax.grad(lambda x: huge(x).sum())(x0),
        jax.grad(lambda x: plain(x).sum())(x0),
        rtol=1e-10,
    )
    gap = phi(xt) - psi(xt)
    unit = gap / jnp.linalg.norm(gap, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        score.sim_loss(x0, phi(xt), psi(xt), 1e-9),
        jnp.sum(unit * (psi(xt) - x0), -1),
        rtol=1e-12,
    )
