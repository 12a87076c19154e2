"""Networks of Gaussians on rectified flow, with what the losses of one-step methods read."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxdistill.diffusion.process import Flow
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct


@pytest.fixture
def plain(x64, gaussian, context):
    """(nets, ctx, x0, x_t, t) on rectified flow at t = .6, with gradients of `match` to look at."""
    real = gaussian(Flow(), 0.7, 0.4)
    fake = gaussian(Flow(), -0.2, 0.6)
    x0 = jax.random.normal(jax.random.key(0), (64, 1))
    net = SimpleNamespace(
        teacher=real.denoise,
        fake=lambda x, t, cond=None, taps=(): dataclasses.replace(
            fake.denoise(x, t), features=(x,)
        ),
    )
    net.disc = lambda features, t, cond: 2 * features[0][:, 0]
    net.reward = lambda x, t, cond: jnp.sin(x).sum(1)
    ctx = context(jnp.zeros((64, 1)), ref=x0 + 1.0, measured=x0 - 0.5)
    xt, t, _ = DiffInstruct(match_times=Uniform(low=0.6, high=0.6)).diffuse(
        x0, Uniform(low=0.6, high=0.6), ctx, "match"
    )
    return net, ctx, x0, real.denoise(xt, t).x0, fake.denoise(xt, t).x0, xt
