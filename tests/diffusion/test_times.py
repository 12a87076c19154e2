"""Laws of training times on a part of a process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.diffusion.process import EDM, Flow, Trig
from jaxdistill.diffusion.times import Karras, LogitNormal, LogNormalSNR, Uniform


@pytest.mark.parametrize(
    "process",
    [Flow(), Flow(shift=5.0), Trig(), EDM()],
    ids=lambda p: type(p).__name__,
)
def test_a_part_is_uniform_before_the_shift(process):
    """Mean and extremes in the process's own time, with the margin of `low` above the lower end and
    below `high`.
    """
    n = 20_000
    length = process.t_max - process.t_min
    low = process.t_min + 0.5 * length
    high = process.t_max
    t = (
        np.asarray(
            Uniform(low=0.02, high=0.98)
            .within(process, low, high)
            .draw(process, jax.random.key(0), n)
        )
        - process.t_min
    ) / length
    assert 0.52 <= t.min() < 0.522 and 0.978 < t.max() <= 0.98
    np.testing.assert_allclose(t.mean(), 0.75, atol=5 * 0.46 / 12**0.5 / n**0.5)


def test_a_part_below_the_top_keeps_its_own_upper_end():
    inside = Uniform(low=0.02, high=0.98).within(Flow(), 0.0, 0.5)
    assert (inside.low, inside.high) == (0.02, 0.5)


def test_the_whole_process_is_the_law_itself():
    assert LogitNormal(low=0.02, high=0.98).within(Flow(), 0.0, 1.0) == LogitNormal(
        low=0.02, high=0.98
    )


def test_refuses_empty_parts_and_laws_without_bounds():
    with pytest.raises(Refused, match="nothing within"):
        Uniform(low=0.1, high=0.6).within(Flow(), 0.5, 1.0)
    with pytest.raises(Refused, match="no bounds"):
        LogNormalSNR().within(Flow(), 0.5, 1.0)


@pytest.mark.parametrize("process", [EDM(), Flow()], ids=lambda p: type(p).__name__)
def test_karras_is_uniform_in_the_seventh_root_of_the_noise_to_signal_ratio(
    process,
):
    """SiD's distribution, .002 to 24.41: the top fifth of EDM's range is left out."""
    t = Karras(high=0.8).draw(process, jax.random.key(0), 20_000)
    alpha, sigma = process.alpha_sigma(t)
    u = ((sigma / alpha) ** (1 / 7) - 0.002 ** (1 / 7)) / (
        80 ** (1 / 7) - 0.002 ** (1 / 7)
    )
    assert float(u.min()) > -1e-4 and float(u.max()) <= 0.8 + 1e-4
    np.testing.assert_allclose(
        (jnp.mean(u), jnp.std(u)), (0.4, 0.8 / 12**0.5), atol=4 * 0.8 / 20_000**0.5
    )
    ends = [
        Karras(low=at, high=at).draw(process, jax.random.key(0), 1)[0]
        for at in (0.0, 0.8, 1.0)
    ]
    ratios = [float(s / a) for a, s in map(process.alpha_sigma, ends)]
    np.testing.assert_allclose(ratios, [0.002, 24.41, 80.0], rtol=3e-4)
