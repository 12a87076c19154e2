"""The video autoencoder against diffusers' `AutoencoderKLWan` and `AutoencoderKLQwenImage`: the
same latents and videos, the same weights, both ways.
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
from jaxdistill.models.autoencoders.vae_wan import QwenImageVAE, WanVAE

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
diffusers = pytest.importorskip(
    "diffusers", reason="parity with PyTorch needs diffusers"
)

SIZES = dict(
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    latents_mean=[0.1, -0.2, 0.3, 0.0],
    latents_std=[1.0, 2.0, 0.5, 3.0],
)
VARIANTS = {
    "wan": (
        "AutoencoderKLWan",
        dict(temperal_downsample=[True, True], decoder_base_dim=16),
    ),
    "qwen": (
        "AutoencoderKLQwenImage",
        dict(temperal_downsample=[False, True], dim_mult=[1, 2, 4]),
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, imported):
    """(name, PyTorch's model, its folder, our net and params, jitted encode and decode)."""
    torch.manual_seed(0)
    cls, change = VARIANTS[request.param]
    model, folder, net, params = imported(
        getattr(diffusers, cls)(**SIZES | change), 0.05
    )
    encode, decode = (
        jax.jit(lambda x, method=method: net.apply(params, x, method=method))
        for method in ("encode", "decode")
    )
    return request.param, model, folder, net, params, encode, decode


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("f4")


def back(x):
    return x.permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize("shape", [(1, 8, 12), (5, 8, 8), (9, 4, 8)])
def test_latents_and_videos_agree(pair, agree, shape):
    name, model, _, _, _, encode, decode = pair
    x = draw(2, *shape, 3)
    with torch.no_grad():
        latent = model.encode(
            torch.from_numpy(x.transpose(0, 4, 1, 2, 3).copy())
        ).latent_dist
        video = back(model.decode(latent.mean).sample)
    mean, std = encode(x)
    agree(f"{name} {shape} mean", mean, back(latent.mean))
    agree(f"{name} {shape} std", std, back(latent.std))
    ours = decode(back(latent.mean).numpy())
    agree(f"{name} {shape} video", ours, video)
    assert np.mean(np.abs(ours) < 1) > 0.5  # not all clipped


def test_pictures_are_videos_of_one_frame_and_time_runs_forward(pair):
    _, _, _, _, _, encode, decode = pair
    x = draw(2, 5, 8, 8, 3)
    mean, std = encode(x)
    first = encode(x[:, 0])
    assert first[0].shape == (2, 2, 2, 4)
    np.testing.assert_allclose(first[0], mean[:, 0], atol=1e-5 * float(mean.std()))
    np.testing.assert_allclose(first[1], std[:, 0], atol=1e-5 * float(std.std()))
    np.testing.assert_allclose(decode(mean[:, 0]), decode(mean)[:, 0], atol=1e-5)


def test_round_trip_is_exact(pair, returns):
    _, model, _, net, params, _, _ = pair
    again = returns(type(model), model, net, params)
    same = lambda a: tuple(a) if isinstance(a, list) else a
    # of the sizes; diffusers' defaults are those of Wan 2.1
    computed = {
        "scale_factor_temporal",
        "scale_factor_spatial",
    }
    assert all(
        same(again.config[key]) == same(value)
        for key, value in model.config.items()
        if key[0] != "_" and key not in computed
    )
    z = torch.randn(1, 4, 2, 2, 2)
    with torch.no_grad():
        assert torch.equal(model.decode(z).sample, again.decode(z).sample)


def test_bfloat16(pair, halves):
    _, _, folder, net, params, encode, _ = pair
    halves(folder)
    small = make_net(
        cfg := dataclasses.replace(net.config, dtype="bfloat16"), config=cfg
    )
    x = draw(2, 5, 8, 8, 3)
    found = jax.jit(lambda x: small.apply(params, x, method="encode")[0])(x)
    expected = encode(x)[0]
    # 2^-8 a rounding, some tens of them
    assert (
        found.dtype == jnp.float32
        and np.abs(found - expected).mean() <= 0.05 * expected.std()
    )


def test_normalise_and_back():
    cfg = WanVAE(latents=2, mean=(1.0, 2.0), std=(0.5, 4.0))
    net = make_net(cfg, config=cfg)
    z = jnp.arange(8.0).reshape(2, 2, 2)
    x0 = net.apply(net.shapes, z, method="normalise")
    np.testing.assert_array_equal(
        x0, (z - jnp.array([1.0, 2.0])) / jnp.array([0.5, 4.0])
    )
    np.testing.assert_allclose(
        net.apply(net.shapes, x0, method="denormalise"), z, rtol=1e-6
    )


def test_rematerialised_gradients_are_the_same(rematerialised):
    grads = rematerialised(WanVAE(), draw(1, 3, 4, 4, 3))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("cls", "family"),
    [
        (WanVAE, interop.families.vae_wan.FAMILY),
        (QwenImageVAE, interop.families.vae_wan.QWEN),
    ],
)
def test_released_sizes(covers, cls, family):
    with torch.device("meta"):
        model = getattr(diffusers, family.name)()
    given = model.config
    cfg = cls(
        width=96,
        multiples=(1, 2, 4, 4),
        blocks=2,
        temporal=(False, True, True),
        latents=16,
        mean=tuple(given["latents_mean"]),
        std=tuple(given["latents_std"]),
    )
    covers(cfg, model, 126_892_531, family)
    same = lambda a: list(a) if isinstance(a, tuple) else a
    written = {
        key: value
        for key, value in family.write(cfg)["config.json"].items()
        if key != "_class_name"
    }
    assert written == {key: same(given[key]) for key in written}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"is_residual": True},
            "is_residual=True is not supported, expected False",
        ),
        ({"patch_size": 2}, "patch_size=2 is not supported, expected None"),
        (
            {"attn_scales": [0.5]},
            r"attn_scales=\[0.5\] is not supported, expected \[\]",
        ),
        ({"out_channels": 4}, "out_channels=4 is not supported, expected 3"),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    config = interop.families.vae_wan.FAMILY.write(WanVAE())["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert interop.describe(tmp_path) == WanVAE()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Refused, match=message):
        interop.describe(tmp_path)


def test_refuses_inputs_that_do_not_fit():
    net = make_net(WanVAE())
    call = lambda *shape: jax.eval_shape(
        lambda p: net.apply(p, jnp.ones(shape), method="encode"), net.shapes
    )
    with pytest.raises(
        Refused, match=r"x \[1, 4, 4, 4, 3\]: expected 1 \+ a multiple of 2 frames"
    ):
        call(1, 4, 4, 4, 3)
    with pytest.raises(Refused, match="height and width must be multiples of 2"):
        call(1, 5, 4, 3)
    with pytest.raises(
        Refused, match="expected one for each of the 1 changes of resolution"
    ):
        make_net(WanVAE(temporal=(True, True)))
    with pytest.raises(Refused, match="4 means and 4 stds, expected 2 each"):
        make_net(WanVAE(latents=2))
