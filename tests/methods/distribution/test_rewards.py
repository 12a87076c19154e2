"""Methods whose students also climb a reward of the clean sample: DI++ and DI*."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.methods.distribution.di_plus_plus import DIPlusPlus
from jaxdistill.methods.distribution.di_star import DIStar
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.sim import SIM
from tests.methods.distribution.gaussians import AT, pulled

# method -> the same without a reward
METHODS = {
    DIPlusPlus: DiffInstruct,
    DIStar: SIM,
}
each = pytest.mark.parametrize(("method", "host"), METHODS.items())


@each
def test_rewards_are_climbed(method, host, plain):
    gap = pulled(method(reward_weight=0.2, **AT), plain) - pulled(host(**AT), plain)
    np.testing.assert_allclose(gap, -0.2 * np.cos(plain[2]), rtol=1e-9)
    assert method().frozen == ("teacher", "reward")


@each
def test_without_weight_it_is_its_host(method, host, plain):
    ours = pulled(method(reward_weight=0.0, **AT), plain)
    np.testing.assert_array_equal(ours, pulled(host(**AT), plain))


@each
def test_the_reward_judges_clean_samples_under_their_condition(method, host, plain):
    net, ctx, x0 = plain[:3]
    seen = []

    def reward(x, t, cond):
        seen.append((x.shape, t, cond))
        return jnp.sum(x, axis=1)

    net.reward = reward
    pulled(method(**AT), (net, ctx, x0))
    shape, t, cond = seen[0]
    assert shape == x0.shape and cond is ctx.batch.get("cond")
    np.testing.assert_array_equal(t, np.zeros(len(x0)))
