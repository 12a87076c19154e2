"""Identities of noising processes and predictions (00-foundations, sections 1 and 2)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.diffusion.process import (
    DDPM,
    EDM,
    VP,
    CosineVP,
    Flow,
    Pred,
    Trig,
    expand,
)

PROCESSES = {
    "flow": Flow(),
    "shifted": Flow(shift=3.0),
    "trig": Trig(),
    "edm": EDM(),
    "vp": VP(),
    "cosine": CosineVP(),
    "ddpm": DDPM(),
    "sd": DDPM(scaled=True, beta_min=0.00085, beta_max=0.012),
}
PRESERVING = ("vp", "cosine", "ddpm", "sd")
EPS32 = np.finfo(np.float32).eps
EPS64 = np.finfo(np.float64).eps

every = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def grid(process, n=257):
    return jnp.linspace(process.t_min, process.t_max, n)


def inner(process, n=33):
    """Times of noise-to-signal ratios from e^-2.5 to e^2.5, which every process has."""
    return process.time_of_lam(jnp.linspace(2.5, -2.5, n))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def test_rectified_flow_ends_exactly():
    x0 = draw(2, 3)
    eps = draw(2, 3, seed=1)
    np.testing.assert_array_equal(Flow().add_noise(x0, eps, jnp.zeros(2)), x0)
    np.testing.assert_array_equal(Flow().add_noise(x0, eps, jnp.ones(2)), eps)
    np.testing.assert_array_equal(
        Flow(shift=3.0).add_noise(x0, eps, jnp.ones(2)), eps
    )


@every
def test_sampling_starts_from_noise_of_the_states_size(process):
    """As alpha x0 + sigma eps has it for x0 of unit variance: the noise itself where alpha^2 +
    sigma^2 = 1, else sigma eps.
    """
    a, s = process.alpha_sigma(jnp.asarray(process.t_max))
    preserving = abs(a**2 + s**2 - 1) < 1e-6
    np.testing.assert_allclose(
        process.start(draw(5)), draw(5) * (1 if preserving else s), rtol=4 * EPS32
    )


@pytest.mark.parametrize(
    ("name", "clean", "noisy"),
    [
        ("flow", 0.0, np.inf),
        ("shifted", 0.0, np.inf),
        ("trig", 0.0, np.inf),
        ("edm", 0.002, 80.0),
        # beta_0 = .1: 1 - alpha^2 = b0 t; alpha(1) = exp(-(b1 - b0)/4 - b0/2)
        ("vp", np.sqrt(1e-6), np.exp(5.025)),
        ("cosine", 1.977e-3, np.inf),
        ("ddpm", 0.01, 157.2),
        ("sd", 0.0292, 14.6),
    ],
)
def test_endpoints(x64, name, clean, noisy):
    """sigma / alpha at t_min and t_max; known constants of DDPM (abar_T = 4.04e-5) and Stable
    Diffusion (sigma_max 14.6).
    """
    process = PROCESSES[name]
    (a, s), (b, u) = (
        process.alpha_sigma(jnp.asarray(t)) for t in (process.t_min, process.t_max)
    )
    np.testing.assert_allclose(s / a, clean, rtol=0.01)
    # cos(pi / 2) in float64
    np.testing.assert_allclose(b / u, 1 / noisy, rtol=0.01, atol=2 * EPS64)


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_is_preserved(x64, name):
    a, s = PROCESSES[name].alpha_sigma(grid(PROCESSES[name]))
    np.testing.assert_allclose(a**2 + s**2, 1.0, rtol=8 * EPS64)


@every
def test_lambda_and_angle_are_strictly_monotonic(process):
    t = grid(process)
    assert jnp.all(jnp.diff(process.angle(t)) > 0)
    lam = np.asarray(process.lam(t))
    assert not np.any(np.isnan(lam))
    assert np.all(lam[1:] < lam[:-1])


def test_shift_moves_lambda_by_minus_its_logarithm(x64):
    t = jnp.linspace(0.01, 0.99, 9)
    for shift in (3.0, 12.0):
        np.testing.assert_allclose(
            Flow(shift=shift).lam(t),
            Flow().lam(t) - np.log(shift),
            rtol=1e-12,
            atol=1e-13,
        )


@every
def test_time_inverts_angle_and_lambda(x64, process):
    t = grid(process)
    # an angle next to pi/2 has lost the digits of alpha: sigma / alpha of EDM's 80, 160 or so of
    # DDPM
    tol = 1e3 * EPS64
    np.testing.assert_allclose(
        process.time(process.angle(t)), t, rtol=tol, atol=tol
    )
    t = t[1:-1]
    np.testing.assert_allclose(
        process.time_of_lam(process.lam(t)), t, rtol=tol, atol=tol
    )


@every
def test_time_inverts_angle_in_float32(process):
    t = grid(process)
    tol = 100 * EPS32  # 80 of them from EDM's largest ratio, as above
    np.testing.assert_allclose(
        process.time(process.angle(t)), t, rtol=tol, atol=4 * EPS32
    )


@every
def test_float32_keeps_sigmas_digits_near_the_clean_end(process):
    t = jnp.linspace(process.t_min, process.t_min + 0.01 * process.t_max, 50)[1:]
    got = [np.asarray(c) for c in process.alpha_sigma(t)]
    with jax.enable_x64(True):
        want = [
            np.asarray(c)
            for c in process.alpha_sigma(jnp.asarray(np.asarray(t), jnp.float64))
        ]
    np.testing.assert_allclose(got[0], want[0], rtol=8 * EPS32)
    np.testing.assert_allclose(got[1], want[1], rtol=8 * EPS32)


@pytest.mark.parametrize(("one", "two"), list(itertools.permutations(PROCESSES, 2)))
def test_warp_there_and_back_keeps_time_and_signal_to_noise(one, two):
    with jax.enable_x64(True):
        p = PROCESSES[one]
        q = PROCESSES[two]
        t = inner(p)
        there = q.time(p.angle(t))
        np.testing.assert_allclose(q.lam(there), p.lam(t), atol=1e-11)
        np.testing.assert_allclose(p.time(q.angle(there)), t, rtol=1e-11)


def test_textbook_warps(x64):
    """EDM <-> flow: sigma = t / (1 - t); EDM <-> VP: sigma / alpha; TrigFlow <-> flow and EDM, with
    sigma_d.
    """
    t = jnp.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(EDM().time(Flow().angle(t)), t / (1 - t), rtol=1e-13)
    a, s = VP().alpha_sigma(t)
    np.testing.assert_allclose(EDM().time(VP().angle(t)), s / a, rtol=1e-12)
    trig = Trig(sigma_data=0.7)
    np.testing.assert_allclose(
        EDM().time(trig.angle(t)), 0.7 * jnp.tan(t), rtol=1e-13
    )
    np.testing.assert_allclose(
        Flow().time(trig.angle(t)),
        0.7 * jnp.sin(t) / (jnp.cos(t) + 0.7 * jnp.sin(t)),
        rtol=1e-13,
    )


@every
def test_coefficients_are_derivatives(x64, process):
    # off the grid points of a tabulated process
    t = inner(process, 8) * (1 + 1e-9)
    h = 1e-6
    _, _, da, ds = process.coefs(t)
    above = process.alpha_sigma(t + h * t)
    below = process.alpha_sigma(t - h * t)
    if not isinstance(
        process, DDPM
    ):  # linear between indices: a difference across one is not a derivative
        np.testing.assert_allclose(
            da, (above[0] - below[0]) / (2 * h * t), rtol=1e-7, atol=1e-9
        )
        np.testing.assert_allclose(
            ds, (above[1] - below[1]) / (2 * h * t), rtol=1e-7, atol=1e-9
        )
    a, s = process.alpha_sigma(t)
    assert jnp.all(a * ds - s * da > 0)


def test_ddpm_reads_its_own_betas(x64):
    """Index i is time i / (T - 1); alpha^2 there is the product of 1 - beta."""
    betas = np.linspace(1e-4, 0.02, 1000)
    i = np.array([0, 1, 500, 999])
    a, s = DDPM().alpha_sigma(jnp.asarray(i / 999))
    np.testing.assert_allclose(a**2, np.cumprod(1 - betas)[i], rtol=1e-10)
    np.testing.assert_allclose(s**2, 1 - np.cumprod(1 - betas)[i], rtol=1e-10)


def fields(pred):
    return {k: getattr(pred, k) for k in ("x0", "eps", "v")}


@every
def test_conversions_round_trip(x64, process):
    t = inner(process, 6)
    x0 = draw(6, 2, 3)
    eps = draw(6, 2, 3, seed=1)
    xt = process.add_noise(x0, eps, t)
    v = process.velocity(x0, eps, t)
    for pred in (
        process.from_x0(x0, xt, t),
        process.from_eps(eps, xt, t),
        process.from_v(v, xt, t),
    ):
        for name, want in (("x0", x0), ("eps", eps), ("v", v)):
            scale = np.abs(want).max()
            np.testing.assert_allclose(
                getattr(pred, name), want, rtol=0, atol=1e-12 * scale, err_msg=name
            )
    np.testing.assert_allclose(
        process.score(pred, t),
        (expand(process.alpha_sigma(t)[0], xt) * x0 - xt)
        / expand(process.alpha_sigma(t)[1], xt) ** 2,
        rtol=1e-9,
        atol=1e-9,
    )
    assert (
        process.from_x0(x0, xt, t).raw is x0
        and process.from_v(v, xt, t, raw=xt).raw is xt
    )


def test_flow_conversions_by_the_formulas(x64):
    """x0 = x - t v, eps = x + (1 - t) v, v = eps - x0; finite at both ends."""
    t = jnp.asarray([0.0, 0.3, 1.0])
    xt = draw(3, 2)
    v = draw(3, 2, seed=1)
    pred = Flow().from_v(v, xt, t)
    np.testing.assert_allclose(pred.x0, xt - t[:, None] * v, rtol=1e-14)
    np.testing.assert_allclose(pred.eps, xt + (1 - t)[:, None] * v, rtol=1e-14)


@every
def test_predictions_are_affine_so_guidance_commutes(x64, process):
    """Extrapolating the network's output, or any field of its prediction, is the same."""
    t = inner(process, 6)
    w = 2.5
    xt = draw(6, 3)
    one = draw(6, 3, seed=1)
    two = draw(6, 3, seed=2)
    for complete in (process.from_x0, process.from_eps, process.from_v):
        whole = complete(two + w * (one - two), xt, t)
        a = complete(one, xt, t)
        b = complete(two, xt, t)
        for name, value in fields(whole).items():
            mixed = getattr(b, name) + w * (getattr(a, name) - getattr(b, name))
            np.testing.assert_allclose(
                value, mixed, rtol=0, atol=1e-11 * np.abs(mixed).max(), err_msg=name
            )


@every
def test_transition_composes_and_reaches_the_marginal(x64, process):
    """x_r | x_t = scale x_t + std z: scales multiply, variances add, and from x_0 it is the process
    itself.
    """

    def kernel(t, r):
        one = jnp.ones((1, 1))
        zero = jnp.zeros((1, 1))
        at = lambda x, z: float(process.transition(x, z, t, r)[0, 0])
        return at(one, zero), at(zero, one)

    t, m, r = (process.time_of_lam(jnp.asarray([lam])) for lam in (2.0, 0.3, -1.5))
    (a1, s1), (a2, s2), (a, s) = kernel(t, m), kernel(m, r), kernel(t, r)
    np.testing.assert_allclose(a, a1 * a2, rtol=1e-12)
    np.testing.assert_allclose(s, np.hypot(a2 * s1, s2), rtol=1e-12)
    (alpha_t, sigma_t), (alpha_r, sigma_r) = (
        [float(c[0]) for c in process.alpha_sigma(u)] for u in (t, r)
    )
    np.testing.assert_allclose(a * alpha_t, alpha_r, rtol=1e-12)
    np.testing.assert_allclose(np.hypot(a * sigma_t, s), sigma_r, rtol=1e-12)
    # root of a cancelled difference
    np.testing.assert_allclose(kernel(t, t), (1.0, 0.0), atol=1e-7)


def test_pred_is_a_tree():
    pred = Pred(jnp.ones(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), (jnp.ones(3),))
    assert len(jax.tree.leaves(jax.tree.map(lambda a: 2 * a, pred))) == 5
