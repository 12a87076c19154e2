"""Flow matching: the posterior mean is the minimiser, in every target; label dropout; sampling
gives the law back.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.diffusion.process import EDM, VP, Flow, expand
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.trajectory.flow_matching import FlowMatching


@pytest.mark.parametrize(
    "process, target",
    [(Flow(), "v"), (Flow(), "x0"), (VP(), "eps"), (VP(), "vp"), (EDM(), "edm")],
)
def test_the_exact_denoiser_is_stationary(x64, gaussian, context, process, target):
    """d loss / d(scale, shift) of a denoiser x0 -> scale x0 + shift is 0 at the posterior mean, up
    to sampling noise.
    """
    g = gaussian(process)
    method = FlowMatching(
        process=process,
        target=target,
        times=Uniform(low=0.3, high=0.9),
        label_dropout=0.0,
    )
    ctx = context(g.draw(200_000, dim=1))

    def loss(w):
        net = lambda x, t, cond: process.from_x0(
            w[0] * g.denoise(x, t).x0 + w[1], x, t
        )
        return method.loss(SimpleNamespace(student=net), ctx).loss

    at = jax.grad(loss)(jnp.array([1.0, 0.0]))
    away = jax.grad(loss)(jnp.array([0.5, 0.5]))
    # the mean of 200,000 draws is exact to about 1 %
    assert jnp.all(jnp.abs(at) < 0.05 * jnp.abs(away).max()), (
        at,
        away,
    )


def test_the_loss_of_the_exact_denoiser_is_the_posterior_variance(
    x64, gaussian, context
):
    """Flow: E|v - v*|^2 = Var[x0 | x_t] / t^2 = s^2 / S_t, S_t = (1 - t)^2 s^2 + t^2."""
    g = gaussian(Flow())
    times = Uniform(low=0.3, high=0.6)
    method = FlowMatching(times=times, label_dropout=0.0)
    loss = method.loss(
        SimpleNamespace(student=g.denoise), context(g.draw(200_000))
    ).loss
    t = np.linspace(0.3, 0.6, 2001)
    expected = np.mean(g.std**2 / ((1 - t) ** 2 * g.std**2 + t**2))
    # 400,000 squares of relative std sqrt(2): 0.22 %
    assert abs(loss / expected - 1) < 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_the_label_is_dropped_that_often(context, dropout):
    seen = []

    def net(x, t, cond):
        seen.append(cond)
        return Flow().from_v(x, x, t, x)

    n = 4000
    batch = {"cond": jnp.ones(n, jnp.int32), "null_cond": jnp.full(n, 7)}
    FlowMatching(label_dropout=dropout).loss(
        SimpleNamespace(student=net), context(jnp.zeros((n, 2)), **batch)
    )
    share = float(jnp.mean(seen[0] == 7))
    assert abs(share - dropout) <= 4 * (dropout * (1 - dropout) / n) ** 0.5


@pytest.mark.parametrize(
    "process", [Flow(), VP(), EDM()], ids=lambda p: type(p).__name__
)
def test_sampling_the_exact_network_gives_the_law(gaussian, process):
    g = gaussian(process)
    noise = jax.random.normal(jax.random.key(0), (20_000, 1))
    x = FlowMatching(process=process, solver="heun").sample(
        g.denoise, noise, None, jax.random.key(1), 60
    )
    # 4 / sqrt(20,000) of std .4, and solver error
    assert (
        abs(float(x.mean()) - g.mean) < 0.02 and abs(float(x.std()) - g.std) < 0.02
    )


def test_trains(three_steps):
    three_steps(FlowMatching())


def test_times_differ_within_a_batch_and_draws_do_not_shift_each_other(
    gaussian, context
):
    """The label's dropout does not change t or eps: with an unconditional network the loss is the
    same.
    """
    g = gaussian(Flow())
    losses = [
        FlowMatching(label_dropout=d)
        .loss(SimpleNamespace(student=g.denoise), context(g.draw(64)))
        .loss
        for d in (0.0, 0.5)
    ]
    assert losses[0] == losses[1]
    t = FlowMatching().times.draw(Flow(), jax.random.key(0), 64)
    assert len(np.unique(t)) == 64 and expand(t, jnp.zeros((64, 2, 2))).shape == (
        64,
        1,
        1,
    )
