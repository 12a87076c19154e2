"""Few-step samplers with closed-form students of a Gaussian (00-foundations, sections 4 and 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.diffusion.process import EDM, CosineVP, Flow, Pred, Trig, expand
from jaxdistill.samplers.fewstep import (
    chain,
    first_times,
    jump,
    renoise,
    simulate,
    warped_times,
)

MEAN = 0.7
STD = 0.4


pytestmark = pytest.mark.usefixtures("x64")


def flow_map(process, t, r, x):
    (a, s), (b, u) = (
        process.alpha_sigma(expand(jnp.asarray(time), x)) for time in (t, r)
    )
    return b * MEAN + jnp.sqrt(
        ((b * STD) ** 2 + u**2) / ((a * STD) ** 2 + s**2)
    ) * (x - a * MEAN)


def answer(x0):
    return Pred(x0, x0, x0, x0)


@pytest.mark.parametrize(
    "process", [Flow(), Trig(), EDM(), CosineVP()], ids=lambda p: type(p).__name__
)
def test_exact_consistency_function_keeps_the_law_at_any_number_of_steps(process):
    """f(x_t, t) maps noise to data exactly, and re-noised data has the marginal again: mean .7,
    spread .4 each time.
    """
    n = 40_000
    # from t_max the chain starts at pure noise: alpha_T m is left out, which EDM's sigma of 80
    # makes .7 / 80 of a spread
    net = lambda x, t: answer(flow_map(process, t, 0.0, x))
    noise = jax.random.normal(jax.random.key(0), (n, 1))
    lams = jnp.asarray([0.0, 1.0])
    middle = process.time_of_lam(lams)
    for steps in (1, 2, 3):
        times = jnp.concatenate([jnp.asarray([process.t_max]), middle])[:steps]
        out = renoise(process, net, noise, times, jax.random.key(1))
        np.testing.assert_allclose(
            out.mean(), MEAN, atol=5 * STD / np.sqrt(n) + STD * 0.7 / 80
        )
        np.testing.assert_allclose(out.std(), STD, rtol=5 / np.sqrt(2 * n))


def test_renoising_sees_the_times_asked_for_and_forgets_the_noise():
    """A student that answers a constant: each later state is alpha c + sigma z with z fresh and
    unit.
    """
    seen = []

    def net(x, t):
        jax.debug.callback(
            lambda x, t: seen.append((float(np.asarray(t)[0]), np.asarray(x))),
            x,
            t,
            ordered=True,
        )
        return answer(jnp.full_like(x, 2.0))

    n = 20_000
    times = jnp.asarray([1.0, 0.7, 0.4])
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
    noise = jnp.ones((3, 1))
    times = jnp.asarray([1.0, 0.5])
    run = lambda seed: renoise(
        Flow(), lambda x, t: answer(0.5 * x), noise, times, jax.random.key(seed)
    )
    np.testing.assert_array_equal(run(0), run(0))
    assert jnp.all(run(0) != run(1))


def average_velocity(x, r, t):
    """u = (x_t - x_r) / (t - r) along the exact flow, for r < t; x [B 1], times [B]."""
    return (x - flow_map(Flow(), t, r, x)) / expand(t - r, x)


def test_average_velocity_satisfies_meanflows_identity():
    """u = v - (t - r)(v . d_x u + d_t u), and u -> v as r -> t."""
    x = jnp.asarray([[1.3], [-0.2]])
    r = jnp.asarray([0.2, 0.5])
    t = jnp.asarray([0.7, 0.9])
    a = 1 - t[:, None]
    s = t[:, None]
    var = (a * STD) ** 2 + s**2
    x0 = MEAN + a * STD**2 / var * (x - a * MEAN)
    eps = s / var * (x - a * MEAN)
    v = eps - x0
    u, du = jax.jvp(average_velocity, (x, r, t), (v, jnp.zeros(2), jnp.ones(2)))
    np.testing.assert_allclose(u, v - (t - r)[:, None] * du, rtol=1e-12)
    np.testing.assert_allclose(average_velocity(x, t - 1e-6, t), v, atol=1e-5)


@pytest.mark.parametrize(
    "times", [(1.0, 0.0), (1.0, 0.6, 0.0), (0.9, 0.7, 0.4, 0.1)]
)
def test_jump_is_exact_for_the_closed_form_average_velocity(times):
    """(t - s) u(x_t, s, t) = (t - r) u(x_t, r, t) + (r - s) u(x_r, s, r): any grid ends on the
    exact flow.
    """
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


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_deterministic_chain_is_eulers_on_the_warped_grid(shift):
    """Step by step against x + (t' - t) (eps - x0) at the warped times; the key is not read, and
    the end is x0 at t = 0.
    """
    process = Flow(shift=shift)
    times = jnp.asarray([1.0, 0.75, 0.5, 0.25, 0.0])

    def net(x, t):
        a, s = process.alpha_sigma(expand(t, x))
        spread = (a * STD) ** 2 + s**2
        return process.from_x0(MEAN + a * STD**2 / spread * (x - a * MEAN), x, t)

    x = noise = jax.random.normal(jax.random.key(0), (5, 2))
    warped = shift * times / (1 + (shift - 1) * times)
    for index in range(5):
        got, t = jax.jit(
            lambda i, seed: simulate(
                process, net, noise, times, jax.random.key(seed), i, "ddim"
            )
        )(index, index)
        np.testing.assert_allclose(got, x, rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(t, times[index])
        if index < 4:
            pred = net(x, jnp.full(5, times[index]))
            x = x + (warped[index + 1] - warped[index]) * (pred.eps - pred.x0)


def pure(x, t, r):
    """An average velocity that depends on both times, with its x0 and eps."""
    return Flow().from_v(x * (1 + r)[:, None] + jnp.sin(t)[:, None], x, t)


def test_few_with_all_noise_fresh_is_renoising():
    """The same draws at the same steps as consistency sampling of f(x, t) = x - t u(x, 0, t)."""
    noise = jax.random.normal(jax.random.key(0), (5, 2))
    times = jnp.asarray([1.0, 0.6, 0.3])
    ours = jump(
        pure,
        noise,
        jnp.append(times, 0.0),
        jax.random.key(1),
        style="few",
        fresh=1.0,
    )
    theirs = renoise(
        Flow(),
        lambda x, t: pure(x, t, jnp.zeros_like(t)),
        noise,
        times,
        jax.random.key(1),
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize(("style", "r"), [("few", 0.0), ("any", 0.4), ("mul", 1.0)])
def test_styles_aim_at_their_time(style, r):
    noise = jnp.asarray([[0.5, -1.0]])
    want = noise - 0.6 * pure(noise, jnp.ones(1), jnp.full(1, r)).v
    np.testing.assert_allclose(
        jump(pure, noise, jnp.asarray([1.0, 0.4]), style=style), want, rtol=1e-13
    )


def test_fresh_share_of_the_noise():
    """x_s = (1 - s) x0 + s (sqrt(1 - rho) z + sqrt(rho) eps) with eps fresh and unit."""
    n = 40_000
    s = 0.4
    rho = 0.3
    noise = jax.random.normal(jax.random.key(0), (n, 1))
    pred = pure(noise, jnp.ones(n), jnp.zeros(n))
    out = jump(
        pure,
        noise,
        jnp.asarray([1.0, s]),
        jax.random.key(1),
        style="few",
        fresh=rho,
    )
    eps = ((out - (1 - s) * pred.x0) / s - np.sqrt(1 - rho) * pred.eps) / np.sqrt(
        rho
    )
    np.testing.assert_allclose(eps.std(), 1.0, rtol=5 / np.sqrt(2 * n))
    assert abs(np.mean(eps * pred.eps)) < 5 * float(pred.eps.std()) / np.sqrt(n)


def test_extrapolation_starts_at_the_third_step():
    """x0 + k (x0 - x0 before), likewise the noise; the change is that of the plain predictions."""
    noise = jnp.asarray([[0.5, -1.0]])
    times = jnp.asarray([1.0, 0.7, 0.5, 0.2])
    k = 0.3
    x = noise
    before = None
    for i, (t, s) in enumerate(zip(times, times[1:])):
        pred = pure(x, t[None], s[None])
        more = k if i == 2 else 0.0
        x0, eps = (
            p + more * (p - q)
            for p, q in zip((pred.x0, pred.eps), before or (pred.x0, pred.eps))
        )
        before = pred.x0, pred.eps
        x = (1 - s) * x0 + s * eps
    np.testing.assert_allclose(
        jump(pure, noise, times, extrapolate=k), x, rtol=1e-12
    )
    plain = jump(pure, noise, times)
    np.testing.assert_allclose(
        jump(pure, noise, times[:3], extrapolate=k),
        jump(pure, noise, times[:3]),
        rtol=1e-12,
    )
    assert jnp.abs(plain - x).max() > 1e-3


@pytest.mark.parametrize("fresh", [0.0, 0.5])
def test_the_sample_itself_is_not_extrapolated(fresh):
    """The sampler's answer is the x0 predicted at its last state, as in UCGM's code, which returns
    what the network says there.
    """
    noise = jnp.asarray([[0.5, -1.0]])
    times = jnp.asarray([1.0, 0.7, 0.5, 0.2, 0.0])
    key = jax.random.key(1)
    settings = dict(style="few", fresh=fresh, extrapolate=0.3)
    state = jump(pure, noise, times[:-1], key, **settings)
    np.testing.assert_allclose(
        jump(pure, noise, times, key, **settings),
        pure(state, times[3:4], jnp.zeros(1)).x0,
        rtol=1e-12,
    )


def test_times_may_differ_between_samples():
    x = jnp.asarray([[1.3], [-0.2]])
    times = jnp.asarray([[0.9, 0.7], [0.5, 0.6], [0.1, 0.0]])
    net = lambda x, t, r: Flow().from_v(average_velocity(x, r, t), x, t)
    np.testing.assert_allclose(
        jump(net, x, times), flow_map(Flow(), times[0], times[-1], x), rtol=1e-12
    )


@pytest.mark.parametrize("style", ["few", "any", "mul"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("fresh", [0.0, 0.5, 1.0])
def test_one_data_point_is_reached_in_every_style(style, steps, fresh):
    """F = (x_t - x) / t: z - x at t = 1."""
    x = jnp.asarray([[0.4, -1.2]])
    net = lambda xt, t, r: Flow().from_v((xt - x) / t[:, None], xt, t)
    times = warped_times(steps, (0.001, 0.3), (1.17, 0.8, 1.1))
    out = jump(
        net,
        jax.random.normal(jax.random.key(0), (4, 2)),
        times,
        jax.random.key(1),
        style=style,
        fresh=fresh,
        extrapolate=0.2,
    )
    np.testing.assert_allclose(out, jnp.broadcast_to(x, (4, 2)), atol=1e-11)


def test_warped_times():
    """Even without a warp; gaps move the first time and the last jump; a warp keeps both ends."""
    np.testing.assert_allclose(warped_times(4), [1, 0.75, 0.5, 0.25, 0], atol=1e-15)
    np.testing.assert_allclose(
        warped_times(2, (0.001, 0.6)), [0.999, 0.6, 0], atol=1e-15
    )
    np.testing.assert_allclose(
        warped_times(1, (0.001, 0.6)), [0.999, 0], atol=1e-15
    )
    bent = np.asarray(warped_times(5, warp=(1.17, 0.8, 1.1)))
    assert bent[0] == 1 and bent[-1] == 0 and (np.diff(bent) < 0).all()
    np.testing.assert_allclose(
        bent[2], 1 - (1 - (1 - 0.4**1.17) ** 0.8) ** 1.1, rtol=1e-12
    )
    np.testing.assert_allclose(
        1 - np.asarray(warped_times(1000, warp=(1.17, 0.8, 1.1)))[-2],
        1.0,
        atol=0.01,
    )
    for bad in (
        dict(steps=0),
        dict(steps=2, gaps=(0.5, 0.6)),
        dict(steps=2, gaps=(-0.1, 0.0)),
    ):
        with pytest.raises(Refused, match="gaps"):
            warped_times(**bad)


def test_unknown_style_is_refused():
    with pytest.raises(Refused, match="did you mean 'few'"):
        jump(pure, jnp.ones((1, 1)), jnp.asarray([1.0, 0.0]), style="fw")


def test_a_whole_chain_has_the_states_and_the_end_of_its_parts():
    """`chain` is `simulate` at every index and `renoise` at once, draw for draw."""
    net = lambda x, t: answer(jnp.sin(x) * t[:, None])
    times = jnp.asarray([1.0, 0.7, 0.4])
    noise = jax.random.normal(jax.random.key(0), (5, 2))
    key = jax.random.key(1)
    states, x0 = jax.jit(lambda: chain(Flow(), net, noise, times, key))()
    for i in range(3):
        np.testing.assert_allclose(
            states[i], simulate(Flow(), net, noise, times, key, i)[0], rtol=1e-13
        )
    np.testing.assert_allclose(
        x0, renoise(Flow(), net, noise, times, key), rtol=1e-13
    )
    states, x0 = chain(Flow(), net, noise, times[:1], key)
    assert states.shape == (1, 5, 2) and np.array_equal(x0, jnp.sin(noise))
