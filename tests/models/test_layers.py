"""Stacks of layers: scanned or unrolled they are the same function, and what long sequences hold
does not grow by their scores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core import sharding
from jaxdistill.core.net import forward_mode, make_net
from jaxdistill.core.sharding import MeshShape, Rules
from jaxdistill.models import layers
from jaxdistill.models.denoisers import edm
from jaxdistill.models.language.lm import LM


def network(depth: int, **more):
    config = LM(vocab=29, dim=32, mlp=48, heads=4, depth=depth, **more)
    return make_net(config, config=config)


def traced(net, tokens, shape=MeshShape(fsdp=1)):
    """Gradient of a sum over logits and features of layers 0 and 2, for one device or several."""

    def total(params, tokens):
        logits, features = net.apply(params, tokens, taps=(0, 2))
        return jnp.mean(logits**2) + sum(jnp.mean(s) for s in features)

    with sharding.use(sharding.make_mesh(shape)):
        return jax.jit(jax.grad(total)).trace(net.shapes, tokens)


def unrolled(traced) -> bool:
    """Whether layers 1 and 2, which stand between the taps, are."""
    return "unroll=2" in str(traced.jaxpr)


@pytest.mark.full
def test_short_stacks_are_unrolled_on_one_device_and_nothing_changes(monkeypatch):
    net = network(4)
    tokens = jax.random.randint(jax.random.key(0), (4, 8), 0, 29)
    one = traced(net, tokens)
    several = traced(net, tokens, MeshShape(fsdp=2))
    assert unrolled(one) and not unrolled(several)
    monkeypatch.setattr(layers, "SCORES", 0)
    scanned = traced(net, tokens)
    assert not unrolled(scanned)
    params = net.init(jax.random.key(1))
    run = lambda traced: traced.lower().compile()(params, tokens)
    # float32 sums of up to 32 x 29 terms in another order
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    jax.tree.map(close, run(one), run(scanned))


def test_what_rematerialises_is_never_unrolled():
    assert not unrolled(
        traced(network(4, remat="full"), jnp.zeros((4, 8), jnp.int32))
    )


@pytest.mark.full
def test_blocks_of_a_kind_are_traced_once_for_each_surrounding(monkeypatch):
    """The network has 14 blocks of seven kinds and is called twice. Kinds: without attention, at
    two resolutions; the same with a wider input; with attention; a change of resolution, down and
    up. Other rules, another mesh or forward mode: all anew.
    """
    seen = []
    call = edm.Block.__call__
    monkeypatch.setattr(
        edm.Block,
        "__call__",
        lambda block, *args: (seen.append(block), call(block, *args))[1],
    )
    layers._program.cache_clear()
    cfg = edm.SongUNet(
        size=8, width=32, multiples=(1, 1), blocks=2, attention=(), remat="full"
    )
    net = make_net(cfg)
    x = jnp.zeros((2, 8, 8, 3))
    t = jnp.ones(2)

    def traces(shape=MeshShape(fsdp=1), rules=Rules()):
        seen.clear()
        with sharding.use(sharding.make_mesh(shape), rules):
            jax.jit(
                jax.grad(lambda p: net.apply(p, net.apply(p, x, t), t).sum())
            ).trace(net.shapes)
        return len(seen)

    assert [
        traces(),
        traces(),
        traces(MeshShape(fsdp=2)),
        traces(MeshShape(fsdp=2), Rules(embed=())),
    ] == [7, 0, 7, 7]
    with forward_mode():
        assert traces() == 7


@pytest.mark.parametrize("tokens", [1024])
def test_layers_of_long_sequences_keep_no_scores(tokens):
    scores = 2 * 4 * tokens**2 * 4  # bytes of a layer's, [B H T T]
    taken = lambda depth: (
        traced(network(depth), jnp.zeros((2, tokens), jnp.int32))
        .lower()
        .compile()
        .memory_analysis()
    )
    bytes_by_depth = [taken(depth).temp_size_in_bytes for depth in (3, 7)]
    assert bytes_by_depth[1] - bytes_by_depth[0] < 4 * scores / 2
