"""Dropout by a key that the caller passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.denoisers.edm import DhariwalUNet, SongUNet
from jaxdistill.models.language.gemma import Gemma2
from jaxdistill.models.language.lm import LM
from jaxdistill.models.language.neox import NeoX
from jaxdistill.models.layers import drop

KEY = jax.random.key(7)
TOKENS = np.arange(12).reshape(2, 6)
IMAGE = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
TIMES = np.float32([0.3, 0.8])
CASES = {
    "lm": (LM(depth=2), (TOKENS,)),
    "neox": (NeoX(depth=2), (TOKENS,)),
    "gemma": (Gemma2(depth=2), (TOKENS,)),
    "dit": (DiT(depth=2, channels=3), (IMAGE, TIMES)),
    "song": (SongUNet(), (IMAGE, TIMES)),
    "dhariwal": (DhariwalUNet(), (IMAGE, TIMES)),
}


def test_numbers_are_dropped_at_the_rate_and_the_mean_stays():
    x = jnp.full((100, 100), 3.0)
    found = np.asarray(drop(x, 0.2, KEY))
    assert set(np.unique(found)) == {0.0, np.float32(3.0 / 0.8)}
    # the standard deviation of the share of 10,000 draws is .004
    assert abs((found == 0).mean() - 0.2) < 0.016
    assert drop(x, 0.2, None) is x
    assert drop(x, 0.0, KEY) is x


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("lm", "dit")
        else pytest.param(name, marks=pytest.mark.full)
        for name in CASES
    ],
)
def test_only_a_key_drops_and_the_key_decides(name):
    cfg, inputs = CASES[name]
    rated = dataclasses.replace(cfg, dropout=0.3)
    net = make_net(rated, config=rated)
    plain = make_net(cfg, config=cfg)

    @jax.jit
    def outputs(key, other):
        params = net.init(jax.random.key(1))
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        draws = [
            w + 0.1 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves)
        ]
        params = jax.tree.unflatten(tree, draws)
        return {
            "none": net.apply(params, *inputs),
            "plain": plain.apply(params, *inputs, dropout=key),
            "key": net.apply(params, *inputs, dropout=key),
            "again": net.apply(params, *inputs, dropout=key),
            "other": net.apply(params, *inputs, dropout=other),
        }

    found = jax.tree.map(np.asarray, outputs(KEY, jax.random.key(8)))
    np.testing.assert_array_equal(found["none"], found["plain"])
    np.testing.assert_array_equal(found["key"], found["again"])
    for a, b in (("key", "none"), ("key", "other")):
        assert np.abs(found[a] - found[b]).max() > 1e-3


def test_each_layer_drops_by_itself():
    """Layers with equal weights do not drop the same numbers."""
    cfg = DiT(depth=2, channels=3, dropout=0.5)
    net = make_net(cfg, config=cfg)

    def twice(params, key):
        equal = jax.tree.map(lambda w: w.at[1].set(w[0]), params["blocks"])
        _, features = net.apply(
            {**params, "blocks": equal}, IMAGE, TIMES, dropout=key, taps=(0, 1)
        )
        return features

    def draw(key):
        params = net.init(key)
        return jax.tree.map(
            lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size).reshape(w.shape)), params
        )

    params = jax.jit(draw)(jax.random.key(1))
    first, second = jax.jit(twice)(params, KEY)
    embedded = jax.jit(
        lambda p: net.apply(p, IMAGE, TIMES, method="embed_inputs")[0]
    )(params)
    assert np.abs((first - embedded) - (second - first)).max() > 1e-2


def test_a_rematerialised_pass_drops_the_same():
    cfg = LM(depth=2, dropout=0.3)
    for remat in ("none", "full"):
        net = make_net(dataclasses.replace(cfg, remat=remat))
        params = jax.jit(net.init)(jax.random.key(1))
        loss = lambda p: jnp.sum(jnp.sin(net.apply(p, TOKENS, dropout=KEY)))
        found = jax.jit(jax.grad(loss))(params)
        if remat == "none":
            expected = found
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        expected,
    )
