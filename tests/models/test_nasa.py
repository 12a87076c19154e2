"""NASA: a negative prompt inside cross-attention (arXiv:2412.02687), as a function, in the U-Net,
in Wan and in SANA.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.attention import Negative, attention, nasa, negative_prompt
from jaxdistill.models.denoisers import sana, unet, wan
from jaxdistill.models.denoisers.sana import Sana
from jaxdistill.models.denoisers.unet import UNet
from jaxdistill.models.denoisers.wan import Wan

B = 2
T = 5
H = 2
K = 4


def draw(*shape, seed=0):
    return jnp.asarray(
        np.random.default_rng(seed).standard_normal(shape), jnp.float32
    )


Q = draw(B, T, H, K)
POSITIVE = draw(B, 6, H, K, seed=1), draw(B, 6, H, K, seed=2)
NEGATIVE = draw(B, 3, H, K, seed=3), draw(B, 3, H, K, seed=4)
alphas = lambda *values: jnp.reshape(jnp.array(values), (-1, 1, 1, 1))


def test_it_is_the_difference_of_two_attentions():
    """Linear in alpha, for each sample its own; alpha = 0 is the positive prompt alone."""
    z = attention(Q, *POSITIVE)
    away = attention(Q, *NEGATIVE)
    np.testing.assert_allclose(
        nasa(Q, *POSITIVE, *NEGATIVE, alphas(0.0)), z, rtol=1e-6
    )
    for alpha in (0.3, 1.0, 2.0):
        change = nasa(Q, *POSITIVE, *NEGATIVE, alphas(alpha)) - nasa(
            Q, *POSITIVE, *NEGATIVE, alphas(0.0)
        )
        np.testing.assert_allclose(change, -alpha * away, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        nasa(Q, *POSITIVE, *NEGATIVE, alphas(0.0, 1.0)),
        z - alphas(0.0, 1.0) * away,
        rtol=1e-5,
        atol=1e-6,
    )


def test_equal_prompts_shrink_and_vanish():
    mask = (jnp.arange(6) < jnp.array([[6], [4]]))[:, None, None]
    z = attention(Q, *POSITIVE, mask=mask)
    both = lambda alpha: nasa(
        Q, *POSITIVE, *POSITIVE, alphas(alpha), mask=mask, negative_mask=mask
    )
    np.testing.assert_allclose(both(0.4), 0.6 * z, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(both(1.0), jnp.zeros_like(z))


def test_masked_tokens_of_the_negative_prompt_do_nothing():
    mask = (jnp.arange(3) < jnp.array([[1], [2]]))[:, None, None]
    other = tuple(x.at[:, 2].add(100.0) for x in NEGATIVE)
    out = [
        nasa(Q, *POSITIVE, *negative, alphas(0.7), negative_mask=mask)
        for negative in (NEGATIVE, other)
    ]
    np.testing.assert_array_equal(*out)


def test_what_is_left_of_shared_tokens():
    """Negative: the shared tokens; positive: those and one more, x. At alpha = 1, Z+ - Z- = w_x
    (V_x - Z-).
    """
    (k, v), x = POSITIVE, 5
    shared = k[:, :x], v[:, :x]
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", Q, k) / K**0.5)
    w = rearrange(weights[..., x], "b h t -> b t h 1")
    away = attention(Q, *shared)
    np.testing.assert_allclose(
        nasa(Q, k, v, *shared, alphas(1.0)),
        w * (v[:, x : x + 1] - away),
        rtol=1e-4,
        atol=1e-6,
    )
    # scores of x far below the others
    faint = nasa(jnp.abs(Q), k.at[:, x].set(-30.0), v, *shared, alphas(1.0))
    assert jnp.abs(faint).max() < 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_half_precision_stays_half(dtype):
    half = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    assert (
        nasa(half(Q), *half(POSITIVE), *half(NEGATIVE), alphas(0.5)).dtype == dtype
    )


def test_a_prompt_and_its_strength_come_together():
    text = draw(B, 3, 8)
    assert negative_prompt({"text": text}) is None
    for alone in ({"negative": text}, {"nasa": 0.5}):
        with pytest.raises(Refused, match="expected 'negative' and 'nasa'"):
            negative_prompt({"text": text, **alone})
    found = negative_prompt({"negative": text, "nasa": 0.5})
    assert found.mask is None and found.alpha.shape == (1, 1, 1, 1)
    found = negative_prompt(
        {
            "negative": text,
            "nasa": jnp.ones(B),
            "negative_mask": jnp.ones((B, 3), bool),
        }
    )
    assert found.mask.shape == (B, 1, 1, 3) and found.alpha.shape == (B, 1, 1, 1)


@pytest.mark.parametrize("family", ["unet", "wan", "sana"])
def test_before_the_output_projection(family):
    """out(alpha) - out(0) = -alpha W_o Z-; at alpha = 1 and equal prompts only the bias is left.
    One norm of keys serves both.
    """
    dim = 8
    with nnx.use_eager_sharding(False):
        if family == "unet":
            layer = unet.Attention(dim, 6, H, nnx.Rngs(0), jnp.float32)
            source = 6
            keys = lambda s: layer.to_k(s)
        else:
            make = {
                "wan": lambda r: wan.Attention(Wan(dim=dim, heads=H), r),
                "sana": lambda r: sana.CrossAttention(
                    Sana(dim=dim, qk_norm=True), H, r, bias=False
                ),
            }
            layer = make[family](nnx.Rngs(0))
            source = dim
            layer.norm_k.scale[...] = 1 + draw(dim, seed=9)
            keys = lambda s: layer.norm_k(layer.to_k(s))
        layer.to_out.bias[...] = draw(dim, seed=8)
    x = draw(B, T, dim)
    text = draw(B, 4, source, seed=1)
    other = draw(B, 3, source, seed=2)
    out = lambda alpha, negative: layer(
        x, text, negative=Negative(negative, None, alphas(alpha))
    )
    heads = lambda h: rearrange(h, "b n (h k) -> b n h k", h=H)
    queries = layer.to_q(x) if family == "unet" else layer.norm_q(layer.to_q(x))
    away = rearrange(
        attention(heads(queries), heads(keys(other)), heads(layer.to_v(other))),
        "b n h k -> b n (h k)",
    )
    np.testing.assert_allclose(
        out(0.0, other), layer(x, text), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        out(0.6, other) - out(0.0, other),
        -0.6 * away @ layer.to_out.kernel[...],
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        out(1.0, text), jnp.broadcast_to(layer.to_out.bias[...], x.shape), rtol=1e-6
    )


def moved(net):
    """Its weights, all of them away from their start (biases and output maps begin at zero)."""
    weights = net.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(weights))))
    return jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape), weights
    )


SMALL = UNet(
    size=4,
    widths=(8, 8),
    layers=1,
    depths=(1, 0),
    heads=(2, 2),
    text_dim=6,
    groups=4,
)
VIDEO = Wan(dim=24, mlp=16, heads=2, text_dim=6, time_dim=8)
IMAGE = Sana(dim=24, text_dim=6)
UNETS, WANS, SANAS = (make_net(cfg, config=cfg) for cfg in (SMALL, VIDEO, IMAGE))
MODELS = {
    "unet": (UNETS, (B, 4, 4, 4)),
    "wan": (WANS, (B, 2, 4, 4, 4)),
    "sana": (SANAS, (B, 4, 4, 4)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """(weights' network, weights, x, jitted call of x's condition)."""
    net, shape = MODELS[request.param]
    params = moved(net)
    x = draw(*shape)
    return (
        net,
        params,
        x,
        jax.jit(
            lambda params, cond: net.apply(
                params, x, jnp.array([10.0, 900.0]), cond
            )
        ),
    )


COND = {"text": draw(B, 5, 6), "mask": jnp.arange(5) < jnp.array([[5], [3]])}
AWAY = {
    "negative": draw(B, 3, 6, seed=5),
    "negative_mask": jnp.arange(3) < jnp.array([[3], [1]]),
}


@pytest.mark.full
def test_a_whole_network(model, compilations):
    """alpha = 0 is the plain network; masked tokens do nothing; strength may be a number or one for
    each sample, traced.
    """
    _, params, _, call = model
    plain = call(params, COND)
    at = lambda alpha, **more: call(params, {**COND, **AWAY, "nasa": alpha, **more})
    np.testing.assert_allclose(at(jnp.float32(0)), plain, rtol=1e-5, atol=1e-5)
    away = at(jnp.float32(0.8))
    assert jnp.abs(away - plain).max() > 1e-3
    other = jnp.where(AWAY["negative_mask"][..., None], AWAY["negative"], 7.0)
    np.testing.assert_array_equal(at(jnp.float32(0.8), negative=other), away)
    before = compilations["<lambda>"]
    each = at(jnp.array([0.0, 0.8]))
    np.testing.assert_allclose(
        each, jnp.stack([plain[0], away[1]]), rtol=1e-5, atol=1e-5
    )
    at(jnp.array([0.3, 0.5]))
    # another value is no other program
    assert compilations["<lambda>"] == before + 1


def test_an_exported_student_takes_it_too(model, tmp_path):
    """Saved in PyTorch's layout and read again: the same answer to a negative prompt."""
    net, params, x, call = model
    cond = {**COND, **AWAY, "nasa": jnp.float32(0.5)}
    interop.save(tmp_path, net, params)
    again, weights = interop.load(tmp_path)
    assert type(again.config) is type(net.config)
    found = jax.jit(
        lambda p, cond: again.apply(p, x, jnp.array([10.0, 900.0]), cond)
    )(weights, cond)
    np.testing.assert_allclose(found, call(params, cond), rtol=1e-6, atol=1e-6)


@pytest.mark.full
def test_rematerialised_gradients_are_the_same():
    cond = {**COND, **AWAY, "nasa": jnp.float32(0.5)}
    x = draw(B, 4, 4, 4)
    params = moved(UNETS)
    nets = [
        make_net(dataclasses.replace(UNETS.config, remat=remat))
        for remat in ("none", "full")
    ]
    grads = [
        jax.jit(
            jax.grad(lambda p, n=n: jnp.mean(n.apply(p, x, jnp.ones(B), cond) ** 2))
        )(params)
        for n in nets
    ]
    scale = max(jnp.abs(g).max() for g in jax.tree.leaves(grads[0]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), *grads
    )
