"""Laws of training times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.diffusion.process import EDM, Flow
from jaxdistill.diffusion.times import Karras


@pytest.mark.parametrize("process", [EDM(), Flow()])
def test_karras_is_uniform_in_the_seventh_root_of_the_noise_to_signal_ratio(process):
    """SiD's law: from the cleanest .002 to 24.41, where the top fifth of EDM's range is left out."""
    t = Karras(high=0.8).draw(process, jax.random.key(0), 20_000)
    alpha, sigma = process.alpha_sigma(t)
    u = ((sigma / alpha) ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert float(u.min()) > -1e-4 and float(u.max()) <= 0.8 + 1e-4
    np.testing.assert_allclose((jnp.mean(u), jnp.std(u)), (0.4, 0.8 / 12**0.5), atol=4 * 0.8 / 20_000**0.5)
    ends = [Karras(low=at, high=at).draw(process, jax.random.key(0), 1)[0] for at in (0.0, 0.8, 1.0)]
    ratios = [float(s / a) for a, s in map(process.alpha_sigma, ends)]
    np.testing.assert_allclose(ratios, [0.002, 24.41, 80.0], rtol=3e-4)
