"""Uni-Instruct on one-dimensional Gaussians by quadrature: the three terms, the code's weights, the
schedule, and its relatives.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.types import Ctx
from jaxdistill.diffusion.denoiser import Denoiser, EDMPrecond
from jaxdistill.diffusion.process import EDM, expand
from jaxdistill.diffusion.times import LogNormalSNR, Uniform
from jaxdistill.methods.distribution.sid import SiD
from jaxdistill.methods.distribution.sida import SiDA
from jaxdistill.methods.distribution.uni_instruct import (
    ExactUniInstruct,
    NormalisedUniInstruct,
    SharedUniInstruct,
    UniInstruct,
)
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import Discriminator
from jaxdistill.objectives import fdivergence
from jaxdistill.objectives.fdivergence import ChiSquare, ReverseKL
from tests.methods.distribution.gaussians import (
    ALPHA,
    SIGMA,
    C,
    M,
    Scaled,
    grid,
    log_density,
    networks,
)
from tools.first_steps import first_steps

OPEN = dict(ratio_range=(1e-200, 1e200), reverse_until=0)


def gradient(method, net, sigma=SIGMA, m=M, c=C):
    """d/dm, d/dc of the weighted mean of `method.expansion`, with constant networks."""
    z, eps, w = grid()
    t = jnp.full(len(z), sigma)
    ctx = Ctx({"x": z}, jax.random.key(0), jnp.asarray(0), {})

    def loss(m, c):
        x0 = m + c * z
        xt = method.process.add_noise(x0, jnp.asarray(eps), t)
        real, (fake, logits) = (
            method.real(net, xt, t, ctx),
            method.judge(net, xt, t, ctx),
        )
        return jnp.sum(
            w * method.expansion(net, ctx, x0, xt, t, real, fake, logits)
        )

    return np.array(jax.jit(jax.grad(loss, (0, 1)))(m, c))


def objective(kind, q_var):
    """J_t = E_p[h(r) d^2] as a function of (m, c), everything moving."""
    x, w = np.polynomial.hermite_e.hermegauss(200)

    def value(m, c):
        mean = ALPHA * m
        var = (ALPHA * c) ** 2 + SIGMA**2
        xt = mean + jnp.sqrt(var) * x
        r = jnp.exp(log_density(xt, 0.0, q_var) - log_density(xt, mean, var))
        d = -(xt - mean) / var + xt / q_var
        return jnp.sum(w / w.sum() * fdivergence.NAMES[kind].h(r) * d**2)

    return np.array(jax.jit(jax.grad(value, (0, 1)))(M, C))


class Terms(ExactUniInstruct):
    """Keeps some of the three terms."""

    kept = (1, 1, 1)

    def weights(self, r, step):
        return tuple(k * w for k, w in zip(self.kept, super().weights(r, step)))


def exact(kind, kept=(1, 1, 1), base=Terms):
    make = dataclasses.dataclass(frozen=True, kw_only=True)(
        type("Some", (base,), {"kept": kept})
    )
    return make(process=Scaled(), divergence=fdivergence.NAMES[kind], **OPEN)


TABLE = [  # divergence, scale of f, variance of q_t, (dJ/dm, dJ/dc)
    ("forward_kl", 1.0, 1.69, (0.986558, -4.404178)),
    ("reverse_kl", 1.0, 1.69, (0.179265, -1.210939)),
    ("js", 0.5, 1.69, (0.053007, -0.357584)),
    ("chi2", 1.0, 1.0, (9.672300, -19.968784)),
]


@pytest.mark.parametrize(("kind", "scale", "q_var", "values"), TABLE)
def test_three_terms_are_the_gradient(x64, kind, scale, q_var, values):
    # g^2 / 2 = SIGMA
    got = scale * gradient(exact(kind), networks(Scaled(), q_var)) / SIGMA
    np.testing.assert_allclose(got, scale * objective(kind, q_var), rtol=1e-8)
    np.testing.assert_allclose(got, values, atol=6e-7)


def test_single_terms(x64):
    """T_SIM alone is the complete gradient for forward KL only."""
    net = networks(Scaled(), 1.69)
    term = lambda kind, *kept: gradient(exact(kind, kept), net) / SIGMA
    np.testing.assert_allclose(term("forward_kl", 1, 0, 0), TABLE[0][3], atol=6e-7)
    np.testing.assert_allclose(
        term("reverse_kl", 1, 0, 0), (0.420542, -1.698047), atol=6e-7
    )
    np.testing.assert_allclose(
        0.5 * term("js", 1, 0, 0), (0.122798, -0.503122), atol=6e-7
    )
    np.testing.assert_allclose(
        0.5 * term("js", 0, 1, 0), (-0.026263, 0.054951), atol=6e-7
    )
    np.testing.assert_allclose(
        0.5 * term("js", 0, 0, 1), (-0.043527, 0.090587), atol=6e-7
    )


def test_detaching_the_ratio_changes_the_gradient(x64):
    class Detached(Terms):
        ratio = UniInstruct.ratio

    got = (
        gradient(exact("forward_kl", base=Detached), networks(Scaled(), 1.69))
        / SIGMA
    )
    np.testing.assert_allclose(got, (0.986558, -3.051113), atol=6e-7)


@pytest.mark.parametrize("make", [UniInstruct, ExactUniInstruct, SiDA])
@pytest.mark.parametrize("kind", ["jkl", "chi2"])
def test_equal_laws_leave_the_student_alone(x64, make, kind):
    var = (ALPHA * C) ** 2 + SIGMA**2
    named = {"divergence": fdivergence.NAMES[kind]}
    if make is SiDA:  # it has one of its own
        named = {}
    method = make(process=Scaled(), **named, **OPEN)
    np.testing.assert_allclose(
        gradient(method, networks(Scaled(), var, m=0.0), m=0.0), 0.0, atol=1e-10
    )


def test_code_weights(x64):
    """lambda_SIM L_SIM + lambda_DI L_DI, sample by sample: the gradient in a sample with x_t moving
    along, r and omega constant.
    """
    method = UniInstruct(process=Scaled(), divergence=ChiSquare(), **OPEN)
    net, (z, eps, _) = networks(Scaled(), 1.0), grid(6)
    t = jnp.full(len(z), SIGMA)
    ctx = Ctx({}, jax.random.key(0), jnp.asarray(0), {})
    at = lambda x0: method.process.add_noise(x0, jnp.asarray(eps), t)
    x0 = M + C * z

    def loss(x0):
        xt = at(x0)
        return jnp.sum(
            method.expansion(
                net,
                ctx,
                x0,
                xt,
                t,
                net.teacher(xt, t),
                *method.judge(net, xt, t, ctx),
            )
        )

    real = net.teacher(at(x0), t).x0
    fake = net.fake(at(x0), t).x0
    r = jnp.exp(net.disc(net.fake(at(x0), t).features, t, None))[:, None]
    # dD/dx_0
    omega = 1 / np.abs(x0 - real)
    phi = 1 - SIGMA**2 / 1.0
    psi = 1 - SIGMA**2 / ((ALPHA * C) ** 2 + SIGMA**2)
    sim = omega * ((phi - psi) * (fake - x0) + (real - fake) * (psi - 1))
    np.testing.assert_allclose(
        jax.grad(loss)(x0),
        2 * r**2 * sim + 4 * r**2 * (fake - real) * np.abs(fake - real),
        rtol=1e-9,
    )


def test_score_identity(x64):
    """E[d (s_p - cond. score)] = 0: the score projection that the SIM term rests on."""
    net, (z, eps, w) = networks(Scaled(), 1.69), grid()
    t = jnp.full(len(z), SIGMA)
    x0 = M + C * z
    xt = Scaled().add_noise(x0, jnp.asarray(eps), t)
    real = net.teacher(xt, t).x0
    fake = net.fake(xt, t).x0
    mean = jnp.sum(w[:, None] * (fake - real) * (fake - x0))
    np.testing.assert_allclose(mean, 0.0, atol=1e-12)


def test_reverse_kl_first_then_the_divergence():
    method = UniInstruct(
        divergence=ChiSquare(), critic_only=3, reverse_until=5, critic_steps=1
    )
    critics, student = method.turns
    assert critics.moves == ("fake", "disc") and all(
        critics.when(s) for s in range(9)
    )
    assert [s for s in range(9) if student.when(s)] == [3, 4, 5, 6, 7, 8]
    assert [
        s
        for s in range(9)
        if dataclasses.replace(method, critic_steps=2).turns[1].when(s)
    ] == [4, 6, 8]
    r = jnp.array([0.5, 3.0])
    early, late = (method.weights(r, jnp.asarray(s)) for s in (4, 5))
    np.testing.assert_array_equal(jnp.stack(early), [[1, 1], [0, 0], [1, 1]])
    np.testing.assert_allclose(
        jnp.stack(late), [2 * r**2, 4 * r**2, -2 * r**2], rtol=1e-6
    )


def test_the_chain_starts_at_the_first_student_time(context):
    ctx = context(jnp.zeros((500, 2)))
    seen = []
    student = lambda x, t, cond=None: (seen.append((x, t)), EDM().from_x0(x, x, t))[
        1
    ]
    batch = UniInstruct().simulate(SimpleNamespace(student=student), ctx)
    np.testing.assert_allclose(
        batch["xt"], 2.5 * jax.random.normal(ctx.key("noise"), (500, 2)), rtol=1e-6
    )
    assert np.all(batch["t"] == 2.5)
    noise = jax.random.normal(jax.random.key(0), (4, 2))
    np.testing.assert_allclose(
        UniInstruct().sample(student, noise, None, jax.random.key(0), 1),
        2.5 * noise,
        rtol=1e-6,
    )
    assert np.all(seen[-1][1] == 2.5)


def test_the_gan_term_is_weighed_by_dimensions_and_distance(x64, context):
    """.01 numel omega softplus(-clip(logit)), the softplus before the mean over the map; its
    gradient stops at the clip.
    """
    map_ = lambda x: jnp.stack([x.sum(1), 40.0 + x.sum(1), -x.sum(1)], 1)
    net = SimpleNamespace(
        student=lambda x, t, cond=None: EDM().from_x0(x, x, t),
        teacher=lambda x, t, cond=None: EDM().from_x0(0.5 * x, x, t),
        fake=lambda x, t, cond=None, taps=(): EDM().from_x0(
            0.5 * x, x, t, features=(x,)
        ),
        disc=lambda features, t, cond: map_(features[0]),
    )
    method = UniInstruct(match_times=Uniform(low=1e-9, high=1e-9), reverse_until=0)
    x = jax.random.normal(jax.random.key(3), (5, 4))
    out = method.student_loss(net, context(x, xt=x, t=jnp.ones(5)))
    xt = method.diffuse(x, method.match_times, context(x), "match")[0]
    want = (
        0.01
        * 4
        * np.mean(
            np.mean(np.logaddexp(0, -np.clip(map_(xt), -10, 10)), 1)
            / np.mean(np.abs(x - 0.5 * xt), 1)
        )
    )
    # equal scores: nothing but the GAN
    np.testing.assert_allclose(out.loss, want, rtol=1e-9)


def adversarial_networks():
    map_ = lambda x: jnp.stack([x.sum(1), 2 - x.sum(1) ** 2], 1)
    return SimpleNamespace(
        student=lambda x, t, cond=None: EDM().from_x0(x, x, t),
        teacher=lambda x, t, cond=None: EDM().from_x0(0.5 * x, x, t),
        fake=lambda x, t, cond=None, taps=(): EDM().from_x0(
            0.7 * x, x, t, features=(x,)
        ),
        disc=lambda features, t, cond: map_(features[0]),
    )


def test_the_students_gan_waits_for_the_divergence(x64, context):
    """Between `critic_only` and `reverse_until` the student's loss is 100 L_SIM alone; from there
    on the GAN's term is added.
    """
    net = adversarial_networks()
    x = jax.random.normal(jax.random.key(3), (6, 4))
    at = lambda step, **kw: UniInstruct(
        divergence=ReverseKL(), critic_only=2, reverse_until=5, **kw
    ).student_loss(net, context(x, step=step, xt=x, t=jnp.ones(6)))
    for step in (2, 4):
        np.testing.assert_array_equal(at(step).loss, at(step, gan_weight=0.0).loss)
        np.testing.assert_array_equal(
            at(step).loss, 100 * at(step).metrics["match"]
        )
    out = at(5)
    np.testing.assert_allclose(
        out.loss,
        100 * out.metrics["match"] + 0.01 * 4 * out.metrics["gan"],
        rtol=1e-12,
    )
    assert abs(out.loss - at(4).loss) > 1e-3


def test_the_discriminators_loss_is_that_of_the_code(x64, context):
    """The mean of lambda times half the batch's cross-entropies, the mean over logits of the batch;
    lambda = (s^2 + .25) / (.5 s)^2.
    Its gradient is far from that of the mean of products.
    """
    net = adversarial_networks()
    n = 64
    method = UniInstruct()
    keys = jax.random.split(jax.random.key(4), 2)
    z, x = (jax.random.normal(key, (n, 4)) for key in keys)
    ctx = context(x, xt=2.5 * z, t=jnp.full(n, 2.5))
    x0 = 2.5 * z
    sigma = np.exp(
        -1.2 + 1.2 * np.asarray(jax.random.normal(ctx.key("fake_t"), (n,)))
    )
    noise = sigma[:, None] * np.asarray(
        jax.random.normal(ctx.key("fake_eps"), (n, 4))
    )
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2

    def ours(w):
        head = net.disc
        moved = SimpleNamespace(
            **{**vars(net), "disc": lambda *args: w * head(*args)}
        )
        return method.critic_loss(moved, ctx).metrics["gan"]

    def code(w, each=lambda lam, entropy: jnp.mean(lam) * jnp.mean(entropy)):
        real, fake = (w * net.disc((a + noise,), None, None) for a in (x, x0))
        return each(
            weight[:, None], (jnp.logaddexp(0, -real) + jnp.logaddexp(0, fake)) / 2
        )

    np.testing.assert_allclose(ours(1.3), code(1.3), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(ours)(1.3), jax.grad(code)(1.3), rtol=1e-9)
    other = jax.grad(code)(1.3, lambda lam, entropy: jnp.mean(lam * entropy))
    assert abs(other / jax.grad(ours)(1.3) - 1) > 0.1


def test_discriminator_settles_at_the_log_ratio(x64, context):
    """At logit = log q - log p the critics' loss has no slope but sampling noise, with the EDM
    weight on every noise level.
    """
    n = 40_000
    method = UniInstruct(fake_times=LogNormalSNR(mean=0.0, std=0.5))
    q_var = lambda s: 0.9 + s**2
    net = networks(EDM(), q_var)
    best = net.disc
    z = jax.random.normal(jax.random.key(2), (2, n, 1))
    net.student = lambda x, t, cond=None: EDM().from_x0(M + C * x, x, t)
    ctx = context(0.9**0.5 * z[1], xt=z[0], t=jnp.ones(n))

    def loss(move):
        net.disc = lambda features, t, cond: (
            best(features, t, cond) + move[0] + move[1] * features[0][0][:, 0]
        )
        return method.critic_loss(net, ctx).metrics["gan"]

    slopes = jax.jit(jax.grad(loss))
    at = slopes(jnp.zeros(2))
    away = slopes(jnp.array([0.5, 0.5]))
    assert jnp.all(jnp.abs(at) < 0.1 * jnp.abs(away)), (at, away)


@pytest.fixture(scope="module")
def trained():
    """Weights and losses of the first five steps, by method."""
    process = EDM()
    wrap = functools.partial(
        Denoiser(param=EDMPrecond(), native=process).wrap, process=process
    )
    mlp = make_net(MLP(width=8, depth=2), wrap=wrap)
    disc = make_net(Discriminator(taps=1, dim=8, width=8))
    batch = {"x": jax.random.normal(jax.random.key(0), (16, 2))}

    def run(method, lr=None):
        nets = {
            role: disc if role == "disc" else mlp
            for role in (*method.inits, *method.frozen)
        }
        txs = {role: optax.sgd((lr or {}).get(role, 1e-4)) for role in method.inits}
        start = {
            "teacher": jax.tree.map(
                lambda w: w + 0.05, mlp.init(jax.random.key(7))
            ),
            "fake": mlp.init(jax.random.key(8)),
        }
        states, losses = first_steps(method, nets, txs, start, batch)
        return states[-1].params, losses

    return run


def same(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


@pytest.mark.full
def test_reverse_kl_without_the_gan_follows_sid(trained, compilations):
    """Both GAN weights 0: draw for draw SiD with alpha = 1, whose fake loss is a mean where this
    one's is a sum over 2 dimensions.
    """
    ours, losses = trained(
        UniInstruct(
            divergence=ReverseKL(),
            gan_weight=0.0,
            disc_weight=0.0,
            critic_only=2,
            reverse_until=3,
        )
    )
    # the schedule costs one program for the critics alone, none for the change of divergence
    assert compilations["train_step"] == 2

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(SiD):
        @property
        def turns(self):
            critics, student = super().turns
            return critics, dataclasses.replace(
                student, when=lambda step: step >= 2
            )

    host, others = trained(Later(alpha=1.0), {"fake": 2e-4})
    same(ours["student"], host["student"])
    same(ours["fake"], host["fake"])
    for mine, theirs in zip(losses, others, strict=True):
        np.testing.assert_allclose(
            mine["fake/denoise"], 2 * theirs["fake/denoise"], rtol=1e-5
        )
        if "student/match" in theirs:
            np.testing.assert_allclose(
                100 * mine["student/match"], theirs["student/match"], rtol=1e-5
            )


@pytest.mark.full
def test_every_part_trains(trained):
    """The GAN, the divergence and the shared discriminator each move the student elsewhere."""
    settings = dict(critic_only=0, reverse_until=0)
    base = trained(UniInstruct(divergence=ReverseKL(), **settings))[0]["student"]
    for other in (
        UniInstruct(divergence=ReverseKL(), gan_weight=0.0, **settings),
        UniInstruct(divergence=ChiSquare(), **settings),
        SharedUniInstruct(divergence=ReverseKL(), **settings),
    ):
        params, losses = trained(other)
        assert all(np.isfinite(v) for row in losses for v in row.values())
        assert (
            max(
                np.abs(a - b).max()
                for a, b in zip(
                    jax.tree.leaves(params["student"]),
                    jax.tree.leaves(base),
                    strict=True,
                )
            )
            > 1e-6
        )


MODES = np.array([-2.0, 2.0])
STD = 0.5


def fitted(kind):
    """(mean, std) of a single Gaussian fitted to a bimodal target by the exact gradient of the
    expansion, ratios exact.
    """
    method = ExactUniInstruct(
        divergence=fdivergence.NAMES[kind],
        ratio_range=(1e-12, 1e12),
        reverse_until=0,
    )
    x, w = np.polynomial.hermite_e.hermegauss(8)
    # resolves the edge between the modes, where Gauss-Hermite nodes would not
    across = np.linspace(-5, 5, 81)
    share = np.exp(-(across**2) / 2) / np.exp(-(across**2) / 2).sum()
    u, lengths = np.polynomial.legendre.leggauss(16)
    low = np.log(0.05)
    high = np.log(60.0)
    sigmas = np.exp((u + 1) * (high - low) / 2 + low)
    lengths = lengths * (high - low) / 2
    z, eps, t = (
        a.reshape(-1) for a in np.meshgrid(across, x, sigmas, indexing="ij")
    )
    weights = jnp.asarray(
        np.einsum("i,j,k->ijk", share, w / w.sum(), lengths * sigmas).reshape(-1)
    )
    z = jnp.asarray(z)[:, None]
    eps = jnp.asarray(eps)[:, None]
    t = jnp.asarray(t)

    def log_q(x, t):
        return jax.nn.logsumexp(
            log_density(x, MODES, STD**2 + expand(t, x) ** 2), axis=-1
        )[..., None] - np.log(2)

    def slope(theta):
        fixed = jax.lax.stop_gradient(theta)
        net = networks(EDM(), 1.0, fixed[0], jnp.exp(fixed[1]))
        p = lambda x, t: log_density(
            x, fixed[0], jnp.exp(2 * fixed[1]) + expand(t, x) ** 2
        )
        score_q = lambda x, t: jax.grad(lambda x: jnp.sum(log_q(x, t)))(x)
        net.teacher = lambda x, t, cond=None: EDM().from_x0(
            x + expand(t, x) ** 2 * score_q(x, t), x, t
        )
        net.disc = lambda features, t, cond: (
            log_q(features[0][0], features[0][1][:, 0])
            - p(features[0][0], features[0][1][:, 0])
        )[:, 0]
        ctx = Ctx({}, jax.random.key(0), jnp.asarray(0), {})
        x0 = theta[0] + jnp.exp(theta[1]) * z
        xt = x0 + expand(t, x0) * eps
        real, (fake, logits) = (
            method.real(net, xt, t, ctx),
            method.judge(net, xt, t, ctx),
        )
        return jnp.sum(
            weights * method.expansion(net, ctx, x0, xt, t, real, fake, logits)
        )

    tx = optax.adam(optax.cosine_decay_schedule(0.05, 300))

    def update(carry, _):
        theta, opt = carry
        moves, opt = tx.update(jax.grad(slope)(theta), opt)
        return (theta + moves, opt), None

    theta = jnp.array([0.5, 0.0])
    (theta, _), _ = jax.jit(
        lambda: jax.lax.scan(update, (theta, tx.init(theta)), None, 300)
    )()
    return float(theta[0]), float(jnp.exp(theta[1]))


def test_a_student_of_too_little_capacity_covers_under_forward_and_picks_under_reverse_kl(
    x64,
):
    """Best single Gaussians for modes at +-2 with std .5: mean 0, std sqrt(4.25) (forward), mean
    +-2, std .5 (reverse).
    """
    data_std = 4.25**0.5
    mean, std = fitted("forward_kl")
    assert std >= 0.8 * data_std and abs(mean) < 0.2, (mean, std)
    mean, std = fitted("reverse_kl")
    assert std <= 0.5 * data_std and abs(mean - 2) < 0.2, (mean, std)


def test_normalised_ratios_have_mean_one():
    r = NormalisedUniInstruct().ratio(jnp.array([-1.0, 0.0, 2.0]))
    np.testing.assert_allclose(r.mean(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(r[2] / r[1], np.exp(2), rtol=1e-5)
