import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net, paths
from jaxdistill.core.types import Refused
from jaxdistill.models.language.lm import LM
from jaxdistill.models.language.neox import NeoX
from jaxdistill.surgery.prune import importance, keep_layers, keep_neurons, prune

CFG = LM(vocab=11, dim=8, mlp=12, heads=2, kv_heads=1, depth=4)
NET = make_net(CFG, config=CFG)
RNG = np.random.default_rng(0)
BATCH = {"tokens": jnp.asarray(RNG.integers(0, 11, (3, 6)))}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(
        lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype),
        NET.shapes,
    )


def edit(params, **changes):
    """Blocks with some kernels passed through functions."""
    blocks = {
        name: {"kernel": f(params["blocks"][name]["kernel"])}
        for name, f in changes.items()
    }
    return {**params, "blocks": {**params["blocks"], **blocks}}


def logits(net, params):
    return jax.jit(lambda p: net.apply(p, BATCH["tokens"]))(params)


def test_influence_is_one_minus_the_cosine_of_features(params):
    influence, _ = importance(NET, params, BATCH)
    _, features = jax.jit(
        lambda p: NET.apply(p, BATCH["tokens"], taps=(0, 1, 2, 3))
    )(params)
    embedded = np.asarray(params["embed"]["embedding"])[BATCH["tokens"]]
    features = [embedded, *map(np.asarray, features)]
    for i, (a, b) in enumerate(zip(features, features[1:])):
        cosine = (
            (a * b).sum(-1)
            / np.linalg.norm(a, axis=-1)
            / np.linalg.norm(b, axis=-1)
        )
        np.testing.assert_allclose(influence[i], 1 - cosine.mean(), atol=1e-5)


def test_neurons_by_hand_in_the_first_layer(params):
    # then the first MLP sees the embedding
    still = edit(params, to_out=jnp.zeros_like)
    x = np.asarray(params["embed"]["embedding"])[BATCH["tokens"]]
    first = jax.tree.map(lambda w: np.asarray(w[0]), params["blocks"])
    h = (
        x
        / np.sqrt((x**2).mean(-1, keepdims=True) + CFG.norm_eps)
        * first["norm_mlp"]["scale"]
    )
    gate = h @ first["gate"]["kernel"]
    up = h @ first["up"]["kernel"]
    expected = np.sqrt(
        (np.abs(gate / (1 + np.exp(-gate)) * up).mean(1) ** 2).sum(0)
    )
    np.testing.assert_allclose(
        importance(NET, still, BATCH)[1][0], expected, rtol=1e-4
    )


def test_padding_does_not_count(params):
    padded = {
        "tokens": jnp.concatenate([jnp.full((3, 2), 7), BATCH["tokens"]], 1),
        "segments": jnp.asarray([[0, 0, 1, 1, 1, 1, 1, 1]] * 3),
    }
    for a, b in zip(
        importance(NET, params, padded), importance(NET, params, BATCH)
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_layer_that_does_nothing_goes_first(params):
    idle = edit(
        params, to_out=lambda w: w.at[2].set(0), down=lambda w: w.at[2].set(0)
    )
    assert abs(importance(NET, idle, BATCH)[0][2]) <= 1e-6
    net, small = prune(NET, idle, BATCH, depth=3)
    assert net.config == dataclasses.replace(CFG, depth=3)
    np.testing.assert_allclose(logits(net, small), logits(NET, idle), atol=1e-5)


def test_neurons_that_are_silent_go_first(params):
    silent = [[0, 5], [1, 11], [3, 4], [9, 10]]
    mute = edit(params, up=lambda w: w.at[np.arange(4)[:, None], :, silent].set(0))
    assert not importance(NET, mute, BATCH)[1][np.arange(4)[:, None], silent].any()
    net, small = prune(NET, mute, BATCH, mlp=10)
    assert net.config == dataclasses.replace(CFG, mlp=10)
    np.testing.assert_allclose(logits(net, small), logits(NET, mute), atol=1e-5)


def test_neurons_of_an_mlp_without_a_gate():
    """NeoX, with biases: neurons that nothing reads may go."""
    cfg = NeoX(vocab=11, dim=8, mlp=12, heads=2, depth=2, rotary_share=0.5)
    net = make_net(cfg, config=cfg)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), s.dtype),
        net.shapes,
    )
    kept = jnp.sort(
        jnp.stack([jnp.asarray(rng.permutation(12)[:7]) for _ in range(2)]), -1
    )
    read = jnp.zeros((2, 12, 1)).at[jnp.arange(2)[:, None], kept].set(1.0)
    params["blocks"]["down"]["kernel"] *= read
    small, found = keep_neurons(net, params, kept)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(
        lambda s: s.shape, small.shapes
    )
    np.testing.assert_allclose(logits(small, found), logits(net, params), atol=1e-5)


def test_what_is_kept_is_bit_for_bit_what_it_was(params):
    net, small = keep_layers(NET, params, jnp.array([0, 3]))
    for path, w in paths(small).items():
        before = paths(params)[path]
        np.testing.assert_array_equal(
            w, before[np.array([0, 3])] if path.startswith("blocks") else before
        )
    neurons = jnp.array([[0, 2], [1, 3], [10, 11], [0, 11]])
    net, small = keep_neurons(NET, params, neurons)
    for layer in range(4):
        for name, axis in (("gate", 1), ("up", 1), ("down", 0)):
            before, kept = (
                np.asarray(p["blocks"][name]["kernel"])[layer]
                for p in (params, small)
            )
            np.testing.assert_array_equal(kept, before.take(neurons[layer], axis))
    assert {k: v.shape for k, v in paths(small).items()} == {
        k: v.shape for k, v in paths(net.shapes).items()
    }


def test_both_at_once_rank_the_whole_model(params):
    influence, neurons = importance(NET, params, BATCH)
    net, small = prune(NET, params, BATCH, depth=2, mlp=5)
    layers = np.sort(np.argsort(-np.asarray(influence))[:2])
    columns = np.sort(np.argsort(-np.asarray(neurons))[:, :5])
    expected = keep_layers(
        *keep_neurons(NET, params, jnp.asarray(columns)), jnp.asarray(layers)
    )
    assert net.config == expected[0].config
    jax.tree.map(np.testing.assert_array_equal, small, expected[1])


def test_zero_keeps_everything(params):
    net, same = prune(NET, params, BATCH)
    assert net.config == CFG
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_refusals(params):
    with pytest.raises(Refused, match="depth=5: the model has 4 to keep from"):
        prune(NET, params, BATCH, depth=5)
    with pytest.raises(Refused, match="mlp=-1: the model has 12"):
        prune(NET, params, BATCH, mlp=-1)
