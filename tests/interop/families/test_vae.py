"""The autoencoder against diffusers' `AutoencoderKL`: the same latents and images, the same
weights, both ways.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.autoencoders.vae import VAE

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
diffusers = pytest.importorskip(
    "diffusers", reason="parity with PyTorch needs diffusers"
)

VARIANTS = {
    "sd": dict(latent_channels=4, scaling_factor=0.18215),
    "flux": dict(
        latent_channels=6,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "plain_middle": dict(
        latent_channels=4, mid_block_add_attention=False, layers_per_block=2
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, imported):
    """(name, torch model, its folder, our net and params)."""
    torch.manual_seed(0)
    levels = dict(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
    )
    model, folder, net, params = imported(
        diffusers.AutoencoderKL(
            **levels, norm_num_groups=4, sample_size=16, **VARIANTS[request.param]
        )
    )
    return request.param, model, folder, net, params


@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_latents_and_images_agree(pair, agree, size):
    name, model, _, net, params = pair
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype("f4")
    with torch.no_grad():
        latent = model.encode(torch.from_numpy(x.transpose(0, 3, 1, 2))).latent_dist
        image = model.decode(latent.mean).sample
    mean, std = jax.jit(lambda x: net.apply(params, x, method="encode"))(x)
    agree(f"{name} {size} mean", mean, latent.mean.permute(0, 2, 3, 1))
    agree(f"{name} {size} std", std, latent.std.permute(0, 2, 3, 1))
    ours = jax.jit(lambda z: net.apply(params, z, method="decode"))(
        latent.mean.permute(0, 2, 3, 1).numpy()
    )
    agree(f"{name} {size} image", ours, image.permute(0, 2, 3, 1))


def test_round_trip_is_exact(pair, returns):
    _, model, _, net, params = pair
    again = returns(diffusers.AutoencoderKL, model, net, params)
    for key in ("scaling_factor", "shift_factor", "sample_size"):
        assert again.config[key] == model.config[key]
    z = torch.randn(1, model.config.latent_channels, 4, 4)
    with torch.no_grad():
        assert torch.equal(model.decode(z).sample, again.decode(z).sample)


def test_loads_in_bfloat16(pair, halves):
    halves(pair[2])


def test_names_of_old_files(pair, tmp_path):
    """Released autoencoders of 2022 name their attention query, key, value and proj_attn."""
    name, _, folder, _, params = pair
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, then in old.items():
        tensors = {
            name.replace(f".{new}.", f".{then}."): w for name, w in tensors.items()
        }
    assert any("proj_attn" in key for key in tensors) == (name != "plain_middle")
    save_file(
        tensors,
        tmp_path / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path)[1], params)


def test_normalise_and_back():
    cfg = VAE(scale=0.5, shift=2.0)
    net = make_net(cfg, config=cfg)
    z = jnp.arange(4.0)
    x0 = net.apply(net.shapes, z, method="normalise")
    np.testing.assert_array_equal(x0, (z - 2) / 2)
    np.testing.assert_array_equal(
        net.apply(net.shapes, x0, method="denormalise"), z
    )


def test_released_size(covers):
    """Stable Diffusion's: 83.7 M weights (the model cards of sd-vae-ft say 83.7M params)."""
    cfg = VAE(size=512, widths=(128, 256, 512, 512), layers=2, groups=32)
    with torch.device("meta"):
        written = interop.families.vae.FAMILY.write(cfg)["config.json"]
        model = diffusers.AutoencoderKL.from_config(written)
    covers(cfg, model, 83_653_863, interop.families.vae.FAMILY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"latents_mean": [0.0]},
            r"latents_mean=\[0.0\] is not supported, expected None",
        ),
        (
            {"down_block_types": ["AttnDownEncoderBlock2D"] * 2},
            "down_block_types=.* is not supported",
        ),
        ({"out_channels": 4}, "out_channels=4 is not supported, expected 3"),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    config = interop.families.vae.FAMILY.write(VAE())["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert interop.describe(tmp_path) == VAE()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Refused, match=message):
        interop.describe(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "latent_channels"})
    )
    with pytest.raises(Refused, match="latent_channels is missing"):
        interop.describe(tmp_path)
