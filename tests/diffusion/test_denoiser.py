"""Parameterisations, preconditioning, schedule equivalence and guidance (00-foundations, sections
1, 3 and 5).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import (
    ConsistencyPrecond,
    Data,
    Denoiser,
    EDMPrecond,
    Noise,
    TrigPrecond,
    Velocity,
    VPVelocity,
    by_time,
    guided,
)
from jaxdistill.diffusion.process import (
    DDPM,
    EDM,
    VP,
    CosineVP,
    Flow,
    Trig,
    expand,
    magnitude,
)

PROCESSES = {
    "flow": Flow(),
    "shifted": Flow(shift=3.0),
    "trig": Trig(),
    "edm": EDM(),
    "vp": VP(),
    "cosine": CosineVP(),
    "ddpm": DDPM(),
}
FIELDS = ("x0", "eps", "v")


pytestmark = pytest.mark.usefixtures("x64")


class Gaussian(Mixture):
    """N(.7, .4^2), in float64."""

    components = (np.array([1.0]), np.array([[0.7]]), np.array([0.4]))


TEACHER = Gaussian(dim=1, modes=1)


def state(process, lam=(1.5, 0.2, -1.0)):
    """States and times at given half log-SNRs."""
    t = process.time_of_lam(jnp.asarray(lam))
    a, s = process.alpha_sigma(expand(t, jnp.ones((len(lam), 1))))
    rng = np.random.default_rng(0)
    x0 = 0.7 + 0.4 * rng.standard_normal((len(lam), 1))
    eps = rng.standard_normal((len(lam), 1))
    return a * x0 + s * eps, t


def raw_network(param, native):
    """The network that `param` would have to train: it sees the param's inputs and answers what
    makes the teacher exact.
    """

    def call(x_in, t_in, cond):
        t = t_in / param.time_scale
        pred = TEACHER.denoise(native, x_in, t)
        if isinstance(param, VPVelocity):
            a, s = native.alpha_sigma(expand(t, x_in))
            return a * pred.eps - s * pred.x0
        return {Velocity: pred.v, Data: pred.x0, Noise: pred.eps}[type(param)]

    return call


@pytest.mark.full
@pytest.mark.parametrize(
    "param",
    [Velocity(), Data(), Noise(time_scale=999.0)],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize(
    ("native", "outer"), list(itertools.product(PROCESSES, PROCESSES))
)
def test_any_teacher_in_any_process_gives_the_same_x0(param, native, outer):
    """A network trained on `native` and queried in `outer` is the exact denoiser of `outer`, in
    every field.
    """
    inside = PROCESSES[native]
    outside = PROCESSES[outer]
    xt, t = state(outside)
    got = Denoiser(param=param, native=inside).wrap(
        raw_network(param, inside), outside
    )(xt, t)
    want = TEACHER.denoise(outside, xt, t)
    for name in FIELDS:
        np.testing.assert_allclose(
            getattr(got, name),
            getattr(want, name),
            rtol=1e-10,
            atol=1e-10,
            err_msg=name,
        )


@pytest.mark.parametrize("native", ["vp", "cosine", "ddpm"])
def test_vp_velocity_is_read_as_alpha_eps_minus_sigma_x0(native):
    process = PROCESSES[native]
    for outside in (process, Flow()):
        xt, t = state(outside)
        got = Denoiser(param=VPVelocity(), native=process).wrap(
            raw_network(VPVelocity(), process), outside
        )(xt, t)
        for name in FIELDS:
            want = getattr(TEACHER.denoise(outside, xt, t), name)
            np.testing.assert_allclose(
                getattr(got, name), want, rtol=1e-10, atol=1e-10, err_msg=name
            )


@pytest.mark.parametrize("native", PROCESSES)
@pytest.mark.parametrize("outer", PROCESSES)
def test_finite_at_the_ends_of_the_callers_process(native, outer):
    """From t_max, which may lie beyond the native process's own end, a network is asked at times it
    has been trained on.
    """
    inside = PROCESSES[native]
    outside = PROCESSES[outer]
    seen = []

    def network(x, t, cond):
        seen.append(np.asarray(t))
        return TEACHER.denoise(inside, x, t).x0

    with jax.enable_x64(False):
        x = (
            jnp.full((1, 1), 0.3, jnp.float32)
            * outside.alpha_sigma(jnp.asarray(outside.t_max, jnp.float32))[1]
        )
        denoise = Denoiser(param=Data(), native=inside).wrap(network, outside)
        pred = denoise(x, jnp.asarray([outside.t_max], jnp.float32))
        denoise(
            jnp.asarray([[0.7]], jnp.float32),
            jnp.asarray([outside.t_min], jnp.float32),
        )
    for t in seen:
        slack = 2 * np.finfo(np.float32).eps * inside.t_max
        assert inside.t_min - slack <= t[0] <= inside.t_max + slack
    # the posterior mean is the prior's up to alpha^2 s^2 / S of the way: at the noisiest SNR here,
    # sd's 1 / 14.6
    np.testing.assert_allclose(pred.x0, 0.7, atol=0.03)
    assert all(np.all(np.isfinite(getattr(pred, name))) for name in ("x0", "v"))


def test_second_time_is_warped_like_the_first():
    """An average-velocity network sees (t, r) both in its own process and scale."""
    seen = {}

    def network(x, t, cond, r):
        seen.update(t=t, r=r)
        return x

    t = jnp.asarray([0.6])
    r = jnp.asarray([0.2])
    Denoiser(param=Velocity(time_scale=10.0), native=EDM()).wrap(network, Flow())(
        jnp.ones((1, 1)), t, r=r
    )
    np.testing.assert_allclose(seen["t"], 10 * 0.6 / 0.4, rtol=1e-12)
    np.testing.assert_allclose(seen["r"], 10 * 0.2 / 0.8, rtol=1e-12)


def test_features_and_raw_output_pass_through():
    tap = jnp.ones((2, 5))
    pred = Denoiser().wrap(lambda x, t, cond: (3 * x, (tap,)), Flow())(
        jnp.ones((2, 1)), jnp.full(2, 0.5)
    )
    assert pred.features[0] is tap
    np.testing.assert_array_equal(pred.raw, 3.0)


EDM_SIGMAS = (0.002, 0.05, 0.5, 3.0, 80.0)


@pytest.mark.parametrize("sigma", EDM_SIGMAS)
def test_edm_preconditioning_has_unit_inputs_and_targets(sigma):
    """Over data of standard deviation .5, exactly by second moments: x = x0 + sigma eps, target (x0
    - c_skip x) / c_out.
    """
    param = EDMPrecond()
    one = jnp.ones((1, 1))
    t = jnp.asarray([sigma])
    c_in = float(param.inputs(EDM(), one, t)[0][0, 0])
    np.testing.assert_allclose(c_in**2 * (sigma**2 + 0.25), 1.0, rtol=1e-13)
    np.testing.assert_allclose(
        param.inputs(EDM(), one, t)[1], np.log(sigma) / 4, rtol=1e-13
    )
    c_skip = float(param.pred(EDM(), 0 * one, one, t).x0[0, 0])
    c_out = float(param.pred(EDM(), one, 0 * one, t).x0[0, 0])
    target = (0.25 * (1 - c_skip) ** 2 + (c_skip * sigma) ** 2) / c_out**2
    np.testing.assert_allclose(target, 1.0, rtol=1e-9)
    np.testing.assert_allclose(
        c_out**2 * (sigma**2 + 0.25) / (0.5 * sigma) ** 2, 1.0, rtol=1e-13
    )


def test_edm_denoiser_is_the_identity_at_sigma_zero():
    """|D(x) - x| <= sigma |F| + (sigma / sd)^2 |x|."""
    x = jnp.asarray([[0.8]])
    raw = jnp.asarray([[5.0]])
    for sigma in (1e-3, 1e-6):
        x0 = EDMPrecond().pred(EDM(), raw, x, jnp.asarray([sigma])).x0
        assert abs(float(x0[0, 0]) - 0.8) <= 5 * sigma + 4 * sigma**2


def test_consistency_preconditioning_is_the_identity_at_sigma_min():
    """Exactly, whatever the output; elsewhere c_skip = sd^2 / ((t - eps)^2 + sd^2), c_out = sd (t -
    eps) / sqrt(sd^2 + t^2).
    """
    x = jnp.asarray([[1.3, -0.2], [0.4, 2.0]])
    t = np.array([0.5, 20.0])
    sd = 0.5
    net = Denoiser(param=ConsistencyPrecond(), native=EDM()).wrap(
        lambda x, t, cond: 5 + x, EDM()
    )
    np.testing.assert_array_equal(net(x, jnp.full(2, 0.002)).x0, x)
    skip = sd**2 / ((t - 0.002) ** 2 + sd**2)
    out = sd * (t - 0.002) / np.sqrt(sd**2 + t**2)
    want = skip[:, None] * x + out[:, None] * (
        5 + x / np.sqrt(t**2 + sd**2)[:, None]
    )
    np.testing.assert_allclose(net(x, jnp.asarray(t)).x0, want, rtol=1e-13)


def test_edm_teacher_queried_from_flow():
    """F that makes D exact for the Gaussian, read through the flow process."""
    sd = 0.5

    def network(x_in, c_noise, cond):
        sigma = jnp.exp(4 * c_noise)[:, None]
        x = x_in * jnp.sqrt(sigma**2 + sd**2)
        d = TEACHER.denoise(EDM(), x, sigma[:, 0]).x0
        return (
            (d - sd**2 / (sigma**2 + sd**2) * x)
            * jnp.sqrt(sigma**2 + sd**2)
            / (sigma * sd)
        )

    for process in (Flow(), VP(), EDM()):
        xt, t = state(process)
        got = Denoiser(param=EDMPrecond(), native=EDM()).wrap(network, process)(
            xt, t
        )
        np.testing.assert_allclose(
            got.x0, TEACHER.denoise(process, xt, t).x0, rtol=1e-9
        )


def test_trig_velocity_is_sigma_data_times_the_network():
    """x0 = cos t x - sin t F sd once x_t = cos t x0 + sin t z with z = sd eps; the network sees x /
    sd.
    """
    trig = Trig(sigma_data=0.5)
    param = TrigPrecond()
    x = jnp.asarray([[0.8]])
    raw = jnp.asarray([[-1.3]])
    t = jnp.asarray([0.6])
    pred = param.pred(trig, raw, x, t)
    np.testing.assert_allclose(pred.v, 0.5 * raw, rtol=1e-14)
    np.testing.assert_allclose(
        pred.x0, jnp.cos(t) * x - jnp.sin(t) * 0.5 * raw, rtol=1e-13
    )
    np.testing.assert_allclose(param.inputs(trig, x, t)[0], x / 0.5, rtol=1e-14)


def mixture():
    return Mixture(seed=1, modes=3)


def mixture_states(data, n=6):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((n, data.dim)))
    t = jnp.asarray(rng.uniform(0.2, 0.9, n))
    return x, t, jnp.arange(n) % data.modes, jnp.full(n, data.modes)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guidance_in_one_call_equals_two(scale):
    data = mixture()
    net = lambda x, t, cond: data.denoise(Flow(), x, t, cond)
    x, t, cond, null = mixture_states(data)
    got = guided(net, x, t, cond, null, scale)
    with_cond = net(x, t, cond)
    without = net(x, t, null)
    for name in (*FIELDS, "raw"):
        c = getattr(with_cond, name)
        u = getattr(without, name)
        np.testing.assert_allclose(
            getattr(got, name),
            u + scale * (c - u),
            rtol=1e-13,
            atol=1e-13,
            err_msg=name,
        )


def test_guidance_calls_once_on_the_double_batch_and_takes_scales_per_sample():
    data = mixture()
    x, t, cond, null = mixture_states(data)
    sizes = []

    def net(x, t, cond):
        sizes.append(len(x))
        return data.denoise(Flow(), x, t, cond)

    scales = jnp.asarray([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    got = guided(net, x, t, cond, null, scales)
    assert sizes == [12]
    for i in range(6):
        one = guided(
            net,
            x[i : i + 1],
            t[i : i + 1],
            cond[i : i + 1],
            null[i : i + 1],
            float(scales[i]),
        )
        np.testing.assert_allclose(got.x0[i], one.x0[0], rtol=1e-12, atol=1e-13)
    guided(net, x, t, cond, null, 1.0)
    assert sizes[-1] == 6


def test_guidance_is_the_score_of_a_power_product():
    """score_w = (1 - w) score(x_t) + w score(x_t | c) at a given noise level, and null + w (cond -
    null) in x0.
    """
    data = mixture()
    w = 2.0
    x, t, cond, null = mixture_states(data)
    net = lambda x, t, cond: data.denoise(Flow(), x, t, cond)
    got = Flow().score(guided(net, x, t, cond, null, w), t)
    want = (1 - w) * Flow().score(net(x, t, null), t) + w * Flow().score(
        net(x, t, cond), t
    )
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def test_guided_networks_see_conditions_of_any_tree():
    cond = {"text": jnp.ones((2, 3)), "label": jnp.ones(2)}
    null = {"text": jnp.zeros((2, 3)), "label": jnp.zeros(2)}
    value = lambda cond: (cond["text"].sum(-1) + cond["label"])[:, None]
    net = lambda x, t, cond: Flow().from_x0(value(cond), x, t)
    guess = guided(net, jnp.zeros((2, 1)), jnp.full(2, 0.5), cond, null, 2.0)
    np.testing.assert_array_equal(guess.x0, 8.0)


def experts(data, seen):
    """Denoisers of three mixtures, each of which notes that it ran."""

    def make(i):
        law = Mixture(seed=i, modes=data.modes)

        def net(x, t, cond=None):
            jax.debug.callback(lambda: seen.append(i))
            return law.denoise(Flow(), x, t, cond)

        return net

    return [make(i) for i in range(3)]


def test_experts_by_time_of_each_sample():
    data = mixture()
    seen = []
    nets = experts(data, seen)
    x = mixture_states(data)[0]
    cond = mixture_states(data)[2]
    # at a bound the noisier expert serves
    t = jnp.asarray([0.95, 0.875, 0.8749, 0.5, 0.3, 0.1])
    got = jax.jit(by_time(nets, (0.875, 0.5)))(x, t, cond)
    for i, expert in enumerate((0, 0, 1, 1, 2, 2)):
        want = nets[expert](x[i : i + 1], t[i : i + 1], cond[i : i + 1])
        for name in FIELDS:
            np.testing.assert_allclose(
                getattr(got, name)[i],
                getattr(want, name)[0],
                rtol=1e-12,
                atol=1e-13,
            )


def test_one_time_for_the_batch_runs_its_expert_alone():
    data = mixture()
    seen = []
    nets, (x, _, cond, _) = experts(data, seen), mixture_states(data)
    routed = jax.jit(by_time(nets, (0.875, 0.5), shared=True))
    for t, expert in ((1.0, 0), (0.875, 0), (0.6, 1), (0.2, 2)):
        seen.clear()
        got = routed(x, jnp.full(len(x), t), cond)
        jax.effects_barrier()
        assert seen == [expert]
        np.testing.assert_allclose(
            got.x0,
            nets[expert](x, jnp.full(len(x), t), cond).x0,
            rtol=1e-12,
            atol=1e-13,
        )


def test_experts_need_falling_bounds_between_them():
    nets = [lambda x, t, cond=None: x] * 3
    assert by_time(nets[:1], ()) is nets[0]
    for bounds in ((0.5,), (0.3, 0.6), (0.5, 0.5)):
        with pytest.raises(
            Refused, match="expected 2 falling times between 3 networks"
        ):
            by_time(nets, bounds)


def signed(x_in, t_in, cond=None, *, r=None):
    """A raw network that says what it is fed."""
    return x_in + t_in[:, None] + (0 if r is None else 10 * r[:, None])


@pytest.mark.parametrize("t", [(0.3, 0.8), (-0.3, -0.8)])
def test_negative_times_reach_the_network_and_nothing_else(t):
    """x0 = x_t - |t| F and z = x_t + (1 - |t|) F invert the path for any F: (1 - |t|) x0 + |t| z =
    x_t (TwinFlow).
    """
    t = jnp.asarray(t)
    x = jnp.asarray([[1.3, 0.2], [-0.4, 0.7]])
    got = Denoiser(param=Velocity(time_scale=1000.0)).wrap(signed, Flow())(
        x, t, r=t / 2
    )
    F = signed(x, 1000 * t, r=500 * t)
    size = jnp.abs(t)[:, None]
    np.testing.assert_allclose(got.v, F, rtol=1e-13)
    np.testing.assert_allclose(got.x0, x - size * F, rtol=1e-12)
    np.testing.assert_allclose(got.eps, x + (1 - size) * F, rtol=1e-12)
    np.testing.assert_allclose((1 - size) * got.x0 + size * got.eps, x, rtol=1e-10)


def test_negative_times_are_warped_by_their_size():
    """A network of another process is given the sign, and the state of equal signal-to-noise."""
    seen = {}
    call = lambda x, t, cond: (seen.setdefault(float(t[0]) > 0, (x, t)), x)[1]
    wrapped = Denoiser(native=Flow(shift=3.0)).wrap(call, Flow())
    x = jnp.asarray([[1.3]])
    t = jnp.asarray([0.6])
    plus = wrapped(x, t)
    minus = wrapped(x, -t)
    np.testing.assert_array_equal(seen[True][0], seen[False][0])
    np.testing.assert_array_equal(seen[True][1], -seen[False][1])
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(plus, name), getattr(minus, name))


def test_folded_second_time():
    """A network of one time is fed t - r / 2, scaled like t; without r it is fed t."""
    wrapped = Denoiser(param=Velocity(time_scale=1000.0), fold=0.5).wrap(
        signed, Flow()
    )
    x = jnp.zeros((3, 1))
    t = jnp.asarray([1.0, 0.8, -0.4])
    r = jnp.asarray([0.0, 0.8, -0.4])
    np.testing.assert_allclose(
        wrapped(x, t, r=r).v[:, 0], [1000.0, 400.0, -200.0], rtol=1e-12
    )
    np.testing.assert_allclose(wrapped(x, t).v[:, 0], 1000 * t, rtol=1e-12)


def test_magnitude_has_derivative_one_at_zero():
    t = jnp.asarray([-0.5, 0.0, 0.5])
    value, grad = jax.jvp(magnitude, (t,), (jnp.ones(3),))
    np.testing.assert_array_equal(value, [0.5, 0.0, 0.5])
    np.testing.assert_array_equal(grad, [-1.0, 1.0, 1.0])
