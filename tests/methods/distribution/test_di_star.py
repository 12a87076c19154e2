"""DIStar: the gradient of score implicit matching and that of a reward of the clean sample."""

import jax.numpy as jnp
import numpy as np

from jaxdistill.core.build import resolve
from jaxdistill.methods.distribution.di_star import DIStar
from jaxdistill.methods.distribution.sim import SIM
from tests.methods.distribution.gaussians import AT, pulled


def test_rewards_are_climbed(plain):
    gap = pulled(DIStar(reward_weight=0.2, **AT), plain) - pulled(SIM(**AT), plain)
    np.testing.assert_allclose(gap, -0.2 * np.cos(plain[2]), rtol=1e-9)
    assert DIStar().frozen == ("teacher", "reward")


def test_without_weight_it_is_its_host(plain):
    ours = pulled(DIStar(reward_weight=0.0, **AT), plain)
    np.testing.assert_array_equal(ours, pulled(SIM(**AT), plain))


def test_the_reward_judges_clean_samples_under_their_condition(plain):
    net, ctx, x0 = plain[:3]
    seen = []

    def reward(x, t, cond):
        seen.append((x.shape, t, cond))
        return jnp.sum(x, axis=1)

    net.reward = reward
    pulled(DIStar(**AT), (net, ctx, x0))
    shape, t, cond = seen[0]
    assert shape == x0.shape and cond is ctx.batch.get("cond")
    np.testing.assert_array_equal(t, np.zeros(len(x0)))


def test_the_name_in_earlier_configs_is_read():
    assert resolve("methods.distribution._family:DIStar") is DIStar
