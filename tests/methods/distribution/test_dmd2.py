"""DMD2: normalised gradient, the GAN as an extra term, back-simulation of a few-step student."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import Flow
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import Discriminator
from jaxdistill.objectives import score
from tools.first_steps import first_steps

STEPS = (0.999, 0.749, 0.499, 0.249)


def constant(x0):
    """A student that says x0 + t, whatever it sees, so that its chain can be followed by hand."""
    return lambda x, t, cond=None: Flow().from_x0(
        jnp.full_like(x, x0) + t[:, None], x, t
    )


def test_gradient_is_normalised_per_sample(x64, gaussian):
    """DMD, eq. 8: (D_psi - D_phi) / mean |x - D_phi|, invariant to the scale of the data."""
    rng = np.random.default_rng(0)
    x0, real, fake = (jnp.asarray(rng.standard_normal((3, 4))) for _ in range(3))
    pred = lambda v: SimpleNamespace(x0=v)
    direct = DMD2().direction(x0, pred(real), pred(fake), None)
    np.testing.assert_allclose(
        direct, (fake - real) / np.abs(x0 - real).mean(1, keepdims=True), rtol=1e-12
    )
    np.testing.assert_allclose(
        DMD2().direction(5 * x0, pred(5 * real), pred(5 * fake), None),
        direct,
        rtol=1e-12,
    )


@pytest.mark.parametrize("index", range(len(STEPS)))
def test_back_simulation_follows_the_sampler(context, index):
    """The state at step i is the i-th of the student's own renoising chain, with gradient through
    the last call only.
    """
    method = DMD2(student_times=STEPS)
    n = 64
    ctx = next(
        c
        for c in (context(jnp.zeros((n, 2)), seed=s) for s in range(100))
        if jax.random.randint(c.key("index"), (), 0, 4) == index
    )
    batch = method.simulate(SimpleNamespace(student=constant(2.0)), ctx)
    assert np.all(batch["t"] == np.float32(STEPS[index]))
    if index == 0:
        np.testing.assert_array_equal(
            batch["xt"], Flow().start(jax.random.normal(ctx.key("noise"), (n, 2)))
        )
    else:
        x0 = 2.0 + STEPS[index - 1]  # what the student said one step before
        noise = (batch["xt"] - (1 - STEPS[index]) * x0) / STEPS[index]
        assert (
            abs(float(noise.mean())) < 4 / 128**0.5
            and abs(float(noise.std()) - 1) < 4 / 256**0.5
        )


def test_every_step_of_the_chain_is_drawn_alike(context):
    method = DMD2(student_times=STEPS)
    net = SimpleNamespace(student=constant(0.0))
    at = context(jnp.zeros((1, 2)))
    draw = jax.jit(
        lambda key: method.simulate(net, dataclasses.replace(at, rng=key))["t"][0]
    )
    drawn = [float(draw(key)) for key in jax.random.split(jax.random.key(0), 200)]
    shares = [np.mean(np.isclose(drawn, t)) for t in STEPS]
    assert all(abs(s - 0.25) < 4 * (0.25 * 0.75 / 200) ** 0.5 for s in shares), (
        shares
    )


def test_sampling_uses_the_same_chain_and_refuses_more_steps():
    method = DMD2(student_times=STEPS)
    noise = jnp.zeros((2, 2))
    for steps in range(1, 5):
        x = method.sample(constant(1.0), noise, None, jax.random.key(0), steps)
        np.testing.assert_allclose(x, 1 + STEPS[steps - 1], rtol=1e-6)
    with pytest.raises(Refused, match="steps=5: expected 1 to 4"):
        method.sample(constant(1.0), noise, None, jax.random.key(0), 5)


@pytest.fixture(scope="module")
def trained():
    """Weights and losses of the first five steps, by method."""
    wrap = functools.partial(Denoiser().wrap, process=Flow())
    mlp = make_net(MLP(width=8, depth=2), wrap=wrap)
    disc = make_net(Discriminator(taps=1, dim=8, width=8))
    batch = {"x": jax.random.normal(jax.random.key(0), (16, 2))}

    def run(method):
        nets = {
            role: disc if role == "disc" else mlp
            for role in (*method.inits, *method.frozen)
        }
        start = {"teacher": mlp.init(jax.random.key(7))}
        start["teacher"] = jax.tree.map(lambda w: w + 0.05, start["teacher"])
        # every network starts from the teacher but the fake score, so that the student has a
        # gradient from the first step
        start["fake"] = mlp.init(jax.random.key(8))
        states, losses = first_steps(method, nets, optax.sgd(1e-2), start, batch)
        return states[-1].params, losses

    return run


@pytest.mark.full
def test_without_the_gan_it_follows_its_host(trained):
    """Both weights 0: student and fake score are those of Diff-Instruct with DMD's normaliser, draw
    for draw.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Normalised(DiffInstruct):
        def direction(self, x0, real, fake, t):
            return score.dmd_gradient(x0, real.x0, fake.x0)

    settings = dict(critic_steps=2, student_times=STEPS)
    (ours, losses), (host, others) = (
        trained(DMD2(gan_weight=0.0, disc_weight=0.0, **settings)),
        trained(Normalised(**settings)),
    )
    for role in ("student", "fake"):
        for a, b in zip(
            jax.tree.leaves(ours[role]), jax.tree.leaves(host[role]), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(losses, others, strict=True):
        np.testing.assert_allclose(
            mine["fake/denoise"], theirs["fake/denoise"], rtol=1e-6
        )
        if "student/match" in theirs:
            np.testing.assert_allclose(
                mine["student/match"], theirs["student/match"], rtol=1e-6
            )


@pytest.mark.full
def test_the_gan_moves_the_student(trained):
    (with_gan, _), (without, _) = (
        trained(DMD2(gan_weight=w, critic_steps=2)) for w in (1.0, 0.0)
    )
    gap = max(
        np.abs(a - b).max()
        for a, b in zip(
            jax.tree.leaves(with_gan["student"]),
            jax.tree.leaves(without["student"]),
            strict=True,
        )
    )
    assert gap > 1e-4


def test_turns_and_their_steps():
    critics, student = DMD2(critic_steps=5).turns
    assert critics.moves == ("fake", "disc") and student.moves == ("student",)
    assert [i for i in range(12) if student.when(i)] == [0, 5, 10] and all(
        critics.when(i) for i in range(12)
    )
