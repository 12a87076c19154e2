import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net, paths
from jaxdistill.core.types import Refused
from jaxdistill.models import layers
from jaxdistill.models.language.lm import LM, following, frequencies, targets

CFG = LM(
    vocab=31,
    dim=16,
    mlp=24,
    heads=4,
    kv_heads=2,
    head_dim=6,
    depth=3,
    rope_theta=100.0,
)
TOL = 1e-5  # float32: 3 layers of sums over at most 31 terms on logits of order 1


@pytest.fixture(scope="module")
def lm():
    return draw(CFG)


def draw(cfg):
    """Weights large enough that every part matters, tokens [3 9]."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), s.dtype),
        net(cfg).shapes,
    )
    return params, jnp.asarray(rng.integers(0, cfg.vocab, (3, 9)))


@functools.cache
def net(cfg):
    return make_net(cfg)


@functools.cache
def program(cfg, taps, hidden_only):
    return jax.jit(
        lambda params, tokens, arrays: net(cfg).apply(
            params, tokens, taps=taps, hidden_only=hidden_only, **arrays
        )
    )


def run(params, tokens, *, cfg=CFG, taps=(), hidden_only=False, **arrays):
    return program(cfg, taps, hidden_only)(params, tokens, arrays)


def close(a, b, tol=TOL):
    np.testing.assert_allclose(
        a, b, rtol=tol, atol=tol * max(1.0, float(jnp.abs(b).max()))
    )


def test_shapes_axes_and_dtypes(lm):
    params, tokens = lm
    assert run(params, tokens).shape == (3, 9, 31)
    axes = {path: tuple(spec) for path, spec in paths(net(CFG).axes).items()}
    assert axes["embed/embedding"] == ("vocab", "embed")
    assert axes["unembed/kernel"] == ("embed", "vocab")
    assert axes["blocks/to_q/kernel"] == ("layers", "embed", "heads")
    assert axes["blocks/down/kernel"] == ("layers", "mlp", "embed")
    half = net(dataclasses.replace(CFG, dtype="bfloat16"))
    assert {w.dtype for w in jax.tree.leaves(half.shapes)} == {jnp.dtype("float32")}
    assert jax.eval_shape(half.apply, params, tokens).dtype == jnp.float32
    assert (
        jax.eval_shape(
            lambda *a: half.apply(*a, hidden_only=True), params, tokens
        ).dtype
        == jnp.bfloat16
    )


def test_no_token_sees_the_future(lm):
    params, tokens = lm
    a = run(params, tokens)
    b = run(params, tokens.at[:, 5].add(1) % CFG.vocab)
    close(a[:, :5], b[:, :5])
    assert (jnp.abs(a - b)[:, 5:].max((0, 2)) > 0.01).all()


def test_left_padding_changes_nothing(lm):
    params, tokens = lm
    pads = [0, 2, 2]
    mask = jnp.arange(9) >= jnp.array(pads)[:, None]
    padded = run(params, jnp.where(mask, tokens, 7), mask=mask)
    for row, pad in enumerate(pads):
        close(padded[row, pad:], run(params, tokens[row : row + 1, pad:])[0])


def test_packed_documents_do_not_see_each_other(lm):
    params, tokens = lm
    packed = run(
        params,
        tokens,
        segments=jnp.array([0, 0, 0, 1, 1, 1, 2, 2, 2])[None].repeat(3, 0),
    )
    for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
        close(packed[:, part], run(params, tokens[:, part]))


def test_packing_and_padding_together(lm):
    params, tokens = lm
    mask = (jnp.arange(9) < 6)[None].repeat(3, 0)
    segments = (jnp.arange(9) >= 3).astype(jnp.int32)[None].repeat(3, 0)
    close(
        run(params, tokens, segments=segments, mask=mask)[:, 3:6],
        run(params, tokens[:, 3:6]),
    )


def test_positions_act_by_their_differences(lm):
    params, tokens = lm
    plain = run(params, tokens)
    close(run(params, tokens, positions=jnp.arange(9) + 7), plain)
    close(
        run(params, tokens, positions=jnp.arange(9) + jnp.array([[0], [3], [20]])),
        plain,
    )
    assert (
        jnp.abs(run(params, tokens, positions=2 * jnp.arange(9)) - plain).max()
        > 0.01
    )


def test_grouped_queries_equal_repeated_keys_and_values(lm):
    params, tokens = lm
    full = dataclasses.replace(CFG, kv_heads=4)
    repeat = lambda w: w.reshape(3, 16, 2, 6).repeat(2, 2).reshape(3, 16, 24)
    blocks = params["blocks"] | {
        name: {"kernel": repeat(params["blocks"][name]["kernel"])}
        for name in ("to_k", "to_v")
    }
    close(run(params | {"blocks": blocks}, tokens, cfg=full), run(params, tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_times_head_is_logits(tied):
    cfg = dataclasses.replace(CFG, tied=tied)
    params, tokens = draw(cfg)
    assert ("unembed" in params) is not tied
    hidden = run(params, tokens, cfg=cfg, hidden_only=True)
    head = net(cfg).apply(params, method="unembedding")
    assert head.shape == (16, 31)
    close(hidden @ head, run(params, tokens, cfg=cfg))


def test_features_are_the_states_after_blocks(lm):
    params, tokens = lm
    logits, (first, last) = run(params, tokens, taps=(0, 2))
    close(logits, run(params, tokens))
    one = dataclasses.replace(CFG, depth=1)
    shallow = params | {"blocks": jax.tree.map(lambda w: w[:1], params["blocks"])}
    close(
        rms(first) * params["norm"]["scale"],
        run(shallow, tokens, cfg=one, hidden_only=True),
    )
    close(
        rms(last) * params["norm"]["scale"], run(params, tokens, hidden_only=True)
    )


def rms(x):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + CFG.norm_eps)


@pytest.mark.parametrize(("tied", "short"), [(False, 8), (True, 8), (False, 1)])
def test_cached_steps_equal_the_full_pass(tied, short, monkeypatch):
    """Layers with a store each, and layers that share one."""
    monkeypatch.setattr(layers, "SHORT", short)
    cfg = dataclasses.replace(CFG, tied=tied)
    params, tokens = draw(cfg)
    mask = jnp.arange(9) >= jnp.array([0, 2, 3])[:, None]
    cache = net(cfg).apply(params, 3, 12, method="init_cache")
    out = []
    for low, high in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        logits, cache = run(
            params,
            tokens[:, low:high],
            cfg=cfg,
            mask=mask[:, low:high],
            cache=cache,
        )
        out.append(logits)
    seen = np.asarray(mask)
    close(
        jnp.concatenate(out, 1)[seen], run(params, tokens, cfg=cfg, mask=mask)[seen]
    )
    assert int(cache["length"]) == 9
    assert (cache["valid"][:, :9] == mask).all() and not cache["valid"][:, 9:].any()


def test_what_follows_and_where_it_is_a_target():
    batch = {
        "tokens": jnp.array([[5, 6, 7], [8, 9, 3]]),
        "mask": jnp.array([[1.0, 0, 1], [0, 1, 1]]),
    }
    labels, mask = targets(batch)
    assert labels.tolist() == [[6, 7, 0], [9, 3, 0]]
    assert mask.tolist() == [[False, True, False], [True, True, False]]
    assert following(batch["tokens"], -1)[:, -1].tolist() == [-1, -1]


def test_features_through_the_cache(lm):
    params, tokens = lm
    cache = net(CFG).apply(params, 3, 9, method="init_cache")
    logits, _, features = run(params, tokens, cache=cache, taps=(0, 2))
    expected, expected_features = run(params, tokens, taps=(0, 2))
    for a, b in zip((logits, *features), (expected, *expected_features)):
        close(a, b)


def loss(cfg, params, tokens):
    return jnp.mean(jnp.sin(net(cfg).apply(params, tokens)))


@pytest.fixture(scope="module")
def gradient(lm):
    return jax.jit(jax.grad(lambda p: loss(CFG, p, lm[1])))(lm[0])


def test_remat_leaves_gradients_alone(lm, gradient):
    params, tokens = lm
    kept = dataclasses.replace(CFG, remat="full")
    found = jax.jit(jax.grad(lambda p: loss(kept, p, tokens)))(params)
    jax.tree.map(close, found, gradient)


def test_jvp_is_the_transpose_of_the_gradient(lm, gradient):
    params, tokens = lm
    tangent = jax.tree.map(jnp.cos, params)
    _, forward = jax.jit(
        lambda p, t: jax.jvp(lambda p: loss(CFG, p, tokens), (p,), (t,))
    )(params, tangent)
    terms = jnp.stack(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, tangent)))
    assert abs(forward - terms.sum()) <= TOL * jnp.abs(terms).sum()


def test_jvp_lowers_for_tpu(lm):
    params, tokens = lm
    f = jax.jit(
        lambda p, t: jax.jvp(lambda p: net(CFG).apply(p, tokens), (p,), (t,))[1]
    )
    assert jax.export.export(f, platforms=["tpu"])(params, params).out_avals[
        0
    ].shape == (3, 9, 31)


def test_stretched_frequencies():
    plain = dataclasses.replace(CFG, head_dim=32, rope_theta=1e4)
    stretched = frequencies(
        dataclasses.replace(plain, rope_factor=8.0, rope_original=256)
    )
    freqs = frequencies(plain)
    np.testing.assert_allclose(freqs, 1e4 ** (-np.arange(16) / 16), rtol=1e-6)
    turns = 256 * freqs / (2 * np.pi)
    np.testing.assert_array_equal(stretched[turns > 4], freqs[turns > 4])
    np.testing.assert_allclose(
        stretched[turns < 1], freqs[turns < 1] / 8, rtol=1e-6
    )
    between = (turns > 1) & (turns < 4)
    assert (
        between.any()
        and (stretched[between] < freqs[between]).all()
        and (stretched[between] > freqs[between] / 8).all()
    )


def test_refusals(lm):
    params, tokens = lm
    with pytest.raises(Refused, match="heads=4 must be a multiple of kv_heads=3"):
        make_net(dataclasses.replace(CFG, kv_heads=3))
    with pytest.raises(Refused, match="9 in a sequence, max_length=8"):
        run(params, tokens, cfg=dataclasses.replace(CFG, max_length=8))
    with pytest.raises(Refused, match="segments"):
        run(
            params,
            tokens,
            segments=tokens,
            cache=net(CFG).apply(params, 3, 9, method="init_cache"),
        )
