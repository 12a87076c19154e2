"""Qwen-Image against diffusers' `QwenImageTransformer2DModel`: the same outputs, the same weights,
both ways.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.denoisers.qwen_image import QwenImage

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
diffusers = pytest.importorskip(
    "diffusers", reason="parity with PyTorch needs diffusers"
)

SIZES = dict(
    patch_size=2,
    in_channels=12,
    out_channels=3,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=10,
    axes_dims_rope=(4, 6, 6),
)
VARIANTS = {"image": {}, "edit": {"zero_cond_t": True}}
# thousands of a power of two: PyTorch takes t / 1000, rounded
TIMES = [
    [0.0, 3.90625, 125.0],
    [500.0, 750.0, 1000.0],
]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, imported):
    """(name, PyTorch's model, its folder, our net, params, jitted call with features after the
    first and the last block).
    """
    torch.manual_seed(0)
    model, folder, net, params = imported(
        diffusers.QwenImageTransformer2DModel(**SIZES | VARIANTS[request.param])
    )
    return (
        request.param,
        model,
        folder,
        net,
        params,
        jax.jit(lambda *a: net.apply(params, *a, taps=(0, 2))),
    )


def inputs(rows, cols, *pictures):
    """x, and cond with texts of 7, 3 and 1 tokens and pictures of the given sizes."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype("f4")
    cond = {
        "text": draw(3, 7, 10),
        "mask": np.arange(7) < np.array([7, 3, 1])[:, None],
    }
    return draw(3, rows, cols, 3), cond | (
        {"image": tuple(draw(3, *size, 3) for size in pictures)} if pictures else {}
    )


def reference(model, x, t, cond):
    """(output, states of x's patches after the first and the last block)."""

    def pack(z):
        b, h, w, c = z.shape
        return (
            z.reshape(b, h // 2, 2, w // 2, 2, c)
            .transpose(0, 1, 3, 5, 2, 4)
            .reshape(b, -1, 4 * c)
        )

    pictures = [x, *cond.get("image", ())]
    tokens = torch.from_numpy(np.concatenate([pack(z) for z in pictures], 1))
    shapes = [[(1, z.shape[1] // 2, z.shape[2] // 2) for z in pictures]] * len(x)
    n = x.shape[1] * x.shape[2] // 4
    states = []
    keep = lambda *a: states.append(a[2][1][:, :n])
    hooks = [
        model.transformer_blocks[i].register_forward_hook(keep) for i in (0, -1)
    ]
    mask = torch.from_numpy(cond["mask"]) if "mask" in cond else None
    with torch.no_grad():
        out = model(
            tokens,
            torch.from_numpy(cond["text"]),
            mask,
            torch.from_numpy(t) / 1000,
            img_shapes=shapes,
        ).sample
    for hook in hooks:
        hook.remove()
    out = (
        out[:, :n]
        .numpy()
        .reshape(len(x), x.shape[1] // 2, x.shape[2] // 2, x.shape[3], 2, 2)
    )
    return out.transpose(0, 1, 4, 2, 5, 3).reshape(x.shape), states


@pytest.mark.parametrize(("size", "masked"), [((6, 4), True), ((4, 10), False)])
def test_outputs_and_features_agree(pair, agree, size, masked):
    name, model, _, _, _, call = pair
    x, cond = inputs(*size)
    cond = cond if masked else {"text": cond["text"]}
    for t in TIMES:
        ours, features = call(x, np.array(t, "f4"), cond)
        theirs, states = reference(model, x, np.array(t, "f4"), cond)
        agree(f"{name} {size} mask={masked} t={t[1]:g}", ours, theirs)
        for found, state in zip(features, states, strict=True):
            agree(f"{name} {size} t={t[1]:g} features", found, state)


def test_editing_agrees(pair, agree):
    """Pictures of other sizes behind x; in one network at its time, in the other at time 0."""
    name, model, _, net, params, _ = pair
    x, cond = inputs(6, 4, (4, 8), (2, 2))
    t = np.array(TIMES[1], "f4")
    call = jax.jit(net.apply)
    agree(
        f"{name} editing", call(params, x, t, cond), reference(model, x, t, cond)[0]
    )
    other = make_net(
        dataclasses.replace(
            net.config, clean_pictures=not net.config.clean_pictures
        )
    )
    assert (
        np.abs(
            jax.jit(other.apply)(params, x, t, cond) - call(params, x, t, cond)
        ).max()
        > 1e-3
    )


def test_masked_text_is_not_read(pair):
    _, _, _, _, _, call = pair
    x, cond = inputs(6, 4)
    t = np.array(TIMES[0], "f4")
    other = cond | {
        "text": np.where(cond["mask"][..., None], cond["text"], 9.0).astype("f4")
    }
    np.testing.assert_array_equal(call(x, t, cond)[0], call(x, t, other)[0])
    assert (
        np.abs(call(x, t, cond)[0] - call(x, t, {"text": cond["text"]})[0]).max()
        > 1e-3
    )


def test_round_trip_is_exact(pair, returns):
    _, model, _, net, params, _ = pair
    again = returns(diffusers.QwenImageTransformer2DModel, model, net, params)
    same = lambda a: tuple(a) if isinstance(a, list) else a
    assert all(
        same(again.config[key]) == same(value)
        for key, value in model.config.items()
        if key[0] != "_"
    )


def test_bfloat16(pair, halves):
    _, _, folder, net, params, call = pair
    halves(folder)
    small = make_net(
        cfg := dataclasses.replace(net.config, dtype="bfloat16"), config=cfg
    )
    x, cond = inputs(6, 4)
    t = np.array(TIMES[0], "f4")
    found = jax.jit(small.apply)(params, x, t, cond)
    expected = call(x, t, cond)[0]
    # 2^-8 a rounding, some tens of them
    assert (
        found.dtype == jnp.float32
        and np.abs(found - expected).mean() <= 0.05 * expected.std()
    )


def test_rematerialised_gradients_are_the_same(rematerialised):
    x, cond = inputs(4, 4)
    t = np.array(TIMES[0], "f4")
    rematerialised(QwenImage(channels=3, text_dim=10), x, t, cond)


def test_released_size(covers):
    """20B, arXiv:2508.02324, table 1."""
    cfg = QwenImage(
        channels=16, heads=24, axes=(16, 56, 56), depth=60, text_dim=3584
    )
    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel()
    covers(cfg, model, 20_430_401_088, interop.families.qwen_image.FAMILY)
    described = {
        key: value
        for key, value in interop.families.qwen_image.FAMILY.write(cfg)[
            "config.json"
        ].items()
        if key != "_class_name"
    }
    same = lambda a: list(a) if isinstance(a, tuple) else a
    assert described == {key: same(model.config[key]) for key in described}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"use_layer3d_rope": True},
            "use_layer3d_rope=True is not supported, expected False",
        ),
        (
            {"use_additional_t_cond": True},
            "use_additional_t_cond=True is not supported, expected False",
        ),
        (
            {"in_channels": 64},
            r"in_channels=64 is not supported, expected patch_size\^2 out_channels",
        ),
        ({"out_channels": None}, "out_channels is null"),
        (
            {"attention_head_dim": 8},
            "attention_head_dim=8 is not supported, expected 16",
        ),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "QwenImageTransformer2DModel", **SIZES} | change)
    )
    with pytest.raises(Refused, match=message):
        interop.describe(tmp_path)


def test_refuses_inputs_that_do_not_fit():
    net = make_net(QwenImage())
    call = lambda shape, cond, taps=(): jax.eval_shape(
        lambda p: net.apply(p, jnp.ones(shape), jnp.ones(1), cond, taps=taps),
        net.shapes,
    )
    text = {"text": jnp.ones((1, 5, 32))}
    with pytest.raises(
        Refused, match=r"QwenImage needs 'text' float \[B L 32\] .* it has mask"
    ):
        call((1, 4, 4, 4), {"mask": jnp.ones((1, 5), bool)})
    with pytest.raises(Refused, match="must be multiples of 2"):
        call((1, 5, 4, 4), text)
    with pytest.raises(Refused, match="must be multiples of 2"):
        call((1, 4, 4, 4), text | {"image": jnp.ones((1, 4, 3, 4))})
    with pytest.raises(Refused, match=r"taps=\(2,\): layers are numbered 0 to 1"):
        call((1, 4, 4, 4), text, (2,))


def test_forward_at_full_size_traces():
    """A picture of 1328 x 1328 pixels, 6889 patches, and 1024 tokens of text."""
    cfg = QwenImage(
        channels=16,
        heads=24,
        axes=(16, 56, 56),
        depth=60,
        text_dim=3584,
        dtype="bfloat16",
        remat="full",
    )
    net = make_net(cfg, config=cfg)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    x = shape(1, 166, 166, 16)
    text = shape(1, 1024, 3584)
    raw, features = jax.eval_shape(
        lambda p, x, t, text: net.apply(p, x, t, {"text": text}, taps=(30,)),
        net.shapes,
        x,
        shape(1),
        text,
    )
    assert (
        raw == x
        and features[0].shape == (1, 6889, 3072)
        and features[0].dtype == jnp.bfloat16
    )
