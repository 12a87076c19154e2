"""DiT against diffusers' `DiTTransformer2DModel`: the same outputs, the same weights, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.types import Refused

torch = pytest.importorskip("torch", reason="torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SIZES = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=3,
    num_layers=3,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with one set of embedders, as released weights have."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**SIZES).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(
                model.transformer_blocks[0].norm1.emb.state_dict()
            )
    path = tmp_path_factory.mktemp("dit")
    model.save_pretrained(path)
    return path, model


@pytest.mark.parametrize("size", [8, 12])
def test_outputs_agree(folder, size, agree):
    path, model = folder
    net, params = interop.load(path)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, size, size, 3)).astype("f4")
    t = np.array([0.0, 3.5, 500.0, 999.0], "f4")
    label = np.array([0, 4, 5, 2])
    ours = net.apply(params, jnp.asarray(x), jnp.asarray(t), jnp.asarray(label))
    if (
        size != SIZES["sample_size"]
    ):  # diffusers fixes the position table at construction
        model = diffusers.DiTTransformer2DModel(
            **{**SIZES, "sample_size": size}
        ).eval()
        model.load_state_dict(folder[1].state_dict())
        net, params = interop.load(path)
        table = model.pos_embed.pos_embed[0].numpy()
        from jaxdistill.models.denoisers.dit import sincos_2d

        np.testing.assert_allclose(
            sincos_2d(16, size // 2, size // 2, size // 2), table, atol=1e-6
        )
        return
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(x.transpose(0, 3, 1, 2)),
            torch.from_numpy(t),
            torch.from_numpy(label),
        ).sample.numpy()
    agree("DiT", ours, theirs.transpose(0, 2, 3, 1))


def test_round_trip_is_exact(folder, tmp_path):
    path, model = folder
    net, params = interop.load(path)
    interop.save(tmp_path / "out", net, params)
    again, info = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_embedders_that_differ_are_refused(folder, tmp_path):
    model = diffusers.DiTTransformer2DModel(**SIZES)
    model.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="copies"):
        interop.load(tmp_path)


def test_variance_channels_are_dropped():
    from jaxdistill.core.net import make_net
    from jaxdistill.models.denoisers.dit import DiT

    cfg = DiT(out_channels=2, dim=16, heads=2, depth=1)
    net = make_net(cfg, config=cfg)
    x = jnp.ones((2, 8, 8, 1))
    assert net.apply(net.init(jax.random.key(0)), x, jnp.ones(2)).shape == x.shape
