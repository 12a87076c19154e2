"""DIPlusPlus: the gradient of Diff-Instruct and that of a reward of the clean sample."""

import jax.numpy as jnp
import numpy as np

from jaxdistill.core.build import resolve
from jaxdistill.methods.distribution.di_plus_plus import DIPlusPlus
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from tests.methods.distribution.gaussians import AT, pulled


def test_rewards_are_climbed(plain):
    gap = pulled(DIPlusPlus(reward_weight=0.2, **AT), plain) - pulled(
        DiffInstruct(**AT), plain
    )
    np.testing.assert_allclose(gap, -0.2 * np.cos(plain[2]), rtol=1e-9)
    assert DIPlusPlus().frozen == ("teacher", "reward")


def test_without_weight_it_is_its_host(plain):
    ours = pulled(DIPlusPlus(reward_weight=0.0, **AT), plain)
    np.testing.assert_array_equal(ours, pulled(DiffInstruct(**AT), plain))


def test_the_reward_judges_clean_samples_under_their_condition(plain):
    net, ctx, x0 = plain[:3]
    seen = []

    def reward(x, t, cond):
        seen.append((x.shape, t, cond))
        return jnp.sum(x, axis=1)

    net.reward = reward
    pulled(DIPlusPlus(**AT), (net, ctx, x0))
    shape, t, cond = seen[0]
    assert shape == x0.shape and cond is ctx.batch.get("cond")
    np.testing.assert_array_equal(t, np.zeros(len(x0)))


def test_the_name_in_earlier_configs_is_read():
    assert resolve("methods.distribution._family:DIPlusPlus") is DIPlusPlus
