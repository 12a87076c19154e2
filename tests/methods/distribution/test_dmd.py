"""DMD: pairs of the teacher's flow, and regression on them beside the gradient that DMD2 has."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.build import resolve
from jaxdistill.diffusion.process import Flow
from jaxdistill.methods.distribution.dmd import DMD, Normalised, PerceptualDMD
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.objectives.pixels import Preprocess
from tests.methods.distribution.gaussians import AT, pulled


def test_dmd_regresses_on_the_teachers_pairs(plain, gaussian, context):
    """The pairs are those of the teacher's flow; the gradient is DMD2's and the squared error's."""
    net, ctx, *_ = plain
    g = gaussian(Flow(), 0.7, 0.4)
    method = DMD(regression_weight=0.5, solver_steps=64, **AT)
    made = method.pairs(net, ctx)
    # Heun's error at 64 steps
    np.testing.assert_allclose(
        made["pair_x"], 0.7 + 0.4 * made["pair_noise"], atol=2e-3
    )
    np.testing.assert_allclose(
        pulled(method, plain), pulled(DMD2(**AT), plain), rtol=1e-12
    )
    net.student = lambda x, t, cond=None: Flow().from_x0(x + 0.1, x, t)
    noise = made["pair_noise"]
    x = made["pair_x"]
    out = method.student_loss(
        net, context(x, pair_noise=noise, pair_x=x, xt=noise, t=jnp.ones(64))
    )
    regression = np.mean((noise + 0.1 - x) ** 2)
    np.testing.assert_allclose(
        out.loss, out.metrics["match"] + 0.5 * regression, rtol=1e-9
    )
    (stage,) = method.stages(10)
    assert stage.collect.batches == method.batches and g.std == 0.4


def test_the_gradient_does_not_depend_on_the_scale_of_the_error(plain):
    """Teacher and fake score twice as far from the sample: the same gradient (eq. 8)."""
    _, ctx, x0, real, fake, _ = plain
    got = pulled(Normalised(**AT), plain)
    np.testing.assert_allclose(got, (fake - real) / np.abs(x0 - real), rtol=1e-10)
    far = lambda value: (
        lambda x, t, cond=None: Flow().from_x0(x0 + 2 * (value - x0), x, t)
    )
    twice = SimpleNamespace(teacher=far(real), fake=far(fake))
    np.testing.assert_allclose(
        pulled(Normalised(**AT), (twice, ctx, x0)), got, rtol=1e-9
    )


def test_pairs_keep_the_batch_and_its_conditions(plain, context):
    net = plain[0]
    cond = jnp.arange(64)
    teacher = lambda x, t, cond: net.teacher(x, t)
    ctx = context(jnp.zeros((64, 1)), cond=cond)
    made = DMD(solver_steps=2, **AT).pairs(SimpleNamespace(teacher=teacher), ctx)
    assert set(made) == {"x", "cond", "pair_noise", "pair_x", "pair_cond"}
    np.testing.assert_array_equal(made["pair_cond"], cond)


def test_regression_by_a_frozen_network(plain, context):
    """`perceptual` sees both pictures preprocessed, here doubled; its distance is the loss."""
    net = plain[0]
    net.student = lambda x, t, cond=None: Flow().from_x0(x, x, t)
    net.perceptual = lambda a, b: jnp.sum(jnp.abs(a - b), -1)
    method = PerceptualDMD(
        preprocess=Preprocess(std=(0.25,)), regression_weight=1.0, **AT
    )
    noise = plain[2]
    batch = dict(
        pair_noise=noise, pair_x=noise - 0.3, xt=noise, t=jnp.ones(len(noise))
    )
    out = method.student_loss(net, context(noise, **batch))
    np.testing.assert_allclose(out.metrics["regression"], 2 * 0.3, rtol=1e-9)
    assert method.frozen == ("teacher", "perceptual")


@pytest.mark.parametrize("make", [DMD, PerceptualDMD])
def test_the_names_in_earlier_configs_are_read(make):
    assert resolve(f"methods.distribution._dmd:{make.__name__}") is make
