"""Random networks: their kernel, what they can tell apart, and that samples do not mix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.models.vision.random_features import (
    ARCHS,
    Arch,
    arch,
    random_feature_net,
)
from jaxdistill.objectives import mmd

IMAGES = [name for name, kind in ARCHS.items() if kind.convolutional]
SMALL = lambda name: dataclasses.replace(arch(name), width=8)


def test_one_layer_is_the_arc_cosine_kernel():
    """He-normal, no biases: E<psi(x), psi(y)> = (2 / d) |x||y| (sin a + (pi - a) cos a) / 2 pi, to
    O(1 / sqrt(width)).
    """
    width = 200_000
    key = jax.random.key(0)
    x, y = jax.random.normal(jax.random.key(1), (2, 3))
    net = random_feature_net(
        key,
        Arch(depth=1, width=width, convolutional=False, normalised=False),
        bias=0.0,
    )
    (features,) = net(jnp.stack([x, y]))
    norms = jnp.linalg.norm(x) * jnp.linalg.norm(y)
    angle = jnp.arccos(x @ y / norms)
    want = (
        2
        / 3
        * norms
        * (jnp.sin(angle) + (jnp.pi - angle) * jnp.cos(angle))
        / (2 * jnp.pi)
    )
    np.testing.assert_allclose(
        features[0] @ features[1], want, atol=4 * float(norms) / width**0.5
    )


@pytest.mark.full
@pytest.mark.parametrize("name", IMAGES)
def test_samples_do_not_mix_and_the_key_decides(name):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    net = random_feature_net(jax.random.key(1), SMALL(name))
    complete = jax.jit(net)(x)
    alone = jax.jit(net)(x[1:2])
    assert len(complete) == arch(name).depth and all(
        np.all(np.isfinite(f)) and f.std() > 1e-3 for f in complete
    )
    for a, b in zip(complete, alone, strict=True):
        np.testing.assert_allclose(a[1:2], b, rtol=1e-4, atol=1e-5)
    other = jax.jit(random_feature_net(jax.random.key(2), SMALL(name)))(x)
    assert not np.allclose(complete[-1], other[-1])


@pytest.mark.parametrize(
    ("name", "sees"), [("convnet-2", False), ("plain-2", True), ("mlp", True)]
)
def test_normalised_first_layers_do_not_see_scale_and_mean(name, sees):
    """Why the pool needs a network without normalisation. Padding shows a mean at the border, hence
    a scale alone.
    """
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    net = jax.jit(random_feature_net(jax.random.key(1), SMALL(name)))
    assert (not np.allclose(net(x)[-1], net(3.0 * x)[-1], atol=1e-3)) == sees


def el(net, x, y):
    return float(jax.jit(lambda x, y: mmd.mmd2(net(x)[-1], net(y)[-1]))(x, y))


def test_covariances_are_seen_by_a_nonlinear_network_only():
    """Two distributions of equal mean: EL > 0 with the MLP, 0 up to noise with a linear map."""
    n = 20_000
    x, y = (
        jax.random.normal(jax.random.key(i), (n, 2)) * s
        for i, s in ((0, jnp.array([1.0, 1.0])), (1, jnp.array([1.6, 0.4])))
    )
    w = jax.random.normal(jax.random.key(3), (2, 256)) / 16
    noise = abs(float(mmd.mmd2(x @ w, y @ w)))
    assert el(random_feature_net(jax.random.key(2), arch("mlp")), x, y) > 10 * max(
        noise, 2 / n
    )


def test_biases_see_what_homogeneous_networks_cannot():
    """The unit circle against radius .5 or 1.5: equal E|x|, both isotropic. Blind without biases,
    seen with N(0, 1) ones.
    """
    n = 200_000
    angle = jax.random.uniform(jax.random.key(0), (2, 200_000), maxval=2 * jnp.pi)
    circle = lambda a: jnp.stack([jnp.cos(a), jnp.sin(a)], 1)
    radius = jnp.where(
        jax.random.bernoulli(jax.random.key(1), shape=(n, 1)), 0.5, 1.5
    )
    x = circle(angle[0])
    y = radius * circle(angle[1])
    kind = dataclasses.replace(arch("mlp"), width=128)
    blind = el(random_feature_net(jax.random.key(2), kind, bias=0.0), x, y)
    seen = el(random_feature_net(jax.random.key(2), kind), x, y)
    assert abs(blind) < 1e-4 < seen, (blind, seen)


@pytest.mark.parametrize("name", ["mlp", "plain-2"])
def test_labels_make_it_a_joint_law(name):
    """Samples and labels each alike, paired the other way round: seen with labels, not without."""
    n = 512
    label = jnp.arange(n) % 2
    shape = (n, 2) if name == "mlp" else (n, 4, 4, 1)
    x = jax.random.normal(jax.random.key(0), shape) * 0.3 + jnp.where(
        label == 0, -1.0, 1.0
    ).reshape(-1, *[1] * (len(shape) - 1))
    net = jax.jit(random_feature_net(jax.random.key(1), SMALL(name)))
    plain = mmd.mmd2(net(x)[-1], net(x[::-1])[-1], "linear", "v")
    joint = mmd.mmd2(net(x, label)[-1], net(x, 1 - label)[-1], "linear", "v")
    assert plain < 1e-6 and joint > 1e-3


def test_refuses_another_arch():
    with pytest.raises(Refused, match=r"arch='convnet-9'.*convnet"):
        arch("convnet-9")
