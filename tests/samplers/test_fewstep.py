"""Few-step samplers with closed-form students of a Gaussian (00-foundations, sections 4 and 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.diffusion.process import EDM, CosineVP, Flow, Pred, Trig, expand
from jaxdistill.samplers.fewstep import chain, first_times, jump, renoise, simulate

MEAN, STD = 0.7, 0.4


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def flow_map(process, t, r, x):
    (a, s), (b, u) = (process.alpha_sigma(expand(jnp.asarray(time), x)) for time in (t, r))
    return b * MEAN + jnp.sqrt(((b * STD) ** 2 + u**2) / ((a * STD) ** 2 + s**2)) * (x - a * MEAN)


def answer(x0):
    return Pred(x0, x0, x0, x0)


@pytest.mark.parametrize("process", [Flow(), Trig(), EDM(), CosineVP()], ids=lambda p: type(p).__name__)
def test_exact_consistency_function_keeps_the_law_at_any_number_of_steps(process):
    """f(x_t, t) maps noise to data exactly, and re-noised data has the marginal again: mean .7, spread .4 each time."""
    n = 40_000
    # from t_max the chain starts at pure noise: alpha_T m is left out, which EDM's sigma of 80 makes .7 / 80 of a spread
    net = lambda x, t: answer(flow_map(process, t, 0.0, x))
    noise = jax.random.normal(jax.random.key(0), (n, 1))
    lams = jnp.asarray([0.0, 1.0])
    middle = process.time_of_lam(lams)
    for steps in (1, 2, 3):
        times = jnp.concatenate([jnp.asarray([process.t_max]), middle])[:steps]
        out = renoise(process, net, noise, times, jax.random.key(1))
        np.testing.assert_allclose(out.mean(), MEAN, atol=5 * STD / np.sqrt(n) + STD * 0.7 / 80)
        np.testing.assert_allclose(out.std(), STD, rtol=5 / np.sqrt(2 * n))


def test_renoising_sees_the_times_asked_for_and_forgets_the_noise():
    """A student that answers a constant: each later state is alpha c + sigma z with z fresh and unit."""
    seen = []

    def net(x, t):
        jax.debug.callback(lambda x, t: seen.append((float(np.asarray(t)[0]), np.asarray(x))), x, t, ordered=True)
        return answer(jnp.full_like(x, 2.0))

    n, times = 20_000, jnp.asarray([1.0, 0.7, 0.4])
    noise = jax.random.normal(jax.random.key(0), (n, 1))
    out = renoise(Flow(), net, noise, times, jax.random.key(1))
    jax.effects_barrier()
    np.testing.assert_array_equal(out, 2.0)
    np.testing.assert_allclose([t for t, _ in seen], times, rtol=1e-12)
    np.testing.assert_allclose(seen[0][1], noise)
    fresh = [(x - (1 - t) * 2.0) / t for t, x in seen]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.mean(fresh[a] * fresh[b])) < 5 / np.sqrt(n)
        np.testing.assert_allclose(fresh[b].std(), 1.0, rtol=5 / np.sqrt(2 * n))


def test_renoising_is_determined_by_its_key():
    noise, times = jnp.ones((3, 1)), jnp.asarray([1.0, 0.5])
    run = lambda seed: renoise(Flow(), lambda x, t: answer(0.5 * x), noise, times, jax.random.key(seed))
    np.testing.assert_array_equal(run(0), run(0))
    assert jnp.all(run(0) != run(1))


def average_velocity(x, r, t):
    """u = (x_t - x_r) / (t - r) along the exact flow, for r < t; x [B 1], times [B]."""
    return (x - flow_map(Flow(), t, r, x)) / expand(t - r, x)


def test_average_velocity_satisfies_meanflows_identity():
    """u = v - (t - r)(v . d_x u + d_t u), and u -> v as r -> t."""
    x, r, t = jnp.asarray([[1.3], [-0.2]]), jnp.asarray([0.2, 0.5]), jnp.asarray([0.7, 0.9])
    a, s = 1 - t[:, None], t[:, None]
    var = (a * STD) ** 2 + s**2
    x0, eps = MEAN + a * STD**2 / var * (x - a * MEAN), s / var * (x - a * MEAN)
    v = eps - x0
    u, du = jax.jvp(average_velocity, (x, r, t), (v, jnp.zeros(2), jnp.ones(2)))
    np.testing.assert_allclose(u, v - (t - r)[:, None] * du, rtol=1e-12)
    np.testing.assert_allclose(average_velocity(x, t - 1e-6, t), v, atol=1e-5)


@pytest.mark.parametrize("times", [(1.0, 0.0), (1.0, 0.6, 0.0), (0.9, 0.7, 0.4, 0.1)])
def test_jump_is_exact_for_the_closed_form_average_velocity(times):
    """(t - s) u(x_t, s, t) = (t - r) u(x_t, r, t) + (r - s) u(x_r, s, r): any grid ends on the exact flow."""
    x = jnp.asarray([[1.3], [-0.2], [0.7]])

    def net(x, t, r):
        u = average_velocity(x, r, t)
        return Pred(u, u, u, u)

    want = flow_map(Flow(), times[0], times[-1], x)
    np.testing.assert_allclose(jump(net, x, jnp.asarray(times)), want, rtol=1e-13)


def test_first_times():
    np.testing.assert_array_equal(first_times((1.0, 0.5, 0.25), 2), [1.0, 0.5])
    for steps in (0, 4):
        with pytest.raises(Refused, match=f"steps={steps}: expected 1 to 3"):
            first_times((1.0, 0.5, 0.25), steps)


def test_a_whole_chain_has_the_states_and_the_end_of_its_parts():
    """`chain` is `simulate` at every index and `renoise` at once, draw for draw."""
    net = lambda x, t: answer(jnp.sin(x) * t[:, None])
    times, noise, key = jnp.asarray([1.0, 0.7, 0.4]), jax.random.normal(jax.random.key(0), (5, 2)), jax.random.key(1)
    states, x0 = jax.jit(lambda: chain(Flow(), net, noise, times, key))()
    for i in range(3):
        np.testing.assert_allclose(states[i], simulate(Flow(), net, noise, times, key, i)[0], rtol=1e-13)
    np.testing.assert_allclose(x0, renoise(Flow(), net, noise, times, key), rtol=1e-13)
    states, x0 = chain(Flow(), net, noise, times[:1], key)
    assert states.shape == (1, 5, 2) and np.array_equal(x0, jnp.sin(noise))
