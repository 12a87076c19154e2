"""Wan against diffusers' `WanTransformer3DModel`: the same outputs, the same weights, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net, paths
from jaxdistill.core.types import Refused
from jaxdistill.interop.families.wan import experts
from jaxdistill.models.denoisers.wan import Wan

torch = pytest.importorskip("torch", reason="torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SIZES = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=14,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    freq_dim=32,
    ffn_dim=40,
    num_layers=3,
)
KINDS = {
    "text": {},
    "image": {"in_channels": 9, "image_dim": 12, "added_kv_proj_dim": 28},
    "frames": {
        "in_channels": 9,
        "image_dim": 12,
        "added_kv_proj_dim": 28,
        "pos_embed_seq_len": 6,
    },  # first and last frame
}
SHAPES = [(3, 4, 6), (2, 6, 4)]  # latent frames, height, width


@pytest.fixture(scope="module", params=KINDS)
def pair(request, imported):
    """(PyTorch's model, its folder, our net, params, jitted call)."""
    torch.manual_seed(0)
    model, folder, net, params = imported(
        diffusers.WanTransformer3DModel(**SIZES | KINDS[request.param])
    )
    return (
        model,
        folder,
        net,
        params,
        jax.jit(lambda x, t, cond: net.apply(params, x, t, cond)),
    )


def inputs(cfg, shape, batch=2):
    """x and cond. PyTorch's image networks split text from image states at 512 text tokens, hence
    that length.
    """
    draw = lambda *shape: (
        np.random.default_rng(len(shape)).standard_normal(shape).astype("f4")
    )
    cond = {"text": draw(batch, 512 if cfg.vision_dim else 7, cfg.text_dim)}
    if cfg.vision_dim:
        cond |= {
            "image": draw(batch, *shape, cfg.image_channels),
            "vision": draw(batch, 6, cfg.vision_dim),
        }
    return draw(batch, *shape, cfg.channels), cond


def theirs(model, cfg, x, t, cond):
    first = lambda a: torch.from_numpy(np.moveaxis(a, -1, 1).copy())
    x = np.concatenate([x, cond["image"]], -1) if "image" in cond else x
    vision = torch.from_numpy(cond["vision"]) if "vision" in cond else None
    if cfg.vision_length:  # there, the two images of a sample are two rows
        vision = vision.reshape(-1, vision.shape[1] // 2, vision.shape[2])
    with torch.no_grad():
        out = model(
            first(x),
            torch.from_numpy(t),
            torch.from_numpy(cond["text"]),
            encoder_hidden_states_image=vision,
        ).sample
    return np.moveaxis(out.numpy(), 1, -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_agree(pair, shape, record_property):
    model, _, net, _, call = pair
    x, cond = inputs(net.config, shape)
    for t in ([0.0, 3.5], [500.0, 999.0]):
        expected = theirs(model, net.config, x, np.array(t, "f4"), cond)
        error = (
            np.abs(call(x, np.array(t, "f4"), cond) - expected).max()
            / expected.std()
        )
        record_property(f"error_over_std_t{t[0]:g}", float(error))
        assert error <= 1e-4


def test_times_of_patches_and_frames_agree(pair, record_property):
    model, _, net, _, call = pair
    shape = (3, 4, 6)
    x, cond = inputs(net.config, shape)
    each = np.random.default_rng(1).uniform(0, 999, (2, 18)).astype("f4")
    frames = np.array([[0, 700, 700], [0, 20, 20]], "f4")
    found = {}
    for name, t, there in (
        ("patches", each, each),
        ("frames", frames, frames.repeat(6, 1)),
    ):
        expected = theirs(model, net.config, x, there, cond)
        found[name] = float(
            np.abs(call(x, t, cond) - expected).max() / expected.std()
        )
        record_property(f"error_over_std_{name}", found[name])
    assert max(found.values()) <= 1e-4
    same = call(x, np.full((2, 3), 40, "f4"), cond) - call(
        x, np.full(2, 40, "f4"), cond
    )
    assert np.abs(same).max() <= 1e-5  # float32 sums in another order at most


def test_masked_text_is_zero_and_still_attended_to(pair):
    _, _, net, _, call = pair
    x, cond = inputs(net.config, SHAPES[0])
    t = np.array([10.0, 900.0], "f4")
    mask = np.arange(cond["text"].shape[1]) < np.array([[3], [5]])
    masked = call(x, t, cond | {"mask": mask})
    zeroed = call(x, t, cond | {"text": cond["text"] * mask[..., None]})
    # two programs: float32 sums in another order
    np.testing.assert_allclose(masked, zeroed, atol=1e-5)
    assert np.abs(masked - call(x, t, cond)).max() > 1e-3


def test_features(pair):
    _, _, net, params, call = pair
    x, cond = inputs(net.config, SHAPES[0])
    t = np.array([10.0, 900.0], "f4")
    raw, features = jax.jit(
        lambda x, t, cond: net.apply(params, x, t, cond, taps=(0, 2))
    )(x, t, cond)
    assert [f.shape for f in features] == [(2, 18, 28)] * 2 and np.abs(
        features[0] - features[1]
    ).max() > 0.1
    np.testing.assert_allclose(raw, call(x, t, cond), atol=1e-5)


def test_round_trip_is_exact(pair, tmp_path):
    model, _, net, params, _ = pair
    interop.save(tmp_path / "out", net, params)
    again, info = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    ours, there = (dict(m.config) for m in (again, model))
    assert all(
        ours[key] == there[key] or tuple(ours[key]) == tuple(there[key])
        for key in there
        if key[0] != "_"
    )


@pytest.mark.full
def test_bfloat16(pair):
    _, folder, net, params, call = pair
    half = interop.load(folder, "bfloat16")[1]
    for path, w in paths(half).items():
        assert w.dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            w, paths(params)[path].astype(jnp.bfloat16), err_msg=path
        )
    small = make_net(
        cfg := Wan(**{**vars(net.config), "dtype": "bfloat16"}), config=cfg
    )
    x, cond = inputs(net.config, SHAPES[0])
    t = np.array([10.0, 900.0], "f4")
    expected = call(x, t, cond)
    found = jax.jit(small.apply)(half, x, t, cond)
    # 2^-8 a rounding, some tens of them
    assert (
        found.dtype == jnp.float32
        and np.abs(found - expected).mean() <= 0.05 * expected.std()
    )


@pytest.mark.parametrize(
    ("cfg", "size", "theirs"),
    [  # arXiv:2503.20314 and the cards of Wan-AI: 1.3B, 14B, 14B, and TI2V-5B
        (
            Wan(channels=16, dim=1536, mlp=8960, depth=30, heads=12, text_dim=4096),
            1.42e9,
            {},
        ),
        (
            Wan(
                channels=16, dim=5120, mlp=13824, depth=40, heads=40, text_dim=4096
            ),
            14.29e9,
            {},
        ),
        (
            Wan(
                channels=16,
                image_channels=20,
                vision_dim=1280,
                dim=5120,
                mlp=13824,
                depth=40,
                heads=40,
                text_dim=4096,
            ),
            16.40e9,
            {},
        ),
        (
            Wan(
                channels=48, dim=3072, mlp=14336, depth=30, heads=24, text_dim=4096
            ),
            5.00e9,
            {},
        ),
    ],
)
def test_released_sizes(cfg, size, theirs):
    net = make_net(cfg, config=cfg)
    with torch.device("meta"):
        settings = {
            k: v
            for k, v in interop.families.wan.FAMILY.write(cfg)[
                "config.json"
            ].items()
            if k != "_class_name"
        }
        model = diffusers.WanTransformer3DModel(**settings)
    assert net.size == sum(p.numel() for p in model.parameters())
    assert abs(net.size / size - 1) < 0.005


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cross_attn_norm": False},
            "cross_attn_norm=False is not supported, expected True",
        ),
        (
            {"added_kv_proj_dim": 28},
            "added_kv_proj_dim=28 is not supported with image_dim=None, expected None",
        ),
        (
            {"out_channels": 8},
            "out_channels=8 is not supported, expected at most in_channels=4",
        ),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"_class_name": "WanTransformer3DModel", **SIZES, "eps": 1e-6} | change
        )
    )
    with pytest.raises(Refused, match=message):
        interop.describe(tmp_path)


def test_refuses_inputs_that_do_not_fit():
    net = make_net(Wan())
    call = lambda shape, t, cond: jax.eval_shape(
        net.apply, net.shapes, jnp.ones(shape), jnp.ones(t), cond
    )
    text = {"text": jnp.ones((1, 5, 32))}
    with pytest.raises(Refused, match=r"Wan needs 'text' float \[B L 32\]"):
        call((1, 2, 4, 4, 4), 1, {"mask": jnp.ones((1, 5), bool)})
    with pytest.raises(
        Refused, match="'vision' is not read by Wan; it has text, vision"
    ):
        call((1, 2, 4, 4, 4), 1, text | {"vision": jnp.ones((1, 5, 32))})
    with pytest.raises(Refused, match=r"multiples of \(1, 2, 2\)"):
        call((1, 2, 5, 4, 4), 1, text)
    with pytest.raises(Refused, match="M dividing the 8 patches"):
        call((1, 2, 4, 4, 4), (1, 3), text)


def test_experts(tmp_path):
    entry = ["diffusers", "WanTransformer3DModel"]
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.875,
        "transformer": entry,
        "transformer_2": entry,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert experts(tmp_path) == (
        tmp_path / "transformer",
        tmp_path / "transformer_2",
        0.875,
    )
    for change in ({"boundary_ratio": None}, {"transformer_2": [None, None]}):
        (tmp_path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(Refused, match="expected boundary_ratio"):
            experts(tmp_path)


def test_forward_at_full_size_traces():
    """14 B at 32 760 patches: 81 frames of 832 x 480, as in the paper."""
    cfg = Wan(
        channels=16,
        dim=5120,
        mlp=13824,
        depth=40,
        heads=40,
        text_dim=4096,
        dtype="bfloat16",
        remat="full",
    )
    net = make_net(cfg, config=cfg)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    x = shape(1, 21, 60, 104, 16)
    text = shape(1, 512, 4096)
    raw, features = jax.eval_shape(
        lambda p, x, t, text: net.apply(p, x, t, {"text": text}, taps=(20,)),
        net.shapes,
        x,
        shape(1),
        text,
    )
    assert (
        raw == x
        and features[0].shape == (1, 32760, 5120)
        and features[0].dtype == jnp.bfloat16
    )
