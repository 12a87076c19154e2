"""SANA against diffusers' `SanaTransformer2DModel`: outputs agree, and so do weights both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import forward_mode, make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.denoisers.sana import Sana, linear_attention

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
diffusers = pytest.importorskip(
    "diffusers", reason="parity with PyTorch needs diffusers"
)

SIZES = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=4,
    attention_head_dim=6,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=10,
    mlp_ratio=2.5,
    sample_size=8,
)
VARIANTS = {
    "text": {},
    "sprint": {
        "qk_norm": "rms_norm_across_heads",
        "guidance_embeds": True,
        "guidance_embeds_scale": 0.25,
    },
    "positions": {
        "interpolation_scale": 2.0,
        "patch_size": 2,
        "timestep_scale": 0.125,
        "norm_eps": 1e-5,
        "mlp_ratio": 1.7,
    },
}
TIMES = [[0.0, 3.5, 0.75], [500.0, 120.0, 1000.0]]
GRID = (6, 4)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, imported):
    """(name, PyTorch's model, its folder, our net, params, jitted call with features after the
    first and the last block).
    """
    torch.manual_seed(0)
    model, folder, net, params = imported(
        diffusers.SanaTransformer2DModel(**SIZES | VARIANTS[request.param])
    )
    return (
        request.param,
        model,
        folder,
        net,
        params,
        jax.jit(lambda *a: net.apply(params, *a, taps=(0, 2))),
    )


def inputs(cfg, rows, cols):
    """x, and cond with texts of 7, 3 and 1 tokens."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype("f4")
    cond = {
        "text": draw(3, 7, 10),
        "mask": np.arange(7) < np.array([7, 3, 1])[:, None],
    }
    return draw(3, rows, cols, 4), cond | (
        {"guidance": np.array([1.0, 4.5, 20.0], "f4")} if cfg.guidance else {}
    )


def reference(model, x, t, cond):
    """(output, states after the first and the last block), fed as diffusers' pipelines do; x
    channels first, a tensor.
    """
    states, keep = [], lambda *a: states.append(a[2])
    hooks = [
        model.transformer_blocks[i].register_forward_hook(keep) for i in (0, -1)
    ]
    mask = torch.from_numpy(cond["mask"].astype("f4")) if "mask" in cond else None
    guidance = (
        torch.from_numpy(cond["guidance"]) * model.config.guidance_embeds_scale
        if "guidance" in cond
        else None
    )
    t = torch.from_numpy(np.array(t, "f4")) * model.config.timestep_scale
    out = model(
        x,
        torch.from_numpy(cond["text"]),
        t,
        guidance=guidance,
        encoder_attention_mask=mask,
    ).sample
    for hook in hooks:
        hook.remove()
    return out, states


channels_first = lambda x: torch.from_numpy(np.moveaxis(x, -1, 1).copy())
channels_last = lambda x: np.moveaxis(x.detach().numpy(), 1, -1)


@pytest.mark.parametrize(("grid", "masked"), [(GRID, True), ((8, 8), False)])
def test_outputs_and_features_agree(pair, agree, grid, masked):
    name, model, _, net, _, call = pair
    x, cond = inputs(net.config, *grid)
    if not masked:
        cond.pop("mask")
    for t in TIMES:
        ours, features = call(x, np.array(t, "f4"), cond)
        with torch.no_grad():
            theirs, states = reference(model, channels_first(x), t, cond)
        agree(
            f"{name} {grid} mask={masked} t={t[0]:g}", ours, channels_last(theirs)
        )
        for found, state in zip(features, states, strict=True):
            agree(f"{name} {grid} mask={masked} t={t[0]:g} features", found, state)


def test_rematerialised_gradients_agree(pair, agree):
    """Of the mean square of the output, with respect to x and one weight of each block; at small
    times, whose features both sides round alike (those of t = 1000 differ by 1e-4, which weights of
    this size make 5e-4 of a gradient).
    """
    name, model, _, net, params, _ = pair
    x, cond = inputs(net.config, *GRID)
    again = make_net(dataclasses.replace(net.config, remat="full"))
    loss = lambda params, x: jnp.mean(
        again.apply(params, x, np.array(TIMES[0], "f4"), cond) ** 2
    )
    weights, ours = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    assert all(
        np.isfinite(w).all() and np.abs(w).max() > 0
        for w in jax.tree.leaves(weights)
    )
    there = channels_first(x).requires_grad_()
    convs = [block.ff.conv_depth.weight for block in model.transformer_blocks]
    theirs = torch.autograd.grad(
        reference(model, there, TIMES[0], cond)[0].square().mean(), [there, *convs]
    )
    agree(f"{name} gradient of x", ours, channels_last(theirs[0]))
    agree(
        f"{name} gradient of convolutions",
        weights["blocks"]["gated"]["depth"]["kernel"],
        torch.stack(theirs[1:]).permute(0, 3, 4, 2, 1),
    )


def test_masked_text_is_not_read(pair):
    _, _, _, net, _, call = pair
    x, cond = inputs(net.config, *GRID)
    t = np.array(TIMES[0], "f4")
    other = cond | {
        "text": np.where(cond["mask"][..., None], cond["text"], 9.0).astype("f4")
    }
    np.testing.assert_array_equal(call(x, t, cond)[0], call(x, t, other)[0])
    assert (
        np.abs(
            call(x, t, cond)[0]
            - call(x, t, cond | {"mask": np.ones((3, 7), bool)})[0]
        ).max()
        > 1e-3
    )


def test_round_trip_is_exact(pair, returns):
    _, model, _, net, params, _ = pair
    again = returns(diffusers.SanaTransformer2DModel, model, net, params)
    assert all(
        again.config[key] == value
        for key, value in model.config.items()
        if key[0] != "_"
    )


def test_the_cards_call_is_the_pipelines(pair):
    _, model, _, net, _, _ = pair
    family = interop.families.sana.FAMILY
    scope = {
        "torch": torch,
        "model": model,
        "x": torch.ones(2, 4, 4, 4),
        "t": torch.tensor([20.0, 900.0]),
    }
    exec(family.given.format(**vars(net.config)), scope)
    cond = {"text": scope["cond"].numpy()} | (
        {"guidance": np.full(2, 4.5, "f4")} if net.config.guidance else {}
    )
    with torch.no_grad():
        assert torch.equal(
            eval(family.call.format(x="x", t="t"), scope),
            reference(model, scope["x"], [20.0, 900.0], cond)[0],
        )


def test_bfloat16(pair, halves):
    _, _, folder, net, params, call = pair
    halves(folder)
    small = make_net(
        cfg := dataclasses.replace(net.config, dtype="bfloat16"), config=cfg
    )
    x, cond = inputs(net.config, *GRID)
    t = np.array(TIMES[0], "f4")
    found = jax.jit(small.apply)(params, x, t, cond)
    expected = call(x, t, cond)[0]
    # 2^-8 a rounding, some tens of them
    assert (
        found.dtype == jnp.float32
        and np.abs(found - expected).mean() <= 0.05 * expected.std()
    )


def test_forward_and_reverse_derivatives_are_one():
    """<u, J v> = <J^T u, v> for x and t (SANA-Sprint trains on J v)."""
    net = make_net(cfg := Sana(text_dim=10, qk_norm=True, guidance=True))
    (x, cond), t, rng = (
        inputs(cfg, 4, 4),
        np.array([0.3, 0.5, 0.9], "f4"),
        np.random.default_rng(1),
    )
    draw = lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype("f4")
    params = jax.tree.map(draw, net.shapes)
    v = draw(x)
    u = draw(x)

    @jax.jit
    def products(x, t):
        call = lambda x, t: net.apply(params, x, t, cond)
        with forward_mode():
            ahead = jax.jvp(call, (x, t), (v, jnp.ones_like(t)))[1]
        back, time = jax.vjp(call, x, t)[1](u)
        return (
            jnp.vdot(u, ahead),
            jnp.vdot(back, v) + time.sum(),
            jnp.linalg.norm(ahead) * jnp.linalg.norm(u),
        )

    ahead, back, size = products(x, t)
    assert abs(ahead - back) <= 1e-5 * size and size > 0


def test_linear_attention_is_the_quadratic_form():
    """Also for values in bfloat16, which it reads exactly, and without an array of T x S."""
    rng = np.random.default_rng(0)
    q, k, v = (
        np.maximum(rng.standard_normal((2, n, 3, 4)), low).astype("f4")
        for n, low in ((40, 0), (50, 0), (50, -9))
    )
    scores = np.einsum("bthk,bshk->bhts", q.astype("f8"), k)
    expected = np.einsum(
        "bhts,bshd->bthd", scores / (scores.sum(-1, keepdims=True) + 1e-15), v
    )
    # sums of 50 terms of size 1
    np.testing.assert_allclose(
        linear_attention(q, k, v), expected, rtol=1e-5, atol=1e-5
    )
    half = linear_attention(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)))
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(
        half,
        linear_attention(
            *(np.asarray(jnp.asarray(a, jnp.bfloat16), "f4") for a in (q, k, v))
        ),
    )
    traced = jax.make_jaxpr(
        jax.grad(lambda *a: linear_attention(*a).sum(), (0, 1, 2))
    )(*(np.ones((1, 99, 1, 4), "f4"),) * 3)
    assert (
        max(var.aval.size for eqn in traced.eqns for var in eqn.outvars) < 99 * 99
    )


def test_a_query_without_keys_is_zero_and_has_finite_gradients():
    ones = np.ones((1, 3, 2, 4), "f4")
    attend = lambda q, k, v: linear_attention(
        jax.nn.relu(q), jax.nn.relu(k), v
    ).sum()
    values = jax.jit(jax.value_and_grad(attend, (0, 1, 2)))
    for q, k in ((-ones, ones), (ones, -ones), (-ones, -ones)):
        out, grads = values(q, k, ones)
        assert out == 0 and all(np.isfinite(g).all() for g in grads)


BIG = Sana(
    size=32,
    channels=32,
    dim=2240,
    depth=20,
    heads=70,
    cross_heads=20,
    text_dim=2304,
)


@pytest.mark.parametrize(
    ("change", "theirs", "count"),
    [  # arXiv:2410.10629, table 1: 1.6B and 0.6B; 2501.18427: 4.8B; 2503.09641
        ({}, {}, 1_604_462_752),
        (
            {"dim": 1152, "depth": 28, "heads": 36, "cross_heads": 16},
            dict(
                num_attention_heads=36,
                num_layers=28,
                num_cross_attention_heads=16,
                cross_attention_head_dim=72,
                cross_attention_dim=1152,
            ),
            591_747_872,
        ),
        (
            {"depth": 60, "qk_norm": True},
            dict(num_layers=60, qk_norm="rms_norm_across_heads"),
            4_721_825_952,
        ),
        (
            {"qk_norm": True, "guidance": True},
            dict(qk_norm="rms_norm_across_heads", guidance_embeds=True),
            1_610_237_472,
        ),
    ],
    ids=["1.6B", "0.6B", "1.5 4.8B", "Sprint 1.6B"],
)
def test_released_sizes(covers, change, theirs, count):
    cfg = dataclasses.replace(BIG, **change)
    with torch.device("meta"):
        model = diffusers.SanaTransformer2DModel(**theirs)
    covers(cfg, model, count, interop.families.sana.FAMILY)
    described = {
        key: value
        for key, value in interop.families.sana.FAMILY.write(cfg)[
            "config.json"
        ].items()
        if key != "_class_name"
    }
    assert described == {
        key: value for key, value in model.config.items() if key[0] != "_"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention_bias": True},
            "attention_bias=True is not supported, expected False",
        ),
        (
            {"norm_elementwise_affine": True},
            "norm_elementwise_affine=True is not supported, expected False",
        ),
        ({"dropout": 0.1}, "dropout=0.1 is not supported, expected 0.0"),
        (
            {"cross_attention_head_dim": 6},
            r"num_cross_attention_heads \* cross_attention_head_dim = 12 is not supported, "
            "expected 24",
        ),
        (
            {"cross_attention_dim": None},
            "cross_attention_dim=None is not supported, expected 24",
        ),
        (
            {"out_channels": 8},
            "out_channels=8 is not supported, expected in_channels=4",
        ),
        (
            {"qk_norm": "rms_norm"},
            "qk_norm='rms_norm' is not supported, expected None or 'rms_norm_across_heads'",
        ),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    config = {
        "_class_name": "SanaTransformer2DModel",
        **SIZES,
        "patch_size": 1,
        "norm_eps": 1e-6,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert interop.describe(tmp_path) == Sana(dim=24, depth=3, text_dim=10)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Refused, match=message):
        interop.describe(tmp_path)


def test_refuses_inputs_that_do_not_fit():
    net = make_net(Sana(patch=2))
    call = lambda shape, cond, net=net, taps=(): jax.eval_shape(
        lambda p: net.apply(p, jnp.ones(shape), jnp.ones(1), cond, taps=taps),
        net.shapes,
    )
    text = {"text": jnp.ones((1, 5, 16))}
    with pytest.raises(
        Refused, match=r"Sana needs 'text' float \[B L 16\] .* it has mask"
    ):
        call((1, 4, 4, 4), {"mask": jnp.ones((1, 5), bool)})
    with pytest.raises(
        Refused, match="'guidance' is not read by Sana; it has guidance, text"
    ):
        call((1, 4, 4, 4), text | {"guidance": jnp.ones(1)})
    with pytest.raises(
        Refused, match=r"Sana needs 'guidance' number \[B\] .* it has text"
    ):
        call((1, 4, 4, 4), text, make_net(Sana(guidance=True)))
    with pytest.raises(Refused, match="must be multiples of 2"):
        call((1, 4, 5, 4), text)
    with pytest.raises(Refused, match=r"taps=\(2,\): layers are numbered 0 to 1"):
        call((1, 4, 4, 4), text, taps=(2,))


def test_forward_at_full_size_traces():
    """1.6B at 4096 x 4096 pixels, 16384 latents, and 300 tokens of text."""
    cfg = dataclasses.replace(
        BIG, size=128, interpolation=2.0, dtype="bfloat16", remat="full"
    )
    net = make_net(cfg, config=cfg)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    x = shape(1, 128, 128, 32)
    text = shape(1, 300, 2304)
    raw, features = jax.eval_shape(
        lambda p, x, t, text: net.apply(p, x, t, {"text": text}, taps=(10,)),
        net.shapes,
        x,
        shape(1),
        text,
    )
    assert (
        raw == x
        and features[0].shape == (1, 16384, 2240)
        and features[0].dtype == jnp.bfloat16
    )
