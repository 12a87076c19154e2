"""Rings: sharp samples, and the blurred exact denoiser against sums over the circle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.rings import Rings
from jaxdistill.diffusion.process import EDM, VP, Flow


def log_density(data, process, x, t, modes):
    """log p_t(x) of one x [2]: each blurred ring as 400 Gaussians, which is exact to rounding for a
    blur of 0.75 radii.
    """
    weights, means, radii = (
        jnp.asarray(a, jnp.float64)[jnp.asarray(modes)] for a in data.components
    )
    angle = jnp.arange(400) * (2 * jnp.pi / 400)
    a, s = process.alpha_sigma(t)
    var = (a * data.blur * radii) ** 2 + s**2
    centres = means[:, None] + radii[:, None, None] * jnp.stack(
        [jnp.cos(angle), jnp.sin(angle)], -1
    )
    logs = (
        -jnp.sum((x - a * centres) ** 2, -1) / (2 * var[:, None])
        - jnp.log(2 * jnp.pi * var * 400)[:, None]
    )
    return jax.nn.logsumexp(jnp.log(weights)[:, None] + logs)


@pytest.mark.parametrize(
    "process", [Flow(), VP(), EDM()], ids=lambda p: type(p).__name__
)
def test_score_is_the_gradient_of_the_blurred_log_density(x64, process):
    data = Rings(seed=2, modes=4)
    every = [0, 1, 2, 3]
    t = process.time_of_lam(jnp.asarray([3.0, 1.0, 0.0, -2.0]))
    x = (
        jnp.asarray(np.random.default_rng(0).standard_normal((4, 2)))
        * process.alpha_sigma(t)[1][:, None]
    )
    a, s, da, ds = (c[:, None] for c in process.coefs(t))
    for cond, modes in [
        (None, every),
        (jnp.full(4, 4), every),
        (jnp.full(4, 2), [2]),
    ]:
        pred = data.denoise(process, x, t, cond)
        slope = jax.vmap(
            jax.grad(
                lambda x, t, modes=modes: log_density(data, process, x, t, modes)
            )
        )(x, t)
        np.testing.assert_allclose(-pred.eps / s, slope, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(
            a * pred.x0 + s * pred.eps, x, rtol=1e-11, atol=1e-12
        )
        np.testing.assert_allclose(
            pred.v, da * pred.x0 + ds * pred.eps, rtol=1e-12, atol=1e-12
        )


def test_samples_lie_on_their_rings():
    data = Rings(seed=1, labelled=True)
    n = 20_000
    weights, means, radii = data.components
    drawn = data.evaluation(n)
    mode = drawn["cond"]
    assert drawn["x"].dtype == np.float32 and mode.dtype == np.int32
    np.testing.assert_allclose(
        np.bincount(mode, minlength=8) / n, weights, atol=5 * np.sqrt(0.25 / n)
    )
    offset = (drawn["x"] - means[mode]) / radii[mode, None]
    r = np.linalg.norm(offset, axis=1)
    # E r^2 = 1 + 2 b^2; the spread of r is b to first order
    np.testing.assert_allclose(
        np.mean(r**2), 1 + 2 * 0.08**2, atol=5 * 2 * 0.08 / np.sqrt(n)
    )
    np.testing.assert_allclose(r.std(), 0.08, rtol=0.05)
    np.testing.assert_allclose(offset.mean(0), 0, atol=5 * np.sqrt(0.5 / n))


def test_the_denoiser_is_finite_at_a_rings_centre():
    data = Rings(seed=0)
    means = jnp.asarray(data.components[1])
    t = jnp.full(8, 0.3)
    run = lambda x: data.denoise(Flow(), x, t, jnp.arange(8)).x0
    np.testing.assert_allclose(run(0.7 * means), means, atol=1e-5)
    assert jnp.isfinite(
        jax.jvp(run, (0.7 * means,), (jnp.ones_like(means),))[1]
    ).all()


def test_other_dimensions_are_refused():
    with pytest.raises(Refused, match="dim=3"):
        Rings(dim=3)
    with pytest.raises(Refused, match=r"blur=0\.0"):
        dataclasses.replace(Rings(), blur=0.0)
