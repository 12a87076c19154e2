"""Random features, heads on their taps, and networks without weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.heads import Heads
from jaxdistill.models.vision.judges import (
    ConvFeatures,
    Direction,
    Identity,
    LatentReward,
    PointFeatures,
)


def test_points_pass_random_relu_layers():
    net = make_net(PointFeatures(width=400, depth=2, scale=3.0))
    params = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (50, 2))
    last, taps = jax.jit(lambda p, x: net.apply(p, x, taps=(0, 1)))(params, x)
    h = 3.0 * x
    for i in range(2):
        layer = params["layers"][i]
        h = np.maximum(h @ layer["kernel"] + layer["bias"], 0)
        np.testing.assert_allclose(taps[i][:, 0], h, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(last, taps[1])
    kernel = params["layers"][1]["kernel"]
    bias = params["layers"][1]["bias"]
    # He, a truncated normal
    np.testing.assert_allclose(
        kernel.var(), 2 / 400, rtol=5 * (2 / kernel.size) ** 0.5 + 0.03
    )
    np.testing.assert_allclose(bias.var(), 1, rtol=5 * (2 / 400) ** 0.5)


def test_images_give_taps_of_their_pixels():
    net = make_net(ConvFeatures(widths=(8, 16), patch=4))
    params = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 16, 24, 3))
    last, (first, second) = jax.jit(lambda p, x: net.apply(p, x, taps=(0, 1)))(
        params, x
    )
    assert (
        first.shape == (2, 24, 8)
        and second.shape == (2, 6, 16)
        and last.shape == (2, 2, 3, 16)
    )
    patch = (
        np.einsum("hwc,hwco->o", x[0, :4, :4], params["layers"][0]["kernel"])
        + params["layers"][0]["bias"]
    )
    np.testing.assert_allclose(
        first[0, 0], np.maximum(patch, 0), rtol=1e-4, atol=1e-5
    )


def test_each_head_sees_its_tap_and_no_other():
    net = make_net(Heads(dims=(4, 6), width=8))
    params = net.init(jax.random.key(0))
    features = [
        jax.random.normal(jax.random.key(i), (3, 5, dim))
        for i, dim in enumerate((4, 6))
    ]
    run = jax.jit(net.apply)
    logits = run(params, features)
    assert logits.shape == (3, 2) and logits.dtype == jnp.float32
    other = run(params, [features[0], features[1][::-1]])
    np.testing.assert_array_equal(other[:, 0], logits[:, 0])
    assert np.all(np.abs(other[::2, 1] - logits[::2, 1]) > 1e-5)
    with pytest.raises(Refused, match="1 of them for the 2 heads"):
        net.apply(params, features[:1])


def test_networks_without_weights():
    x = jax.random.normal(jax.random.key(0), (6, 2))
    for model in (Identity(), Direction()):
        net = make_net(model)
        assert net.shapes == {} and net.init(jax.random.key(0)) == {}
    net = make_net(Identity())
    np.testing.assert_array_equal(
        net.apply({}, net.apply({}, x, method="denormalise"), method="decode"), x
    )
    reward = make_net(Direction(angle=np.pi / 2, core=0.0)).apply(
        {}, x, jnp.ones(6)
    )
    np.testing.assert_allclose(
        reward, jnp.sin(jnp.arctan2(x[:, 1], x[:, 0])), rtol=1e-5, atol=1e-6
    )
    assert jnp.isfinite(
        jax.grad(lambda x: make_net(Direction()).apply({}, x, jnp.ones(1))[0])(
            jnp.zeros((1, 2))
        )
    ).all()


def test_a_reward_of_noisy_latents_depends_on_both_inputs():
    net = make_net(
        LatentReward(trunk=ConvFeatures(channels=4, widths=(8, 16), patch=2))
    )
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 4))
    t = jnp.array([0.2, 0.5, 0.9])
    run = jax.jit(net.apply)
    params = net.init(jax.random.key(0))
    base = run(params, x, t)
    assert base.shape == (3,) and base.dtype == jnp.float32
    for other in (run(params, x[::-1], t), run(params, x, t[::-1])):
        assert np.all(np.abs(other[::2] - base[::2]) > 1e-5)
