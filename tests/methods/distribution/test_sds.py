"""Score distillation sampling on Gaussians, its delta against a reference, and inverse problems."""

import dataclasses

import numpy as np
import pytest

from jaxdistill.core.build import resolve
from jaxdistill.methods.distribution.sds import DDS, SDS, RedDiff
from tests.methods.distribution.gaussians import AT, pulled


def test_score_distillation_and_its_delta(plain):
    net, ctx, x0, real = plain[:4]
    np.testing.assert_allclose(pulled(SDS(**AT), plain), x0 - real, rtol=1e-10)
    # of the teacher's denoiser at t = .6, whose input moves by .4 for a reference moved by 1
    slope = 0.4 * 0.16 / (0.16 * 0.16 + 0.36)
    np.testing.assert_allclose(
        pulled(DDS(**AT), plain), -(1 - 0.4 * slope), rtol=1e-9
    )
    still = dataclasses.replace(ctx, batch={**ctx.batch, "ref": x0})
    np.testing.assert_allclose(pulled(DDS(**AT), (net, still, x0)), 0.0, atol=1e-12)
    assert (
        SDS().turns[0].moves == ("student",)
        and len(SDS().turns) == 1
        and "fake" not in SDS().inits
    )


def test_red_diff_adds_fidelity(plain):
    x0, real = plain[2:4]
    np.testing.assert_allclose(
        pulled(RedDiff(fidelity_weight=0.3, **AT), plain),
        x0 - real + 0.3 * 2 * 0.5,
        rtol=1e-10,
    )


def test_trains_without_a_fake_score(three_steps):
    three_steps(SDS())


@pytest.mark.parametrize("make", [SDS, DDS, RedDiff])
def test_the_names_in_earlier_configs_are_read(make):
    assert resolve(f"methods.distribution._family:{make.__name__}") is make
