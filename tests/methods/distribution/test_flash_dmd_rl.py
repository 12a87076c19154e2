"""Flash-DMD's second stage: pairs, the cycle of its updates, and what both do to a toy."""

import dataclasses
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdistill.core import sharding
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.process import Flow
from jaxdistill.methods.distribution.flash_dmd import FlashDMD
from jaxdistill.methods.distribution.flash_dmd_rl import FlashDMDRL
from jaxdistill.run import loop
from jaxdistill.run.checkpoint import load_params
from jaxdistill.run.experiment import Experiment

N = 16


def nets(theta, reward=lambda x, t, cond: x[:, 0], reference=0.0):
    shifted = lambda by: lambda x, t, cond=None: Flow().from_x0(x / 2 + by, x, t)
    return SimpleNamespace(
        student=shifted(theta), reference=shifted(reference), reward=reward
    )


def explored(method, context, theta=0.0, seed=0, **kw):
    ctx = context(jnp.zeros((N, 2)), seed=seed)
    return dataclasses.replace(ctx, batch=method.explore(nets(theta, **kw), ctx))


def test_the_pair_is_the_best_and_the_worst_of_the_next_states(x64, context):
    """Winner and loser are states at the next time, alpha x0 + sigma eps with fresh noise; with two
    candidates all there are.
    """
    method = FlashDMDRL(candidates=2)
    starts = set()
    for seed in range(6):
        batch = explored(method, context, seed=seed).batch
        at = method.student_times.index(float(batch["t"][0]))
        starts.add(at)
        assert np.all(batch["r"] == method.student_times[at + 1])
        assert (
            np.all(batch["winner"][:, 0] > batch["loser"][:, 0])
            and batch["apart"].all()
        )
        alpha, sigma = Flow().alpha_sigma(batch["r"][0])
        eps = (
            jnp.stack([batch["winner"], batch["loser"]]) - alpha * batch["xt"] / 2
        ) / sigma
        assert (
            abs(float(eps.mean())) < 4 / (4 * N) ** 0.5
            and abs(float(eps.std()) - 1) < 4 / (8 * N) ** 0.5
        )
        np.testing.assert_allclose(
            batch["reward"],
            (batch["winner"] + batch["loser"])[:, 0] / 2,
            rtol=1e-12,
        )
    assert starts == {0, 1}


def test_at_the_reference_the_loss_is_log_two_and_its_slope_that_of_the_closed_form(
    x64, context
):
    method = FlashDMDRL(beta=0.7)
    ctx = explored(method, context)
    loss = lambda theta: (
        (out := method.preference_loss(nets(theta), ctx)).loss / out.count
    )
    np.testing.assert_allclose(loss(0.0), np.log(2), rtol=1e-12)
    alpha, sigma = Flow().alpha_sigma(ctx.batch["r"])
    gap = jnp.sum(ctx.batch["winner"] - ctx.batch["loser"], -1)
    np.testing.assert_allclose(
        jax.grad(loss)(0.0), -0.7 / 2 * jnp.mean(alpha * gap / sigma**2), rtol=1e-12
    )
    mean = FlashDMDRL(beta=0.7, margin="mean")
    slope = jax.grad(
        lambda theta: (
            (out := mean.preference_loss(nets(theta), ctx)).loss / out.count
        )
    )(0.0)
    np.testing.assert_allclose(
        slope, -0.7 / 2 * jnp.mean(alpha * gap) / 2, rtol=1e-12
    )


def test_ties_are_left_out(x64, context):
    """Half of the pairs have equal rewards: loss and count are those of the other half; with none
    left both are 0.
    """
    method = FlashDMDRL()
    upper = jnp.arange(N) < N // 2
    some = explored(
        method, context, reward=lambda x, t, cond: jnp.where(upper, x[:, 0], 1.0)
    )
    every = explored(method, context)
    out, full = (method.preference_loss(nets(0.3), ctx) for ctx in (some, every))
    half = dataclasses.replace(
        every, batch={k: v[: N // 2] for k, v in every.batch.items()}
    )
    np.testing.assert_allclose(
        out.loss, method.preference_loss(nets(0.3), half).loss, rtol=1e-12
    )
    assert out.count == N // 2 and full.count == N
    none = method.preference_loss(
        nets(0.3), explored(method, context, reward=lambda x, t, cond: jnp.ones(N))
    )
    assert none.loss == 0 and none.count == 0


def test_only_the_student_is_trained_by_preferences(x64, context):
    ctx = explored(FlashDMDRL(), context)
    loss = lambda theta, reference: (
        FlashDMDRL().preference_loss(nets(theta, reference=reference), ctx).loss
    )
    student, reference = jax.grad(loss, argnums=(0, 1))(0.0, 0.0)
    assert abs(student) > 1e-3 and reference == 0


@pytest.mark.parametrize("ttur", [1, 2])
def test_five_preference_updates_to_one_of_distillation(ttur):
    method = FlashDMDRL(critic_steps=ttur)
    fake, disc, student, explore = method.turns
    at = lambda turn: [
        i % (5 + ttur) for i in range(3 * (5 + ttur)) if turn.when(i)
    ]
    assert (
        at(explore) == 3 * [0, 1, 2, 3, 4]
        and explore.moves == ("student",)
        and explore.after is None
    )
    assert at(disc) == at(student) == 3 * [5] and student.after is not None
    assert at(fake) == 3 * list(range(5, 5 + ttur))


def test_stages_share_the_steps():
    first, joint = FlashDMDRL(gan_weight=0.25, rl_share=2 / 3).stages(300)
    assert (first.steps, joint.steps) == (100, 200) and first.surgery is None
    assert (
        type(first.method) is FlashDMD
        and first.method.gan_weight == 0.25
        and "reference" not in first.method.frozen
    )


def test_explorations_that_leave_the_chain_are_refused():
    with pytest.raises(Refused, match=r"method.explore_steps=.*from 0 to 2"):
        FlashDMDRL(explore_steps=(3,))
    with pytest.raises(Refused, match=r"method.margin='sums': did you mean 'sum'"):
        FlashDMDRL(margin="sums")


def small(steps=12):
    config = importlib.import_module("configs.toy.flash_dmd_rl").get_config()
    with config.unlocked():
        config.claim = ConfigDict()
    config.steps = steps
    config.runs.start.steps = 3
    config.evaluation.samples = 200
    config.tensorboard = False
    config.data.batch_size = 8
    config.runs.start.data.batch_size = 8
    return config


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A short run of both stages."""
    workdir = tmp_path_factory.mktemp("flash") / "run"
    return workdir, loop.run(small(), workdir, progress=False)


@pytest.mark.full
def test_the_reference_is_the_first_stages_student(ran):
    workdir, report = ran
    assert [row["name"] for row in report["models"]] == ["teacher", "student"]
    trained = loop.load(workdir)
    experiment = trained.experiment
    with sharding.use(experiment.mesh, experiment.settings.rules):
        shapes = {"student": trained.nets["student"].shapes}
        first, last = (
            load_params(workdir / "stages" / str(i), shapes)["student"]
            for i in (0, 1)
        )
    equal = lambda a, b: all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert (
        equal(trained.params["reference"], first)
        and equal(trained.params["student"], last)
        and not equal(first, last)
    )


def test_random_weights_of_a_frozen_role_follow_the_seed(tmp_path):
    """Equal in every run of a seed, others under another seed; a network without weights needs
    none.
    """

    def drawn(seed):
        config = small()
        config.seed = seed
        experiment = Experiment(config, tmp_path)
        assert (
            experiment._load("decoder") == {} and experiment._load("reward") == {}
        )
        return jax.device_get(experiment._load("features"))

    one = drawn(0)
    again = drawn(0)
    other = drawn(1)
    for a, b, c in zip(
        *(jax.tree.leaves(w) for w in (one, again, other)), strict=True
    ):
        assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_frozen_role_without_weights_is_still_refused(tmp_path):
    config = small()
    config.roles.features.init = ""
    with pytest.raises(
        Refused, match=r"roles.features.init is empty: .* or random"
    ):
        Experiment(config, tmp_path)._load("features")
