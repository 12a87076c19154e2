"""f-distill on Gaussians: DMD2's gradient times h(r), clipped ratios, and their means by bins."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.build import build, resolve
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.process import Flow
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.f_distill import BinnedFDistill, FDistill
from jaxdistill.objectives.fdivergence import (
    NAMES,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    ReverseKL,
)
from tests.methods.distribution.gaussians import AT, pulled


def test_f_distill(plain):
    _, _, x0, real, fake, xt = plain
    h = np.exp(2 * xt[:, :1]) / (1 + np.exp(2 * xt[:, :1]))
    want = h / h.mean() * (fake - real) / np.abs(x0 - real)
    np.testing.assert_allclose(
        pulled(FDistill(divergence=JensenShannon(), **AT), plain), want, rtol=1e-10
    )
    reverse = pulled(FDistill(divergence=ReverseKL(), **AT), plain)
    np.testing.assert_allclose(reverse, pulled(DMD2(**AT), plain), rtol=1e-10)


def test_f_distill_with_clipped_ratios_over_their_bins(plain):
    """All times are .6, the seventh of ten bins of [0, 1], whose mean moves half the way to the
    batch's; then as above.
    """
    net, ctx, x0, real, fake, xt = plain
    net.student = lambda x, t, cond=None: Flow().from_x0(x, x, t)
    r = np.clip(np.exp(2 * xt[:, :1]), 0.5, 2.0)
    np.testing.assert_array_equal(
        pulled(FDistill(**AT), plain),
        pulled(FDistill(ratio_range=(0.0, np.inf), **AT), plain),
    )
    clipped = r / (1 + r) / np.mean(r / (1 + r)) * (fake - real) / np.abs(x0 - real)
    np.testing.assert_allclose(
        pulled(FDistill(ratio_range=(0.5, 2.0), **AT), plain), clipped, rtol=1e-10
    )

    method = BinnedFDistill(ratio_range=(0.5, 2.0), bin_rate=0.5, **AT)
    held = dataclasses.replace(
        ctx,
        memory=method.memory(),
        batch={**ctx.batch, "xt": x0, "t": jnp.ones(len(x0))},
    )
    mean = 0.5 + 0.5 * np.sum(r) / (len(r) + 1e-6)
    scaled = r / (mean + 1e-6)
    want = (
        scaled
        / (1 + scaled)
        / np.mean(scaled / (1 + scaled))
        * (fake - real)
        / np.abs(x0 - real)
    )
    np.testing.assert_allclose(pulled(method, (net, held, x0)), want, rtol=1e-9)
    memory = method.student_loss(net, held).memory["ratio_means"]
    np.testing.assert_allclose(
        memory, np.where(np.arange(10) == 6, mean, 1.0), rtol=1e-12
    )


@pytest.mark.parametrize("kind", ["js", "forward_kl", "jeffreys"])
def test_equal_densities_are_the_host(plain, kind):
    """r = 1 everywhere: h is constant, and over its mean 1."""
    net, ctx, x0 = plain[:3]
    net.disc = lambda features, t, cond: 0 * features[0][:, 0]
    ours = pulled(FDistill(divergence=NAMES[kind], **AT), (net, ctx, x0))
    np.testing.assert_allclose(ours, pulled(DMD2(**AT), (net, ctx, x0)), rtol=1e-10)


def test_forward_kl_weighs_by_the_ratio(plain):
    xt = plain[5]
    r = np.exp(2 * xt[:, :1])
    ours = pulled(FDistill(divergence=ForwardKL(), **AT), plain)
    host = pulled(DMD2(**AT), plain)
    np.testing.assert_allclose(ours, r / r.mean() * host, rtol=1e-9)


def test_the_names_of_divergences_in_earlier_configs_are_read():
    name = "methods.distribution.f_distill:FDistill"
    built = build({"name": name, "divergence": "jkl"})
    assert built.divergence == Jeffreys(forward=0.4, reverse=0.6)
    with pytest.raises(Refused, match="did you mean 'forward_kl'"):
        build({"name": name, "divergence": "forward_lk"})


@pytest.mark.parametrize("make", [FDistill, BinnedFDistill])
def test_the_names_in_earlier_configs_are_read(make):
    assert resolve(f"methods.distribution._family:{make.__name__}") is make
