"""Solvers on a Gaussian whose flow is known (00-foundations, section 4): x_r = alpha_r m + sqrt(S_r
/ S_t)(x_t - alpha_t m).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import DDPM, EDM, VP, CosineVP, Flow, Trig
from jaxdistill.samplers import ode

MEAN = 0.7
STD = 0.4
START = 1.3
PROCESSES = {
    "flow": Flow(),
    "shifted": Flow(shift=3.0),
    "trig": Trig(),
    "edm": EDM(),
    "vp": VP(),
    "cosine": CosineVP(),
    "ddpm": DDPM(),
}
every = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


class Gaussian(Mixture):
    components = (np.array([1.0]), np.array([[MEAN]]), np.array([STD]))


def denoiser(process):
    return lambda x, t: Gaussian(dim=1, modes=1).denoise(process, x, t)


def flow_map(process, t, r, x):
    (a, s), (b, u) = process.alpha_sigma(t), process.alpha_sigma(r)
    return b * MEAN + jnp.sqrt(
        ((b * STD) ** 2 + u**2) / ((a * STD) ** 2 + s**2)
    ) * (x - a * MEAN)


def errors(step, process, times):
    """|end - exact flow| from START for each grid."""
    run = jax.jit(
        lambda ts: ode.sample(step, denoiser(process), jnp.full((1, 1), START), ts)[
            0, 0
        ]
    )
    return np.array(
        [abs(run(ts) - flow_map(process, ts[0], ts[-1], START)) for ts in times]
    )


def ratios(e):
    return e[:-1] / e[1:]


STEPS = (8, 16, 32, 64)


def test_euler_halves_and_heun_quarters_its_error_on_rectified_flow(x64):
    times = [jnp.linspace(1.0, 0.0, n + 1) for n in STEPS]
    np.testing.assert_allclose(
        ratios(errors(ode.euler, Flow(), times)), [1.92, 1.95, 1.98], atol=0.006
    )
    np.testing.assert_allclose(
        ratios(errors(ode.heun, Flow(), times)), [4.35, 4.22, 4.12], atol=0.006
    )


def test_ddim_halves_and_2m_quarters_its_error_in_lambda(x64):
    """Uniform half log-SNR on the cosine schedule, t .99 to .01."""
    process = CosineVP()
    ends = [process.lam(jnp.asarray(t)) for t in (0.99, 0.01)]
    times = [
        process.time_of_lam(jnp.linspace(*ends, n + 1)) for n in (16, 32, 64, 128)
    ]
    ddim = ratios(errors(ode.ddim(process), process, times))
    assert np.all(np.diff(ddim) > 0) and np.all(
        np.abs(ddim - 2) < [0.07, 0.04, 0.02]
    )
    np.testing.assert_allclose(
        ratios(errors(ode.dpmpp_2m(process), process, times)),
        [3.62, 3.91, 3.98],
        rtol=0.02,
    )


def test_ddim_is_euler_for_rectified_flow_and_for_edm(x64):
    for process, times in (
        (Flow(), jnp.linspace(1.0, 0.0, 6)),
        (EDM(), EDM().grid(6)),
    ):
        x = jnp.asarray([[1.3], [-0.4]]) * times[0]
        euler, ddim = (
            ode.sample(step, denoiser(process), x, times)
            for step in (ode.euler, ode.ddim(process))
        )
        np.testing.assert_allclose(ddim, euler, rtol=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 20])
@every
def test_exact_for_a_single_point(x64, process, solver, steps):
    """Data at one point: the predicted x0 is constant, so both solvers land on alpha_r c + sigma_r
    eps at once.
    """
    point = 0.7
    denoise = lambda x, t: process.from_x0(jnp.full_like(x, point), x, t)
    times = process.grid(steps)
    (a, s), (b, u) = process.alpha_sigma(times[0]), process.alpha_sigma(times[-1])
    eps = 1.3
    got = ode.sample(
        ode.SOLVERS[solver](process),
        denoise,
        jnp.full((1, 1), a * point + s * eps),
        times,
    )
    np.testing.assert_allclose(got, b * point + u * eps, rtol=1e-10, atol=1e-10)


@pytest.mark.full
@pytest.mark.parametrize(
    ("solver", "fall"),
    [("euler", 0.3), ("ddim", 0.3), ("heun", 0.1), ("dpmpp_2m", 1.0)],
)
@pytest.mark.parametrize(
    "process",
    [Flow(), Trig(), EDM(), VP(), CosineVP()],
    ids=lambda p: type(p).__name__,
)
def test_every_solver_stays_finite_and_approaches_the_exact_flow(
    process, solver, fall
):
    """In float32, to both ends of the process. From 8 to 40 steps errors tend to 1/5 (first order)
    or 1/25 (second) of what they were. Uniform times are a grid that 2M's last step, endless in
    lambda, does not like: it only must not get worse.
    """
    _, s = process.alpha_sigma(jnp.float32(process.t_max))
    x = jnp.asarray([[START], [-0.4]], jnp.float32) * s
    times = process.grid
    want = flow_map(
        process, jnp.float32(process.t_max), jnp.float32(process.t_min), x
    )
    run = jax.jit(
        lambda ts: ode.sample(
            ode.SOLVERS[solver](process), denoiser(process), x, ts
        )
    )
    few, many = (float(jnp.abs(run(times(n)) - want).max()) for n in (8, 40))
    assert many < fall * few


@pytest.mark.parametrize(
    ("step", "order"), [(ode.euler, 1), (ode.heun, 2)], ids=["euler", "heun"]
)
def test_reversing_the_grid_returns_to_the_start(x64, step, order):
    run = jax.jit(lambda x, times: ode.sample(step, denoiser(Flow()), x, times))

    def round_trip(n):
        times = jnp.linspace(0.95, 0.05, n + 1)
        return abs(
            float(run(run(jnp.full((1, 1), START), times), times[::-1])[0, 0])
            - START
        )

    gap = [round_trip(n) for n in (10, 40, 160)]
    # first order: 4 times the steps, a quarter of the gap
    np.testing.assert_allclose(ratios(np.array(gap)), 4**order, rtol=0.15)


def test_stochastic_ddim_is_the_ddpm_posterior(x64):
    """eta = 1 from a fixed x_t with known x0: mean and variance of q(x_s | x_t, x_0)."""
    process = VP()
    point = 0.7
    n = 100_000
    t = jnp.asarray(0.6)
    s = jnp.asarray(0.4)
    (a_t, s_t), (a_s, s_s) = (
        [float(c) for c in process.alpha_sigma(u)] for u in (t, s)
    )
    denoise = lambda x, t: process.from_x0(jnp.full_like(x, point), x, t)
    x = jnp.full((n, 1), 0.9)
    out = np.asarray(
        ode.sample(
            ode.ddim(process, eta=1.0),
            denoise,
            x,
            jnp.stack([t, s]),
            jax.random.key(1),
        )
    )
    step_var = s_t**2 - (a_t / a_s * s_s) ** 2  # of x_t | x_s
    var = s_s**2 * step_var / s_t**2
    mean = (a_t / a_s * s_s**2 * 0.9 + a_s * step_var * point) / s_t**2
    np.testing.assert_allclose(out.mean(), mean, atol=5 * np.sqrt(var / n))
    np.testing.assert_allclose(out.var(), var, rtol=5 * np.sqrt(2 / n))


def test_stochastic_ddim_keeps_the_marginal(x64):
    """Any eta keeps the variance of a single point's noise at sigma_s^2 (kept^2 + fresh^2), half of
    it fresh at eta = .5.
    """
    process = CosineVP()
    n = 100_000
    times = jnp.asarray([0.8, 0.5, 0.3])
    denoise = lambda x, t: process.from_x0(jnp.zeros_like(x), x, t)
    x = process.alpha_sigma(times[0])[1] * jax.random.normal(
        jax.random.key(0), (n, 1)
    )
    for eta in (0.0, 0.5, 1.0):
        out = ode.sample(
            ode.ddim(process, eta=eta), denoise, x, times, jax.random.key(1)
        )
        np.testing.assert_allclose(
            out.var(),
            process.alpha_sigma(times[-1])[1] ** 2,
            rtol=5 * np.sqrt(2 / n),
        )


def test_heun_evaluates_twice_but_once_at_the_last_step(x64):
    seen = []

    def denoise(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t[0], ordered=True)
        return denoiser(Flow())(x, t)

    ode.sample(
        ode.heun, denoise, jnp.ones((1, 1)), jnp.linspace(1.0, 0.0, 4)
    ).block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3], rtol=1e-12)


def test_karras_grid_of_eight():
    times = EDM().grid(8)
    np.testing.assert_allclose(
        times,
        [80, 34.992, 13.699, 4.637, 1.287, 0.2675, 0.0352, 0.002, 0.0],
        rtol=2e-3,
    )
    np.testing.assert_allclose(EDM().grid(1), [80.0, 0.0], rtol=1e-5)


def test_every_other_grid_is_even():
    for process in PROCESSES.values():
        if process == EDM():
            continue
        times = process.grid(4)
        np.testing.assert_allclose(
            times[jnp.asarray([0, 2, 4])],
            [process.t_max, (process.t_max + process.t_min) / 2, process.t_min],
            rtol=1e-5,
        )


def test_trajectory_holds_every_state(x64):
    times = jnp.linspace(1.0, 0.0, 5)
    x = jnp.asarray([[START], [0.2]])
    path = ode.sample(ode.euler, denoiser(Flow()), x, times, trajectory=True)
    assert path.shape == (5, 2, 1)
    np.testing.assert_array_equal(path[0], x)
    for i in range(4):
        np.testing.assert_allclose(
            path[: i + 2][-1],
            ode.sample(ode.euler, denoiser(Flow()), x, times[: i + 2]),
            rtol=1e-14,
        )


def test_unknown_solver_is_refused():
    with pytest.raises(Refused, match=r"solver='eular'.* did you mean 'euler'"):
        ode.solve("eular", Flow(), denoiser(Flow()), jnp.ones((1, 1)), 2)


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
def test_one_step_at_a_time_of_its_own_for_each_sample(x64, solver):
    """Two samples at two times equal two grids of two steps, Heun's last being Euler's."""
    process = Flow()
    x = jnp.asarray([[1.3], [-0.4]])
    t = jnp.asarray([0.9, 0.5])
    s = jnp.asarray([0.6, 0.1])
    both = ode.advance(solver, process, denoiser(process), x, t, s)
    for i in range(2):
        grid = jnp.asarray([t[i], s[i], s[i] / 2])
        alone = ode.sample(
            ode.SOLVERS[solver](process),
            denoiser(process),
            x[i : i + 1],
            grid,
            trajectory=True,
        )[1]
        np.testing.assert_allclose(both[i], alone[0], rtol=1e-13)


def test_straightness_of_a_gaussian_flow(x64):
    """For N(0, 1), x_t = sqrt(S) z with S = (1 - t)^2 + t^2 and x_0 = x_1: int (d sqrt(S) / dt)^2
    dt z^2 = (2 - pi / 2) z^2.

    The trapezoid's and Heun's error is of order h^2; a flow along straight lines has none.
    """
    spread = lambda t: (1 - t) ** 2 + t**2
    flow = lambda x, t: Flow().from_v(
        (2 * t - 1)[:, None] / spread(t)[:, None] * x, x, t
    )
    x = jnp.asarray([[1.3, 0.5], [-0.4, 2.0]])
    times = jnp.linspace(1, 0, 65)
    want = (2 - np.pi / 2) * jnp.mean(jnp.sum(x**2, 1))
    np.testing.assert_allclose(
        ode.straightness(flow, x, times), want, rtol=5 / 64**2
    )
    straight = lambda x, t: Flow().from_v(
        (1 - 0.4) * (x - (1 - t)[:, None]) / ((1 - t) * 0.4 + t)[:, None] - 1.0,
        x,
        t,
    )
    assert ode.straightness(straight, x, times) < 1e-25


@pytest.mark.parametrize("name", ode.SOLVERS)
def test_a_recorded_path_is_that_of_the_sampler(name):
    """States and end to the bit, and each prediction is the network's at its state."""
    process = Flow()
    step = ode.SOLVERS[name](process)
    x = jnp.array([[START], [-0.2], [0.4]])
    times = process.grid(4)
    denoise = denoiser(process)

    @jax.jit
    def both(x):
        path = ode.sample(step, denoise, x, times, trajectory=True)
        return path, ode.record(step, denoise, x, times)

    path, recorded = both(x)
    np.testing.assert_array_equal(recorded.states, path[:-1])
    np.testing.assert_array_equal(recorded.end, path[-1])
    np.testing.assert_array_equal(recorded.times, times[:-1])
    index = jnp.array([3, 0, 2])
    states, t, preds = recorded.at(index)
    np.testing.assert_array_equal(t, times[index])
    for i, n in enumerate(index):
        np.testing.assert_array_equal(states[i], path[n, i])
    expected = jax.jit(denoise)(states, t)
    for found, wanted in zip(jax.tree.leaves(preds), jax.tree.leaves(expected)):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_recorded_path_may_be_guided_by_sample():
    """Each sample goes the way of its own scale."""

    def net(x, t, cond):
        return Flow().from_v(cond[:, None] * jnp.ones_like(x), x, t)

    x = jnp.zeros((3, 1))
    scales = jnp.array([1.0, 2.0, 5.0])

    def denoise(x, t):
        return guided(net, x, t, jnp.ones(3), jnp.zeros(3), scales)

    recorded = jax.jit(lambda x: ode.record(ode.euler, denoise, x, Flow().grid(2)))(
        x
    )
    np.testing.assert_allclose(recorded.end[:, 0], -scales, rtol=1e-6)
    np.testing.assert_allclose(recorded.preds.v[0, :, 0], scales, rtol=1e-6)
