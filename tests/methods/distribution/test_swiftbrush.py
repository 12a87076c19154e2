"""SwiftBrush: the gradient and its closed form, adapters as the fake score, both updates from one
call of the generator.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.lora import adapt
from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.diffusion.denoiser import Denoiser, Noise
from jaxdistill.diffusion.process import DDPM, Flow, expand
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution.swiftbrush import SDS, SwiftBrush
from jaxdistill.models.denoisers.mlp import MLP
from tools.first_steps import first_steps

SD = DDPM(scaled=True, beta_min=0.00085, beta_max=0.012)
CLASSES = 3
N = 16
MLPS = make_net(
    MLP(width=8, depth=1, classes=CLASSES),
    wrap=functools.partial(Denoiser().wrap, process=Flow()),
)
NETS = {
    "teacher": MLPS,
    "student": MLPS,
    "fake": adapt(MLPS, base="teacher", rank=2, alpha=4.0),
}
LABELS = {"cond": jnp.arange(N) % CLASSES, "null_cond": jnp.full(N, CLASSES)}


def start(b=0.0):
    """First weights by role; the adapters' second factor is `b` throughout."""
    student, teacher, fake = (
        NETS[role].init(jax.random.key(i))
        for i, role in enumerate(("student", "teacher", "fake"))
    )
    return {
        "student": student,
        "teacher": teacher,
        "fake": {path: {"a": p["a"], "b": p["b"] + b} for path, p in fake.items()},
    }


def state_gradient(method, params, ctx):
    """Gradient of the student's samples, [N 2]."""
    x0 = jax.random.normal(jax.random.key(9), (N, 2))
    return jax.grad(lambda x: method.match(bind(NETS, params), ctx, x)[0])(x0)


def test_gradient_is_g_over_numel(context):
    method = SwiftBrush(guidance=4.5, fake_guidance=2.0)
    params = start(0.3)
    ctx = context(jnp.zeros((N, 2)), **LABELS)
    x0 = jax.random.normal(jax.random.key(9), (N, 2))
    xt, t, _ = method.diffuse(x0, method.match_times, ctx, "match")
    net = bind(NETS, params)
    eps = lambda role, label: getattr(net, role)(xt, t, LABELS[label]).eps
    mixed = lambda role, k: (1 - k) * eps(role, "null_cond") + k * eps(role, "cond")
    # sigma = t on rectified flow
    g = expand(t, x0) ** 2 * (mixed("teacher", 4.5) - mixed("fake", 2.0))
    np.testing.assert_allclose(
        state_gradient(method, params, ctx), g / x0.size, rtol=1e-4, atol=1e-7
    )
    alpha = 1 - expand(t, x0)
    v = lambda role, k: (lambda a, b: b + k * (a - b))(
        *(getattr(net, role)(xt, t, LABELS[c]).v for c in ("cond", "null_cond"))
    )
    # the specification's translation
    flow = expand(t, x0) ** 2 * alpha * (v("teacher", 4.5) - v("fake", 2.0))
    np.testing.assert_allclose(g, flow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "fake_scale", "still"),
    [(4.5, 4.5, True), (1.0, 1.0, True), (4.5, 1.0, False)],
)
def test_fresh_adapters_leave_the_student_alone(context, scale, fake_scale, still):
    """B = 0: eps_psi = eps_phi, hence no gradient at all where both have one scale, and one where
    they have not.
    """
    gradient = state_gradient(
        SwiftBrush(guidance=scale, fake_guidance=fake_scale),
        start(),
        context(jnp.zeros((N, 2)), **LABELS),
    )
    assert bool(np.any(gradient)) != still


@pytest.mark.parametrize("process", [Flow(), SD], ids=["flow", "sd"])
@pytest.mark.parametrize(
    ("m", "a"), [(0.9, 0.4), (-0.2, 0.7), (0.5, 0.7), (0.5, 0.3)]
)
def test_closed_form_with_a_converged_fake(x64, gaussian, process, m, a):
    """E[g] = sigma^3 alpha (m - mu) / (alpha^2 b^2 + sigma^2), whatever a; g vanishes everywhere
    only where both distributions are equal.
    """
    mu = 0.5
    b = 0.3
    n = 11
    real = gaussian(process, mu, b)
    fake = gaussian(process, m, a)
    t = jnp.full(n, 0.6)
    alpha, sigma = (float(c) for c in process.alpha_sigma(jnp.asarray(0.6)))
    # around the mean of the student's x_t, in which g is affine
    xt = alpha * m + jnp.linspace(-1, 1, n)[:, None]
    g = SwiftBrush(process=process).direction(
        jnp.zeros((n, 1)), real.denoise(xt, t), fake.denoise(xt, t), t
    )
    np.testing.assert_allclose(
        g.mean(),
        sigma**3 * alpha * (m - mu) / (alpha**2 * b**2 + sigma**2),
        rtol=1e-9,
        atol=1e-12,
    )
    assert np.allclose(g, 0, atol=1e-12) == (m == mu and a == b)


def test_student_predicts_noise_and_is_read_at_the_last_time():
    """eps_theta = z gives (1 - sigma_T) / alpha_T z, at index 999, with alpha_T^2 = 0.0047; z
    itself is the input.
    """
    fed = {}

    def echo(x, t, cond):
        fed.update(x=x, t=t)
        return x

    net = Denoiser(param=Noise(time_scale=999.0), native=SD).wrap(echo, SD)
    z = jax.random.normal(jax.random.key(0), (4, 2))
    x0 = SwiftBrush(process=SD).sample(net, z, None, jax.random.key(1), 1)
    np.testing.assert_allclose(fed["x"], z, rtol=1e-6)
    np.testing.assert_allclose(fed["t"], 999, rtol=1e-6)
    alpha, sigma = (float(c) for c in SD.alpha_sigma(jnp.asarray(1.0)))
    assert round(alpha**2, 4) == 0.0047
    assert alpha == pytest.approx(0.0047**0.5, abs=5e-4) and sigma == pytest.approx(
        0.99765, abs=5e-5
    )
    # 1 - sigma_T is .002, to float32's 6e-8
    np.testing.assert_allclose(x0, (1 - sigma) / alpha * z, rtol=1e-3, atol=1e-6)
    blind = Denoiser(param=Noise(time_scale=999.0), native=SD).wrap(
        lambda x, t, cond: 0 * x, SD
    )
    np.testing.assert_allclose(
        SwiftBrush(process=SD).sample(blind, z, None, jax.random.key(1), 1),
        z / alpha,
        rtol=1e-5,
    )


def test_the_sample_is_that_of_training(context):
    method = SwiftBrush()
    net = bind(NETS, start())
    ctx = context(jnp.zeros((N, 2)), **LABELS)
    made = method.generate(
        net, dataclasses.replace(ctx, batch=method.simulate(net, ctx))
    )
    noise = jax.random.normal(ctx.key("noise"), (N, 2))
    np.testing.assert_array_equal(
        made,
        method.sample(net.student, noise, LABELS["cond"], jax.random.key(1), 1),
    )


@pytest.mark.parametrize("weighted", [True, False])
def test_the_adapters_learn_the_noise_whatever_its_weight(
    x64, gaussian, context, weighted
):
    """E[eps | x_t] is the minimiser with alpha_t^2 as without."""
    fake = gaussian(Flow(), -0.2, 0.6)
    n = 100_000
    method = (SwiftBrush if weighted else Unweighted)(
        fake_times=Uniform(low=0.2, high=0.8), fake_dropout=0.0
    )
    ctx = context(jnp.zeros((n, 1)), t=jnp.ones(n))
    x0 = fake.draw(n, dim=1)

    def loss(w):
        net = SimpleNamespace(
            fake=lambda x, t, cond=None: Flow().from_eps(
                w[0] * fake.denoise(x, t).eps + w[1], x, t
            )
        )
        return method.denoise(net, ctx, x0)

    at = jax.grad(loss)(jnp.array([1.0, 0.0]))
    away = jax.grad(loss)(jnp.array([0.8, 0.2]))
    # sampling noise of 100,000 draws
    assert jnp.all(jnp.abs(at) < 0.05 * jnp.abs(away).max()), (
        at,
        away,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unweighted(SwiftBrush):
    """Diff-Instruct's mean over times in place of the weight."""

    def denoise(self, net, ctx, x0):
        return super(SwiftBrush, self).denoise(net, ctx, x0)


def test_the_weight_is_alpha_squared(context):
    t = 0.75
    ctx = context(jnp.zeros((N, 2)), t=jnp.ones(N))
    net = SimpleNamespace(fake=lambda x, t, cond=None: Flow().from_eps(0 * x, x, t))
    at = dict(fake_times=Uniform(low=t, high=t), fake_dropout=0.0)
    ratio = SwiftBrush(**at).denoise(net, ctx, jnp.zeros((N, 2))) / Unweighted(
        **at
    ).denoise(net, ctx, jnp.zeros((N, 2)))
    assert float(ratio) == pytest.approx((1 - t) ** 2, rel=1e-6)


def test_true_noise_as_the_fake_score_is_sds(x64, gaussian, context):
    real = gaussian(Flow(), 0.7, 0.4)
    n = 32
    x0 = real.draw(n)
    ctx = context(jnp.zeros((n, 2)))
    same = dict(guidance=1.0, fake_guidance=1.0)
    noise = SwiftBrush(**same).diffuse(x0, SwiftBrush().match_times, ctx, "match")[
        2
    ]
    net = SimpleNamespace(
        teacher=real.denoise, fake=lambda x, t, cond: Flow().from_eps(noise, x, t)
    )
    ours, sds = (
        jax.grad(lambda x: m(**same).match(net, ctx, x)[0])(x0)
        for m in (SwiftBrush, SDS)
    )
    np.testing.assert_allclose(ours, sds, rtol=1e-12)
    assert np.abs(ours).max() > 0


def test_without_guidance_the_null_condition_is_not_read(context):
    def net(x, t, cond):
        return Flow().from_v(
            jnp.where((cond == CLASSES)[:, None], jnp.nan, x), x, t
        )

    ctx = context(jnp.zeros((N, 2)), **LABELS)
    nets = SimpleNamespace(teacher=net, fake=net)
    loss = lambda k: SwiftBrush(guidance=k, fake_guidance=k).match(
        nets, ctx, jnp.ones((N, 2))
    )[0]
    assert np.isfinite(loss(1.0))
    poisoned = SwiftBrush(guidance=2.0).real(
        nets, jnp.ones((N, 2)), jnp.full(N, 0.5), ctx
    )
    assert np.isnan(poisoned.eps).all()
    assert loss(2.0) == 0  # what is no number moves nothing


def test_dropout_is_one_draw_for_the_batch():
    method = SwiftBrush(fake_dropout=0.1)
    dropped = []
    batch = {**LABELS, "t": jnp.ones(N)}
    draw = jax.jit(lambda key: method.fake_cond(Ctx(batch, key, 0, {})))
    for key in jax.random.split(jax.random.key(0), 1000):
        cond = np.asarray(draw(key))
        dropped.append((cond == CLASSES).all())
        assert dropped[-1] or (cond == LABELS["cond"]).all()
    assert abs(np.mean(dropped) - 0.1) < 4 * (0.09 / 1000) ** 0.5


def test_it_needs_no_samples(context):
    """Conditions say how many, `shape` how large; with samples the same states come out."""
    net = bind(NETS, start())
    ctx = context(jnp.zeros((N, 2)), **LABELS)
    bare = dataclasses.replace(ctx, batch=dict(LABELS))
    expected = SwiftBrush().simulate(net, ctx)
    found = SwiftBrush(shape=(2,)).simulate(net, bare)
    for name in ("xt", "t", "cond"):
        np.testing.assert_array_equal(found[name], expected[name])
    with pytest.raises(Refused, match=r"method.shape=\(\): the batch has no x"):
        SwiftBrush().simulate(net, bare)


def test_one_call_of_the_generator_and_fresh_noise(context):
    calls = []
    seen = {}
    pred = lambda name: (
        lambda x, t, cond=None: (
            seen.setdefault(name, (x, t)),
            Flow().from_v(0.5 * x, x, t),
        )[1]
    )

    def student(x, t, cond):
        calls.append(x)
        return Flow().from_v(0.1 * x, x, t)

    method = SwiftBrush(guidance=1.0, fake_guidance=1.0)
    ctx = context(jnp.zeros((N, 2)), **LABELS)
    batch = method.simulate(SimpleNamespace(student=student), ctx)
    calls.clear()
    fakes = []
    net = SimpleNamespace(
        student=student,
        teacher=pred("teacher"),
        fake=lambda x, t, c: (fakes.append((x, t)), Flow().from_v(x, x, t))[1],
    )
    method.loss(net, dataclasses.replace(ctx, batch=batch))
    assert len(calls) == 1
    (match_x, match_t), (own_x, own_t) = fakes
    np.testing.assert_array_equal(match_x, seen["teacher"][0])
    assert not np.any(match_t == own_t) and not np.any(match_x == own_x)


def run(method, batch, params, steps=5, lr=1e-1):
    """(weights, losses) of `steps` engine steps by plain gradient descent."""
    states, losses = first_steps(method, NETS, optax.sgd(lr), params, batch, steps)
    return states[-1], losses


def test_five_steps_are_those_of_two_networks_apart():
    """The joint turn against each network's own gradient, at the weights before the step; base and
    teacher stay as they are.
    """
    method = SwiftBrush()
    params = start(0.2)
    batch = {"x": jnp.zeros((N, 2)), **LABELS}
    state, losses = run(method, batch, params)

    @jax.jit
    def apart(student, fake, step):
        rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), step), 0)
        at = lambda **new: bind(
            NETS, {**params, "student": student, "fake": fake, **new}
        )
        ctx = Ctx(method.simulate(at(), Ctx(batch, rng, step, {})), rng, step, {})
        first, g = jax.value_and_grad(
            lambda p: method.student_loss(at(student=p), ctx).loss
        )(student)
        second, h = jax.value_and_grad(
            lambda p: method.critic_loss(at(fake=p), ctx).loss
        )(fake)
        down = lambda p, d: jax.tree.map(lambda w, d: w - 0.1 * d, p, d)
        return down(student, g), down(fake, h), first, second

    student = params["student"]
    fake = params["fake"]
    for i, metrics in enumerate(losses):
        student, fake, first, second = apart(student, fake, i)
        np.testing.assert_allclose(metrics["student/match"], first, rtol=1e-5)
        np.testing.assert_allclose(metrics["student/denoise"], second, rtol=1e-5)
    for ours, reference in (
        (state.params["student"], student),
        (state.params["fake"], fake),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            ours,
            jax.device_get(reference),
        )
    jax.tree.map(
        np.testing.assert_array_equal,
        state.frozen["teacher"],
        jax.device_get(params["teacher"]),
    )
    assert set(state.params["fake"]) == set(NETS["fake"].shapes)
    for path, pair in state.params["fake"].items():
        assert set(pair) == {"a", "b"}
        assert all(np.any(pair[k] != params["fake"][path][k]) for k in pair), path


def test_the_student_waits_for_the_adapters():
    """From B = 0 the first step moves the adapters alone, the second one the student too."""
    batch = {"x": jnp.zeros((N, 2)), **LABELS}
    params = start()
    one, two = (
        run(SwiftBrush(fake_dropout=0.0), batch, params, steps=n)[0].params
        for n in (1, 2)
    )
    same = lambda tree: all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(params["student"]))
    )
    assert same(one["student"]) and not same(two["student"])
    assert any(np.any(pair["b"]) for pair in one["fake"].values())


def test_more_updates_of_the_fake_score():
    _, losses = run(
        SwiftBrush(critic_steps=3),
        {"x": jnp.zeros((N, 2)), **LABELS},
        start(0.2),
        steps=4,
    )
    assert [("student/match" in m, "fake/denoise" in m) for m in losses] == [
        (True, False),
        (False, True),
        (False, True),
        (True, False),
    ]
