"""Flash-DMD: which call each loss trains, the fake score's own training, and DMD2 as the neutral
setting.
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
from jaxdistill.core.types import Out, Refused, Turn
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import Flow
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.flash_dmd import FlashDMD
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import Discriminator, Heads
from jaxdistill.models.vision.judges import Identity, PointFeatures
from tools.first_steps import first_steps

STEPS = (0.999, 0.749, 0.499, 0.249)
N = 32


def stepwise(p):
    """A student with a parameter for each step: x0 = x_t / 2 + p[step]."""
    times = jnp.array(STEPS)
    return lambda x, t, cond=None: Flow().from_x0(
        x / 2 + p[jnp.argmin(jnp.abs(t[:, None] - times), 1)][:, None], x, t
    )


def decoder(x, method):
    return {"denormalise": lambda x: x / 2, "decode": jnp.sin}[method](x)


@pytest.fixture
def nets(gaussian):
    """A stepwise student under exact scores, and a discriminator of two heads, as functions of
    their weights.
    """
    real = gaussian(Flow(), 0.7, 0.4)
    fake = gaussian(Flow(), -0.2, 0.6)
    features = lambda x, taps: (
        x,
        tuple(jnp.sin((i + 1) * x)[:, None] for i in taps),
    )

    def make(p=jnp.zeros(4), heads=jnp.ones(2), shift=0.0):
        disc = lambda features: jnp.stack(
            [jnp.sum(f, (1, 2)) * h for f, h in zip(features, heads)], -1
        )
        moved = lambda x, t, cond=None: (
            (pred := fake.denoise(x, t))
            and dataclasses.replace(
                pred, x0=pred.x0 + shift, eps=pred.eps - shift, v=pred.v + shift
            )
        )
        return SimpleNamespace(
            student=stepwise(p),
            teacher=real.denoise,
            fake=moved,
            decoder=decoder,
            features=features,
            disc=disc,
        )

    return make


def gather(method, net, ctx):
    return dataclasses.replace(ctx, batch=method.rollout(net, ctx))


@pytest.mark.parametrize("term, own", [("match", (0, 1)), ("gan", (2, 3))])
def test_each_loss_trains_its_own_steps(x64, nets, context, term, own):
    """The gradient in the parameter of a step, against finite differences, over draws that reach
    every step.
    """
    method = FlashDMD(
        taps=(0, 1), match_weight=term == "match", gan_weight=term == "gan"
    )
    base = context(jnp.zeros((N, 2)))
    at = lambda key, batch: dataclasses.replace(base, rng=key, batch=batch)
    rollout = jax.jit(lambda key, p: method.rollout(nets(p), at(key, base.batch)))
    loss = jax.jit(
        lambda p, key, batch: method.student_loss(nets(p), at(key, batch)).loss
    )
    slope = jax.jit(jax.grad(loss))
    p = jnp.array([0.1, -0.2, 0.3, 0.05])
    total = np.zeros(4)
    for seed in range(6):
        key = jax.random.key(seed)
        batch = rollout(key, p)
        got = np.asarray(slope(p, key, batch))
        if (
            term == "gan"
        ):  # the other loss is a surrogate, whose value is not its integral
            difference = [
                (loss(p + h, key, batch) - loss(p - h, key, batch)) / 2e-5
                for h in 1e-5 * jnp.eye(4)
            ]
            np.testing.assert_allclose(got, difference, atol=1e-9)
        total += np.abs(got)
    assert all((total[i] > 1e-3) == (i in own) for i in range(4)), total
    assert all(total[i] == 0 for i in range(4) if i not in own), total


def test_the_states_of_both_calls(x64, nets, context):
    """x_t is a state of the student's chain at a noisy step; x_low the end of that chain, noised to
    a clean step.
    """
    method = FlashDMD()
    seen = set()
    low = set()
    ctx = context(jnp.zeros((2000, 2)))
    rollout = jax.jit(
        lambda key: method.rollout(nets(), dataclasses.replace(ctx, rng=key))
    )
    for seed in range(8):
        batch = rollout(jax.random.key(seed))
        seen |= set(np.asarray(batch["t"]).tolist())
        low |= set(np.asarray(batch["t_low"]).tolist())
        assert len(set(np.asarray(batch["t"]).tolist())) == 1
    assert seen == set(STEPS[:2]) and low == set(STEPS[2:])
    var = 1.0  # of the chain's states: noise, and under x0 = x_t / 2 re-noised
    for t in STEPS[1:]:
        var = ((1 - t) / 2) ** 2 * var + t**2
    for t in STEPS[2:]:
        rows = np.asarray(batch["t_low"] == t)
        got = np.asarray(batch["x_low"])[rows].var()
        np.testing.assert_allclose(
            got, (1 - t) ** 2 * var / 4 + t**2, rtol=5 * (2 / rows.sum() / 2) ** 0.5
        )


def test_nothing_reaches_the_student_through_its_chain(x64, nets, context):
    """The chain is gathered: what the clean call starts from is a constant, and decoder and
    features pass the gradient on.
    """
    method = FlashDMD(taps=(0,), match_weight=0.0, gan_weight=1.0)
    ctx = gather(method, nets(), context(jnp.zeros((N, 2))))
    got = jax.grad(lambda p: method.student_loss(nets(p), ctx).loss)(jnp.zeros(4))
    x0 = ctx.batch["x_low"] / 2
    image = jnp.sin(x0 / 2)
    logit = jnp.sum(jnp.sin(image), -1)
    by_hand = (
        -jax.nn.sigmoid(-logit)
        * jnp.sum(jnp.cos(image) * jnp.cos(x0 / 2) / 2, -1)
        / N
    )
    for i, t in enumerate(STEPS):
        np.testing.assert_allclose(
            got[i],
            jnp.sum(jnp.where(ctx.batch["t_low"] == t, by_hand, 0.0)),
            atol=1e-12,
        )


def test_fake_loss_trains_the_fake_score_alone(x64, nets, context):
    method = FlashDMD()
    ctx = context(jnp.zeros((N, 2)))
    ctx = dataclasses.replace(ctx, batch=method.simulate(nets(), ctx))
    loss = lambda p, heads, shift: (
        method.critic_loss(nets(p, heads, shift), ctx).loss
    )
    student, heads, fake = jax.grad(loss, argnums=(0, 1, 2))(
        jnp.zeros(4), jnp.ones(2), 0.0
    )
    assert not student.any() and not heads.any() and abs(fake) > 1e-3


def test_discriminator_loss_trains_the_heads_alone(x64, nets, context):
    method = FlashDMD(taps=(0, 1))
    ctx = gather(method, nets(), context(jnp.ones((N, 2))))
    loss = lambda p, heads: method.disc_loss(nets(p, heads), ctx).loss
    student, heads = jax.grad(loss, argnums=(0, 1))(jnp.zeros(4), jnp.ones(2))
    assert not student.any() and np.all(np.abs(heads) > 1e-4)
    # D = 1/2 everywhere
    np.testing.assert_allclose(
        loss(jnp.zeros(4), jnp.zeros(2)), 2 * np.log(2), rtol=1e-12
    )


def test_real_images_are_their_own_where_the_data_has_them(x64, nets, context):
    method = FlashDMD(taps=(0,), match_weight=0.0)
    plain = gather(method, nets(), context(jnp.full((N, 2), 0.3)))
    beside = dataclasses.replace(
        plain,
        batch={
            **plain.batch,
            "x": jnp.zeros((N, 2)),
            "image": jnp.full((N, 2), 0.3),
        },
    )
    assert (
        method.disc_loss(nets(), plain).loss
        == method.disc_loss(nets(), beside).loss
    )


def test_equal_scores_leave_the_student_alone(x64, nets, context):
    method = FlashDMD(taps=(0,), gan_weight=0.0)
    ctx = gather(method, nets(), context(jnp.zeros((N, 2))))

    def loss(p):
        net = nets(p)
        net.fake = net.teacher
        return method.student_loss(net, ctx).loss

    assert not jax.grad(loss)(jnp.zeros(4)).any()


@pytest.mark.parametrize("lam", [1.0, 0.0, 0.9])
def test_injection(x64, lam):
    """n updates on a fixed theta leave psi - theta = lam^n (psi_0 - theta): at 1 nothing moves, at
    0 theta is copied.
    """
    rng = np.random.default_rng(0)
    psi, theta = (
        {"a": {"kernel": jnp.asarray(rng.standard_normal((3, 2)))}}
        for _ in range(2)
    )
    now = psi
    method = FlashDMD(injection=lam)
    for n in range(1, 6):
        now = method.inject({"fake": now, "student": theta}, jnp.int32(n))["fake"]
        want = theta["a"]["kernel"] + lam**n * (
            psi["a"]["kernel"] - theta["a"]["kernel"]
        )
        np.testing.assert_allclose(
            now["a"]["kernel"], want, rtol=0 if lam in (0, 1) else 1e-13, atol=1e-15
        )
    with pytest.raises(Refused, match="same model"):
        method.inject(
            {"fake": {"a": {"kernel": jnp.zeros((2, 2))}}, "student": theta},
            jnp.int32(0),
        )


def test_turns_and_their_steps():
    fake, disc, student = FlashDMD(critic_steps=2).turns
    assert (fake.moves, disc.moves, student.moves) == (
        ("fake",),
        ("disc",),
        ("student",),
    )
    at = lambda turn: [i for i in range(5) if turn.when(i)]
    assert at(fake) == [0, 1, 2, 3, 4] and at(disc) == at(student) == [0, 2, 4]
    assert student.after is not None and fake.after is None and disc.after is None


def test_steps_outside_the_chain_are_refused():
    with pytest.raises(Refused, match=r"method.gan_steps=.*from 0 to 3"):
        FlashDMD(gan_steps=(2, 4))
    with pytest.raises(Refused, match=r"method.match_steps"):
        FlashDMD(match_steps=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neutral(FlashDMD):
    """Both losses at every step on one x0, no injection, and the head on the fake score's features
    of a noised sample.
    """

    match_steps: tuple[int, ...] = (0, 1, 2, 3)
    injection: float = 1.0
    taps: tuple[int, ...] = (1,)
    disc_weight: float = 0.5

    frozen = ("teacher", "decoder")

    @property
    def turns(self):
        return (
            Turn(("fake", "disc"), self.both_critics, gather=self.simulate),
            super().turns[2],
        )

    def both_critics(self, net, ctx):
        return Out(
            self.critic_loss(net, ctx).loss
            + self.disc_weight * self.disc_loss(net, ctx).loss
        )

    def refine(self, net, ctx):
        return self.generate(net, ctx)

    def logits(self, net, image, ctx):
        xt, t, _ = self.diffuse(
            image,
            self.match_times,
            ctx,
            "real" if image is ctx.batch["x"] else "match",
        )
        return net.disc(net.fake(xt, t, None, taps=self.taps).features, t, None)


@pytest.fixture(scope="module")
def trained():
    """Weights and losses of the first six steps."""
    wrap = functools.partial(Denoiser().wrap, process=Flow())
    mlp = make_net(MLP(width=8, depth=2), wrap=wrap)
    batch = {"x": jax.random.normal(jax.random.key(0), (16, 2))}

    def run(method, disc, steps=6, tx=optax.sgd(1e-2)):
        other = {
            "disc": make_net(disc),
            "decoder": make_net(Identity()),
            "features": make_net(PointFeatures(width=8)),
        }
        nets = {
            role: other.get(role, mlp) for role in (*method.inits, *method.frozen)
        }
        start = {role: nets[role].init(jax.random.key(7)) for role in method.frozen}
        start["teacher"] = jax.tree.map(lambda w: w + 0.05, start["teacher"])
        start["fake"] = mlp.init(jax.random.key(8))
        states, losses = first_steps(method, nets, tx, start, batch, steps)
        return states[0], states[-1], losses

    return run


def close(a, b, atol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=atol)


@pytest.mark.full
def test_the_neutral_setting_is_dmd2(trained):
    settings = dict(
        student_times=STEPS, critic_steps=5, gan_weight=0.5, disc_weight=0.5
    )
    disc = Discriminator(dim=8, width=8)
    (_, ours, losses), (_, host, others) = (
        trained(Neutral(**settings), disc),
        trained(DMD2(**settings), disc),
    )
    for role in ("student", "fake", "disc"):
        close(ours.params[role], host.params[role], 1e-6)
    for mine, theirs in zip(losses, others, strict=True):
        np.testing.assert_allclose(
            mine["fake/loss"], theirs["fake/loss"], rtol=1e-6
        )
    for i in (0, 5):
        for name in ("student/match", "student/gan"):
            np.testing.assert_allclose(losses[i][name], others[i][name], rtol=1e-6)


@pytest.mark.full
def test_injection_follows_the_students_update(trained):
    """With a fake score that does not move by itself it is the mean of its old weights and the
    student's new ones.
    """
    method = FlashDMD(injection=0.9)
    before, after, _ = trained(
        method, Heads(dims=(8, 8, 8), width=8), steps=1, tx=optax.sgd(0.0)
    )
    want = jax.tree.map(
        lambda psi, theta: 0.9 * psi + 0.1 * theta,
        before.params["fake"],
        after.params["student"],
    )
    close(after.params["fake"], want, 1e-7)


def test_frozen_networks_get_no_updates_and_the_rest_moves(trained):
    before, after, losses = trained(
        FlashDMD(), Heads(dims=(8, 8, 8), width=8), steps=2
    )
    close(before.frozen, after.frozen, 0)
    assert jax.tree.leaves(before.frozen["features"])
    for role in ("student", "fake", "disc"):
        assert any(
            not np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(before.params[role]),
                jax.tree.leaves(after.params[role]),
            )
        )
    assert all(np.isfinite(v) for loss in losses for v in loss.values())
