"""The deep-compression autoencoder against diffusers' `AutoencoderDC`: the same latents and images,
the same weights, both ways.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.autoencoders import vae_dc
from jaxdistill.models.autoencoders.vae_dc import DCAE

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
diffusers = pytest.importorskip(
    "diffusers", reason="parity with PyTorch needs diffusers"
)

RES = "ResBlock"
VIT = "EfficientViTBlock"
VARIANTS = {
    "sana": dict(
        attention_head_dim=8,
        latent_channels=4,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
        **{
            f"{half}_block_types": (RES, VIT, VIT)
            for half in ("encoder", "decoder")
        },
        **{
            f"{half}_block_out_channels": (8, 16, 16)
            for half in ("encoder", "decoder")
        },
        **{
            f"{half}_qkv_multiscales": ((), (5,), (5,))
            for half in ("encoder", "decoder")
        },
        encoder_layers_per_block=(1, 1, 2),
        decoder_layers_per_block=(2, 1, 1),
    ),
    # no blocks at the full resolution, as in the paper's own; heads that do not divide the width
    "shuffled": dict(
        attention_head_dim=8,
        latent_channels=3,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        encoder_block_types=VIT,
        encoder_block_out_channels=(4, 12, 16),
        encoder_qkv_multiscales=((), (), (3, 5)),
        encoder_layers_per_block=(0, 1, 1),
        encoder_out_shortcut=False,
        decoder_block_types=(RES, RES, VIT),
        decoder_block_out_channels=(4, 8, 16),
        decoder_qkv_multiscales=((), (), ()),
        decoder_layers_per_block=(0, 1, 2),
        decoder_norm_types=("rms_norm",) * 3,
        decoder_act_fns=("relu", "gelu", "silu"),
        decoder_in_shortcut=False,
        decoder_conv_act_fn="silu",
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, imported):
    """(name, PyTorch's model, its folder, our net and params, jitted encode and decode)."""
    torch.manual_seed(0)
    model, folder, net, params = imported(
        diffusers.AutoencoderDC(**VARIANTS[request.param])
    )
    encode, decode = (
        jax.jit(lambda x, method=method: net.apply(params, x, method=method))
        for method in ("encode", "decode")
    )
    return request.param, model, folder, net, params, encode, decode


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("f4")


def back(x):
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (8, 20)])
def test_latents_and_images_agree(pair, agree, size):
    """At (8, 8) the last level has 4 pixels, fewer than a head has channels, and attends through
    all scores.
    """
    name, model, _, _, _, encode, decode = pair
    x = draw(2, *size, 3)
    with torch.no_grad():
        latent = model.encode(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        ).latent
        image = model.decode(latent).sample
    mean, std = encode(x)
    agree(f"{name} {size} latent", mean, back(latent))
    agree(f"{name} {size} image", decode(back(latent).numpy()), back(image))
    assert std.shape == mean.shape and not std.any()


@pytest.mark.parametrize(
    ("height", "width", "path"), [(2, 4, "quadratic"), (3, 3, "linear")]
)
def test_attention_goes_through_the_scores_of_few_pixels_only(
    monkeypatch, height, width, path
):
    """PyTorch's limit: as many pixels as a head has channels."""
    seen = []
    for name in ("linear", "quadratic"):
        call = getattr(vae_dc, f"{name}_attention")
        monkeypatch.setattr(
            vae_dc,
            f"{name}_attention",
            lambda *qkv, name=name, call=call: (seen.append(name), call(*qkv))[1],
        )
    net = make_net(lambda rngs: vae_dc.Attention(16, 8, (3,), rngs, jnp.float32))
    jax.eval_shape(
        net.apply,
        net.shapes,
        jax.ShapeDtypeStruct((1, height, width, 16), "float32"),
    )
    assert seen == [path]


def test_both_attentions_are_one_function_with_one_gradient():
    q, k, v = np.random.default_rng(0).uniform(-1, 1, (3, 2, 6, 2, 4)).astype("f4")
    q[:, 0] = -1  # a pixel that attends to nothing gets 0
    q[:, 1:, :, 0] = k[:, 0, :, 0] = 1

    def run(attend):
        def loss(q, k, v):
            out = attend(nnx.relu(q), nnx.relu(k), v)
            return jnp.sum(jnp.sin(out)), out

        grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return out, grads

    (linear, linear_grads), (quadratic, quadratic_grads) = (
        run(vae_dc.linear_attention),
        run(vae_dc.quadratic_attention),
    )
    weights = jnp.einsum("btgk,bsgk->btgs", nnx.relu(q[:, 1:]), nnx.relu(k))
    expected = jnp.einsum(
        "btgs,bsgk->btgk", weights / weights.sum(-1, keepdims=True), v
    )
    for found in (linear, quadratic):
        assert not found[:, 0].any()
        np.testing.assert_allclose(found[:, 1:], expected, atol=1e-5)
    for a, b in zip(linear_grads, quadratic_grads):
        assert np.abs(a).max() > 1e-2
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("shrink", "grow"), [*zip(vae_dc.SHRINKS, vae_dc.GROWS)])
def test_shortcuts_alone_give_the_image_back(shrink, grow):
    """The first and last convolutions are identities and all other weights 0: 2 channels of 4
    pixels become 8 and return.
    """
    cfg = DCAE(
        channels=2,
        latents=8,
        encoder_widths=(2, 8),
        decoder_widths=(2, 8),
        encoder_attention=(False, False),
        decoder_attention=(False, False),
        shrink=shrink,
        grow=grow,
    )
    params = jax.tree.map(
        lambda s: jnp.zeros(s.shape), (net := make_net(cfg)).shapes
    )
    x = np.abs(draw(2, 4, 6, 2))
    params["encoder"]["conv_in"]["kernel"] = (
        params["encoder"]["conv_in"]["kernel"].at[1, 1].set(jnp.eye(2))
    )
    params["decoder"]["conv_out"]["kernel"] = (
        params["decoder"]["conv_out"]["kernel"].at[1, 1].set(jnp.eye(2))
    )
    params["decoder"]["norm_out"]["scale"] = jnp.ones(2)
    z, _ = net.apply(params, x, method="encode")
    np.testing.assert_array_equal(
        z,
        x.reshape(2, 2, 2, 3, 2, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 2, 3, 8),
    )
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + vae_dc.EPS)
    np.testing.assert_allclose(
        net.apply(params, z, method="decode"), normed, rtol=1e-5
    )


def test_round_trip_is_exact(pair, returns):
    name, model, _, net, params, _, _ = pair
    again = returns(diffusers.AutoencoderDC, model, net, params)
    spread = lambda value, like: (
        (value,) * len(like)
        if isinstance(value, str) and not isinstance(like, str)
        else value
    )
    plain = lambda value: json.loads(json.dumps(value))
    for key, value in model.config.items():
        if key[0] != "_" and (name, key) != (
            "sana",
            "downsample_block_type",
        ):  # "Conv" is "conv"
            found = again.config[key]
            assert plain(spread(found, value)) == plain(spread(value, found)), key
    z = torch.randn(1, model.config.latent_channels, 2, 3)
    with torch.no_grad():
        assert torch.equal(model.decode(z).sample, again.decode(z).sample)


def test_bfloat16(pair, halves):
    _, _, folder, net, params, encode, _ = pair
    halves(folder)
    small = make_net(
        cfg := dataclasses.replace(net.config, dtype="bfloat16"), config=cfg
    )
    x = draw(2, 8, 8, 3)
    found = jax.jit(lambda x: small.apply(params, x, method="encode")[0])(x)
    expected = encode(x)[0]
    # 2^-8 a rounding, some tens of them
    assert (
        found.dtype == jnp.float32
        and np.abs(found - expected).mean() <= 0.05 * expected.std()
    )


def test_normalise_and_back():
    cfg = DCAE(scale=0.5)
    net = make_net(cfg, config=cfg)
    z = jnp.arange(4.0)
    x0 = net.apply(net.shapes, z, method="normalise")
    np.testing.assert_array_equal(x0, z / 2)
    np.testing.assert_array_equal(
        net.apply(net.shapes, x0, method="denormalise"), z
    )


def test_gradients_through_decode_are_finite_and_rematerialisation_keeps_them():
    cfg = DCAE()
    params = jax.tree.map(lambda s: 0.3 * draw(*s.shape), make_net(cfg).shapes)
    z = draw(1, 3, 4, 4)

    def grads(remat):
        net = make_net(dataclasses.replace(cfg, remat=remat))
        return jax.jit(
            jax.grad(
                lambda p, z: jnp.mean(net.apply(p, z, method="decode") ** 2), (0, 1)
            )
        )(params, z)

    one = grads("none")
    other = grads("full")
    scale = max(jnp.abs(g).max() for g in jax.tree.leaves(one))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), one, other
    )
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(one))
    assert all(g.any() for g in jax.tree.leaves((one[0]["decoder"], one[1])))


def released():
    """SANA's f32c32, from the config.json of its pipelines
    (Efficient-Large-Model/Sana_600M_1024px_diffusers, folder vae).
    """
    levels = dict(
        widths=(128, 256, 512, 512, 1024, 1024),
        attention=(False,) * 3 + (True,) * 3,
        scales=((),) * 3 + ((5,),) * 3,
    )
    halves = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in levels.items()
    }
    return DCAE(
        latents=32,
        head_dim=32,
        encoder_layers=(2, 2, 2, 3, 3, 3),
        decoder_layers=(3,) * 6,
        decoder_acts=("silu",) * 6,
        **halves,
    )


def test_released_size(covers, tmp_path):
    config = {
        "_class_name": "AutoencoderDC",
        "attention_head_dim": 32,
        "decoder_act_fns": "silu",
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_types": [RES] * 3 + [VIT] * 3,
        "decoder_layers_per_block": [3] * 6,
        "decoder_norm_types": "rms_norm",
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "downsample_block_type": "Conv",
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_block_types": [RES] * 3 + [VIT] * 3,
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "in_channels": 3,
        "latent_channels": 32,
        "scaling_factor": 0.41407,
        "upsample_block_type": "interpolate",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert interop.describe(tmp_path) == released()
    with torch.device("meta"):
        model = diffusers.AutoencoderDC.from_config(config)
    covers(released(), model, 312_250_275, interop.families.vae_dc.FAMILY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"decoder_norm_types": ["batch_norm", "rms_norm"]},
            r"decoder_norm_types=\['batch_norm', 'rms_norm'\] is not supported, expected",
        ),
        (
            {"decoder_norm_types": "batch_norm"},
            "decoder_norm_types='batch_norm' is not supported, expected 'rms_norm'",
        ),
        (
            {"decoder_act_fns": "mish"},
            "decoder_act_fns='mish': expected one of gelu, relu, silu",
        ),
        (
            {"decoder_conv_act_fn": "mish"},
            "decoder_conv_act_fn='mish': expected one of gelu, relu, silu",
        ),
        (
            {"encoder_block_types": [RES, "ViTBlock"]},
            "encoder_block_types='ViTBlock': did you mean 'EfficientViTBlock'",
        ),
        (
            {"upsample_block_type": "InterpolateConv"},
            "upsample_block_type='InterpolateConv': did you mean 'interpolate'",
        ),
        (
            {"downsample_block_type": "avg_pool"},
            "downsample_block_type='avg_pool': expected one of Conv, conv, pixel_unshuffle",
        ),
        ({"latent_channels": None}, "latent_channels is missing"),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    config = interop.families.vae_dc.FAMILY.write(DCAE())["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert interop.describe(tmp_path) == DCAE()
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in (config | change).items() if v is not None})
    )
    with pytest.raises(Refused, match=message):
        interop.describe(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(decoder_widths=(8, 16, 16)),
            r"decoder_widths=\(8, 16, 16\), expected one for each of the 2 levels",
        ),
        (
            dict(decoder_acts=("silu",)),
            "decoder_acts=.* expected one for each of the 2 levels",
        ),
        (
            dict(decoder_acts=("mish", "silu")),
            "act='mish': expected one of gelu, relu, silu",
        ),
        (
            dict(encoder_layers=(1, 0)),
            r"layers=\(1, 0\): only the first of several levels may be empty",
        ),
        (
            dict(encoder_widths=(5, 16)),
            "averages on the way down: 20 channels are not a multiple of 16",
        ),
        (
            dict(decoder_widths=(5, 16)),
            "duplicates on the way up: 20 channels are not a multiple of 16",
        ),
        (dict(latents=3), "averages for z: 16 channels are not a multiple of 3"),
        (
            dict(latents=3, shortcut_out=False),
            "duplicates of z: 16 channels are not a multiple of 3",
        ),
        (
            dict(
                encoder_layers=(0, 1),
                encoder_widths=(8, 6),
                latents=2,
                shrink="pixel_unshuffle",
                head_dim=2,
            ),
            "6 channels are not a",
        ),
        (
            dict(encoder_scales=((), (4,))),
            "attention scale 4, expected an odd number",
        ),
        (
            dict(head_dim=32),
            "width 16 of a level with attention, expected at least head_dim=32",
        ),
        (
            dict(shrink="avg_pool"),
            "shrink='avg_pool': expected one of conv, pixel_unshuffle",
        ),
    ],
)
def test_refuses_sizes_that_do_not_fit(change, message):
    with pytest.raises(Refused, match=message):
        make_net(DCAE(**change))


def test_refuses_a_resolution_that_does_not_divide():
    net = make_net(DCAE())
    with pytest.raises(
        Refused, match=r"x \[1, 5, 4, 3\]: height and width must be multiples of 2"
    ):
        jax.eval_shape(
            lambda p: net.apply(p, jnp.ones((1, 5, 4, 3)), method="encode"),
            net.shapes,
        )


def test_sizes_survive_json():
    """A resumed run reads its config from JSON, which has lists for tuples inside tuples."""
    cfg = DCAE()
    assert DCAE(encoder_scales=([], [5]), decoder_scales=[[], [5]]) == cfg and hash(
        cfg
    )
