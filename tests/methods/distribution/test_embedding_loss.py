"""Embedding loss: its hosts unchanged at weight 0, its weight from two gradient norms, its networks
and batches.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core import build
from jaxdistill.core.net import make_net
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import Flow
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.embedding_loss import EmbeddingLoss
from jaxdistill.methods.trajectory.consistency import Consistency
from jaxdistill.methods.trajectory.reflow import Reflow
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import Discriminator
from tools.first_steps import first_steps

HOSTS = {
    "diff_instruct": DiffInstruct(critic_steps=2),
    "dmd2": DMD2(critic_steps=1),
    "consistency": Consistency(levels=5),
}
POINTS = dict(archs=("mlp",), nets=1)


@pytest.fixture(scope="module")
def trained():
    """State and metrics of the first six steps, by method."""
    mlp = make_net(
        MLP(width=8, depth=2),
        wrap=functools.partial(Denoiser().wrap, process=Flow()),
    )
    disc = make_net(Discriminator(taps=1, dim=8, width=8))
    batch = {"x": jax.random.normal(jax.random.key(0), (16, 2)) + 1.0}

    @functools.cache
    def run(method):
        nets = {
            role: disc if role == "disc" else mlp
            for role in (*method.inits, *method.frozen)
        }
        start = {
            "teacher": jax.tree.map(
                lambda w: w + 0.05, mlp.init(jax.random.key(7))
            ),
            "fake": mlp.init(jax.random.key(8)),
        }
        states, rows = first_steps(method, nets, optax.sgd(1e-2), start, batch, 6)
        return states[-1], rows

    return run


@pytest.mark.full
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_weight_zero_is_the_host(trained, host):
    (ours, rows), (alone, others) = (
        trained(EmbeddingLoss(host=host, weight=0.0, **POINTS)),
        trained(host),
    )
    for role in alone.params:
        for a, b in zip(
            jax.tree.leaves(ours.params[role]),
            jax.tree.leaves(alone.params[role]),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    for mine, theirs in zip(rows, others, strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(
                mine[name], value, rtol=2e-5, atol=1e-7, err_msg=name
            )


@pytest.mark.full
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_calibrates_without_the_loss_and_moves_the_student_after(trained, host):
    ours, rows = trained(EmbeddingLoss(host=host, calibration=2, **POINTS))
    others = trained(host)[1]
    student = [i for i, row in enumerate(others) if "student/loss" in row]
    for i in student[:2]:
        np.testing.assert_allclose(
            rows[i]["student/grad_norm"], others[i]["student/grad_norm"], rtol=2e-5
        )
        assert rows[i]["measured/host"] > 0 and rows[i]["measured/embedding"] > 0
    assert "measured/host" not in rows[student[2]]
    assert (
        abs(
            rows[student[2]]["student/grad_norm"]
            / others[student[2]]["student/grad_norm"]
            - 1
        )
        > 1e-3
    )
    sums = ours.memory["embedding_norms"]
    np.testing.assert_allclose(
        sums[0], sum(rows[i]["measured/host"] for i in student[:2]), rtol=1e-5
    )
    assert sums[2] == 2


def networks(x0_gap=0.3):
    """A student x_t -> x_t + shift, with constant scores `x0_gap` apart."""
    say = lambda x0, x, t: Flow().from_x0(x0, x, t)
    return SimpleNamespace(
        student=lambda x, t, cond=None: say(x, x, t),
        teacher=lambda x, t, cond=None: say(jnp.zeros_like(x), x, t),
        fake=lambda x, t, cond=None: say(jnp.full_like(x, x0_gap), x, t),
    )


def gathered(context, method, n=32, **batch):
    ctx = context(jax.random.normal(jax.random.key(2), (n, 2)) * 2, **batch)
    ctx = dataclasses.replace(ctx, memory=method.memory(), step=jnp.asarray(100))
    return dataclasses.replace(ctx, batch=method.turns[1].gather(networks(), ctx))


def test_norms_are_those_of_the_gradients_in_the_samples(context):
    """Diff-Instruct's is .3 / numel everywhere; the weight makes the loss's own .3 of it."""
    method = EmbeddingLoss(host=DiffInstruct(), **POINTS)
    ctx = gathered(context, method)
    net = networks()
    assert [turn.moves for turn in method.turns] == [("fake",), ("student",), ()]
    out = method.turns[2].loss(net, ctx)
    np.testing.assert_allclose(out.metrics["host"], 0.3 / 64**0.5, rtol=1e-5)
    later = dataclasses.replace(ctx, memory={**ctx.memory, **out.memory})

    def moved(method, ctx):
        def loss(move):
            shifted = SimpleNamespace(
                **{
                    **vars(net),
                    "student": lambda x, t, cond=None: Flow().from_x0(
                        x + move, x, t
                    ),
                }
            )
            return method.turns[1].loss(shifted, ctx).loss

        return jax.grad(loss)(jnp.zeros((32, 2)))

    added = moved(method, later) - moved(
        dataclasses.replace(method, weight=0.0), later
    )
    np.testing.assert_allclose(
        jnp.linalg.norm(added), 0.3 * out.metrics["host"], rtol=1e-4
    )
    early = dataclasses.replace(later, step=jnp.asarray(9))
    np.testing.assert_allclose(moved(method, early), 0.3 / 64, rtol=1e-5)
    absolute = moved(
        dataclasses.replace(method, calibration=0, weight=2.0), later
    ) - moved(dataclasses.replace(method, weight=0.0), later)
    np.testing.assert_allclose(
        jnp.linalg.norm(absolute), 2.0 * out.metrics["embedding"], rtol=1e-4
    )


def test_logged_value_is_a_mean_when_the_host_counts(context):
    """A host that returns sums and a count has the embedding loss in its metrics as a sum, too."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Counting(DiffInstruct):
        def student_loss(self, net, ctx):
            out = super().student_loss(net, ctx)
            return out._replace(loss=4.0 * out.loss, count=jnp.float32(4.0))

    mean = EmbeddingLoss(host=DiffInstruct(), calibration=0, **POINTS)
    ctx = gathered(context, mean)
    expected = mean.turns[1].loss(networks(), ctx)
    summed = (
        dataclasses.replace(mean, host=Counting()).turns[1].loss(networks(), ctx)
    )
    np.testing.assert_allclose(summed.loss / summed.count, expected.loss, rtol=1e-6)
    logged = summed.metrics["embedding"] / summed.count
    np.testing.assert_allclose(logged, expected.metrics["embedding"], rtol=1e-6)


def test_real_samples_get_no_gradient(context):
    method = EmbeddingLoss(host=DiffInstruct(), **POINTS)
    ctx = gathered(context, method)
    psi = method.draw_networks(ctx)[0]
    at = lambda real: dataclasses.replace(ctx, batch={**ctx.batch, "real_x": real})
    grad = jax.grad(
        lambda real: method.embedding_loss(psi, at(real), ctx.batch["xt"])
    )(ctx.batch["real_x"])
    np.testing.assert_array_equal(grad, 0.0)


def test_networks_are_redrawn_every_so_many_updates(context):
    method = EmbeddingLoss(host=DiffInstruct(), redraw=3, **POINTS)
    memory = method.memory()
    keys = []
    for seed in range(7):
        ctx = dataclasses.replace(
            context(jnp.zeros((2, 2)), seed=seed), memory=memory
        )
        key, own = method.draw_networks(ctx)
        memory = {**memory, **own}
        keys.append(tuple(np.asarray(key).tolist()))
    assert (
        keys[0]
        == keys[1]
        == keys[2]
        != keys[3]
        == keys[4]
        == keys[5]
        != keys[6]
        != keys[0]
    )


def test_more_real_samples_than_generated_ones(context):
    method = EmbeddingLoss(host=DiffInstruct(), real_per_fake=4, **POINTS)
    ctx = gathered(context, method)
    assert (
        ctx.batch["xt"].shape == (8, 2)
        and ctx.batch["x"].shape == (8, 2)
        and ctx.batch["real_x"].shape == (32, 2)
    )
    assert np.isfinite(method.turns[1].loss(networks(), ctx).loss)


def test_labels_join(context):
    """Samples of one distribution under the wrong labels: 0 unlabelled, above 0 labelled."""
    label = jnp.arange(32) % 2
    method = EmbeddingLoss(
        host=DiffInstruct(), labelled=True, estimator="v", **POINTS
    )
    ctx = gathered(context, method, cond=label)
    x = jnp.where(label == 0, -1.0, 1.0)[:, None] * jnp.ones((32, 2))
    ctx = dataclasses.replace(
        ctx, batch={**ctx.batch, "real_x": x, "real_cond": label}
    )
    psi = method.draw_networks(ctx)[0]
    assert method.embedding_loss(psi, ctx, -x) > 1e-2
    assert (
        abs(
            dataclasses.replace(method, labelled=False).embedding_loss(psi, ctx, -x)
        )
        < 1e-6
    )
    assert abs(method.embedding_loss(psi, ctx, x)) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize(
    ("kernel", "estimator", "blocks"), [("rbf", "u", 2), ("linear", "v", 1)]
)
def test_images_through_every_kind_of_network(context, kernel, estimator, blocks):
    method = EmbeddingLoss(
        host=DiffInstruct(),
        archs=("plain-2", "convnet-2"),
        nets=2,
        kernel=kernel,
        estimator=estimator,
        blocks=blocks,
    )
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    ctx = dataclasses.replace(
        context(x), memory=method.memory(), batch={"x": x, "real_x": x}
    )
    value = jax.jit(
        lambda x0: jax.value_and_grad(
            lambda x0: method.embedding_loss(method.draw_networks(ctx)[0], ctx, x0)
        )(x0)
    )
    at_real, grad = value(x)
    assert np.all(np.isfinite(grad))
    if estimator == "v":
        np.testing.assert_allclose(at_real, 0.0, atol=1e-6)
        np.testing.assert_allclose(grad, 0.0, atol=1e-6)
    assert value(x + 1.0)[0] > at_real


def test_everything_else_is_the_hosts():
    host = Reflow(rounds=2, batches=3)
    method = EmbeddingLoss(host=host, **POINTS)
    first, second = method.stages(10)
    assert (
        isinstance(first.method, EmbeddingLoss)
        and first.method.host is host
        and second.collect.batches == 3
    )
    assert (method.inits, method.frozen, method.ema, method.process) == (
        host.inits,
        host.frozen,
        host.ema,
        host.process,
    )
    net = SimpleNamespace(student=len)
    assert (
        method.generator(net) is len
        and method.controller() is None
        and method.exported(1, {}) == (1, {})
    )
    np.testing.assert_array_equal(
        EmbeddingLoss(host=DMD2(student_times=(0.9, 0.4))).sampling_times(1),
        jnp.array([0.9]),
    )


def test_a_config_names_its_host():
    name = "methods.distribution.embedding_loss:EmbeddingLoss"
    config = build.spec(
        name,
        host=DiffInstruct(critic_steps=3),
        weight=0.1,
    )
    assert build.build(config) == EmbeddingLoss(
        host=DiffInstruct(critic_steps=3), weight=0.1
    )
