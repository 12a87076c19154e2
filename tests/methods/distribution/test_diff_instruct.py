"""Distribution matching on Gaussians (00-foundations, section 8): the gradient is the KL's, in
closed form.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.recipes import diff_instruct
from jaxdistill.core.optim import Optimizer
from jaxdistill.diffusion.process import EDM, Flow, Trig
from jaxdistill.diffusion.times import LogNormalSNR, Uniform
from jaxdistill.methods.distribution.diff_instruct import (
    DiffInstruct,
    EDMDiffInstruct,
)
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.sid import SiD
from jaxdistill.methods.distribution.uni_instruct import UniInstruct

AT = 0.6
FIXED = Uniform(low=AT, high=AT)


def nets(real, fake, shift=0.0):
    """A student z -> mean + std z + shift, with exact real and fake scores."""
    student = lambda x, t, cond=None: real.process.from_x0(
        fake.mean + fake.std * x + shift, x, t
    )
    return SimpleNamespace(student=student, teacher=real.denoise, fake=fake.denoise)


def gathered(context, n=20_000, **batch):
    """A batch as `simulate` leaves it for a one-step student on rectified flow: x_t is noise at t =
    1.
    """
    noise = jax.random.normal(jax.random.key(5), (n, 1))
    return context(jnp.zeros((n, 1)), xt=noise, t=jnp.ones(n), **batch)


def test_gradient_in_the_mean_is_that_of_the_kl(x64, gaussian, context):
    """Same spread s: D_psi - D_phi = sigma^2 (m_g - m_r) / S for every x_t, S = alpha^2 s^2 +
    sigma^2.
    """
    real = gaussian(Flow(), 0.7, 0.4)
    fake = gaussian(Flow(), -0.2, 0.4)
    method = DiffInstruct(match_times=FIXED)
    ctx = gathered(context)
    grad = jax.grad(lambda m: method.student_loss(nets(real, fake, m), ctx).loss)(
        0.0
    )
    alpha, sigma = Flow().alpha_sigma(AT)
    spread = (alpha * 0.4) ** 2 + sigma**2
    np.testing.assert_allclose(grad, sigma**2 * (-0.2 - 0.7) / spread, rtol=1e-5)
    # w_t alpha E[s_psi - s_phi] with w_t = sigma^2 / alpha, which is the KL's derivative alpha^2
    # (m_g - m_r) / S times w_t / alpha
    kl = lambda m: alpha**2 * (m - 0.7) ** 2 / (2 * spread)
    np.testing.assert_allclose(
        grad, jax.grad(kl)(-0.2) * sigma**2 / alpha**2, rtol=1e-5
    )


def test_as_released_the_gradient_is_that_of_the_kl_on_edms_process(
    x64, gaussian, context
):
    """alpha = 1, at noise level .8, which gradient and fake score share: sigma^2 (m_g - m_r) / (s^2
    + sigma^2).
    """
    real = gaussian(EDM(), 0.7, 0.4)
    fake = gaussian(EDM(), -0.2, 0.4)
    method = EDMDiffInstruct(match_times=LogNormalSNR(mean=np.log(0.8), std=0.0))
    grad = jax.grad(
        lambda m: (
            method.student_loss(nets(real, fake, m), gathered(context, 100)).loss
        )
    )(0.0)
    np.testing.assert_allclose(grad, 0.64 * (-0.2 - 0.7) / (0.16 + 0.64), rtol=1e-5)


def test_as_released_losses_are_sums_and_adam_undoes_it(x64, gaussian, context):
    """The code: sums over dimensions, means over samples. Theirs are ours times the dimensions, and
    Adam's steps at its eps equal ours at the recipe's rule, eps over the dimensions; at its own eps
    ours would be far off where gradients are small.
    """
    g = gaussian(EDM(), 0.7, 0.4)
    dims = 5
    n = 7
    method = EDMDiffInstruct()
    draws = np.random.default_rng(0).standard_normal((2, n, dims))
    ctx = context(jnp.zeros((n, dims)), xt=jnp.asarray(draws[0]), t=jnp.ones(n))

    def nets(w, v):
        at = lambda a: (
            lambda x, t, cond=None, **kw: EDM().from_x0(
                a[0] * x + a[1] * jnp.sin(x), x, t
            )
        )
        return SimpleNamespace(student=at(w), fake=at(v), teacher=g.denoise)

    def noised(x0, name):
        sigma = jnp.exp(-1.2 + 1.2 * jax.random.normal(ctx.key(name + "_t"), (n,)))[
            :, None
        ]
        return x0 + sigma * jax.random.normal(
            ctx.key(name + "_eps"), x0.shape
        ), sigma

    def student(w, v):
        x0 = nets(w, v).student(ctx.batch["xt"], ctx.batch["t"]).x0
        xt, sigma = noised(jax.lax.stop_gradient(x0), "match")
        gap = nets(w, v).fake(xt, sigma[:, 0]).x0 - g.denoise(xt, sigma[:, 0]).x0
        return jnp.sum(jax.lax.stop_gradient(gap) * x0) / n

    def fake(w, v):
        x0 = nets(w, v).student(ctx.batch["xt"], ctx.batch["t"]).x0
        xt, sigma = noised(x0, "fake")
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        return jnp.sum(weight * (nets(w, v).fake(xt, sigma[:, 0]).x0 - x0) ** 2) / n

    w = jnp.asarray([0.8, 0.1])
    v = jnp.asarray([0.5, -0.2])
    ours = (
        jax.grad(lambda w: method.student_loss(nets(w, v), ctx).loss)(w),
        jax.grad(lambda v: method.critic_loss(nets(w, v), ctx).loss)(v),
    )
    theirs = jax.grad(student)(w, v), jax.grad(fake, argnums=1)(w, v)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(dims * a, b, rtol=1e-9)
        # gradients of the size of eps, where it matters
        small = 1e-8 / jnp.abs(b).max()

        def steps(grad, eps):
            tx = Optimizer(
                algorithm="adam", lr=1.0, b1=0.0, eps=eps, clip=0.0
            ).make(3)
            params = {"w": jnp.zeros(2)}
            return tx.update({"w": grad}, tx.init(params), params)[0]["w"]

        np.testing.assert_allclose(
            steps(small * a, 1e-8 / dims), steps(small * b, 1e-8), rtol=1e-9
        )
        assert (
            jnp.abs(steps(small * a, 1e-8) / steps(small * b, 1e-8) - 1).max() > 0.5
        )
    assert (
        diff_instruct.get_config().roles.student.optimizer.eps
        == diff_instruct.get_config().roles.fake.optimizer.eps
        == 1e-8 / 3072
    )


@pytest.mark.parametrize("make", [EDMDiffInstruct, SiD, UniInstruct])
def test_starts_from_noise_of_the_level_that_the_student_is_told(context, make):
    """x0 = G(sigma z, sigma), in training and in sampling."""
    method = make(student_times=(1.5,))
    noise = jax.random.normal(jax.random.key(3), (50, 1))
    seen = []

    def student(x, t, cond=None):
        seen.append((x, t))
        # the last call is that of the sampler; those before it trace a chain of no step
        return EDM().from_x0(x, x, t)

    method.sample(student, noise, None, jax.random.key(0), 1)
    np.testing.assert_allclose(seen[-1][0], 1.5 * noise, rtol=1e-6)
    np.testing.assert_array_equal(seen[-1][1], 1.5)
    batch = method.simulate(
        SimpleNamespace(student=student), context(jnp.zeros((20_000, 1)))
    )
    # four standard errors of 20,000 draws
    assert float(jnp.std(batch["xt"])) == pytest.approx(1.5, rel=0.02)
    np.testing.assert_array_equal(batch["t"], 1.5)


@pytest.mark.parametrize("make", [DiffInstruct, DMD2])
def test_equal_scores_leave_the_student_alone(x64, gaussian, context, make):
    g = gaussian(Flow(), 0.1, 0.5)
    net = nets(g, g)
    ctx = gathered(context, 64)
    grad = jax.grad(
        lambda m: make(match_times=FIXED).match(
            net, ctx, nets(g, g, m).student(ctx.batch["xt"], ctx.batch["t"]).x0
        )[0]
    )(0.0)
    assert grad == 0


def test_descends_to_the_teacher_with_an_exact_fake(x64, gaussian, context):
    """Inner fake exact, outer student by gradient descent: the mean converges exponentially."""
    real = gaussian(Flow(), 0.7, 0.4)
    ctx = gathered(context, 256)
    mean = -0.2
    method = DiffInstruct(match_times=FIXED)
    step = lambda m: jax.grad(
        lambda d: (
            method.student_loss(nets(real, gaussian(Flow(), m, 0.4), d), ctx).loss
        )
    )(0.0)
    rate = float(Flow().alpha_sigma(AT)[1] ** 2 / ((0.4 * 0.4) ** 2 + AT**2))
    gaps = []
    for _ in range(5):
        mean = mean - 0.5 * float(step(mean))
        gaps.append(0.7 - mean)
    np.testing.assert_allclose(
        gaps, 0.9 * (1 - 0.5 * rate) ** np.arange(1, 6), rtol=1e-5
    )


def test_no_gradient_passes_through_the_scores_or_the_noised_sample(
    x64, gaussian, context
):
    """The gradient in x0 is `direction` / numel exactly: nothing comes through x_t."""
    real = gaussian(Flow(), 0.7, 0.4)
    fake = gaussian(Flow(), -0.2, 0.6)
    method = DiffInstruct(match_times=FIXED)
    ctx = gathered(context, 32)
    net = nets(real, fake)
    x0 = jax.random.normal(jax.random.key(0), (32, 1))
    grad = jax.grad(lambda x: method.match(net, ctx, x)[0])(x0)
    xt, t, _ = method.diffuse(x0, FIXED, ctx, "match")
    np.testing.assert_allclose(
        grad, (fake.denoise(xt, t).x0 - real.denoise(xt, t).x0) / 32, rtol=1e-12
    )


def test_the_fake_score_is_the_minimiser_on_the_students_samples(
    x64, gaussian, context
):
    real = gaussian(Flow(), 0.7, 0.4)
    fake = gaussian(Flow(), -0.2, 0.6)
    method = DiffInstruct(fake_times=Uniform(low=0.2, high=0.8))
    ctx = gathered(context, 100_000)

    def loss(w):
        net = nets(real, fake)
        net.fake = lambda x, t, cond=None: Flow().from_x0(
            w[0] * fake.denoise(x, t).x0 + w[1], x, t
        )
        return method.critic_loss(net, ctx).loss

    at = jax.grad(loss)(jnp.array([1.0, 0.0]))
    away = jax.grad(loss)(jnp.array([0.8, 0.2]))
    # sampling noise of 100,000 draws
    assert jnp.all(jnp.abs(at) < 0.05 * jnp.abs(away).max()), (
        at,
        away,
    )


def test_the_critic_does_not_reach_the_student(x64, gaussian, context):
    real = gaussian(Flow(), 0.7, 0.4)
    fake = gaussian(Flow(), -0.2, 0.6)
    grad = jax.grad(
        lambda m: (
            DiffInstruct()
            .critic_loss(nets(real, fake, m), gathered(context, 64))
            .loss
        )
    )(0.0)
    assert grad == 0


@pytest.mark.parametrize(
    "role, field", [("teacher", "guidance"), ("fake", "fake_guidance")]
)
def test_guidance_acts_on_its_own_score(x64, gaussian, context, role, field):
    """Conditional mean 1, null mean 0: guidance w makes the mean of that score w."""
    plain = gaussian(Flow(), 0.0, 0.5)

    def labelled(x, t, cond):
        pred = plain.denoise(x, t)
        return dataclasses.replace(pred, x0=pred.x0 + cond[:, None])

    net = SimpleNamespace(teacher=plain.denoise, fake=plain.denoise)
    setattr(net, role, labelled)
    n = 8
    ctx = gathered(context, n, cond=jnp.ones(n), null_cond=jnp.zeros(n))
    method = DiffInstruct(**{field: 2.5})
    read = method.real if role == "teacher" else method.fake
    xt = jnp.zeros((n, 1))
    t = jnp.full(n, AT)
    np.testing.assert_allclose(
        read(net, xt, t, ctx).x0 - plain.denoise(xt, t).x0, 2.5, rtol=1e-12
    )


def test_condition_dropout_of_the_fake_score(context):
    seen = []

    def fake(x, t, cond):
        seen.append(cond)
        return Flow().from_v(x, x, t, x)

    n = 4000
    ctx = context(jnp.zeros((n, 1)), cond=jnp.ones(n), null_cond=jnp.zeros(n))
    DiffInstruct(fake_dropout=0.1).denoise(
        SimpleNamespace(fake=fake), ctx, jnp.zeros((n, 1))
    )
    assert abs(float(jnp.mean(seen[0] == 0)) - 0.1) < 4 * (0.09 / n) ** 0.5


def test_trains_in_any_process(three_steps):
    three_steps(DiffInstruct(process=Trig()))
