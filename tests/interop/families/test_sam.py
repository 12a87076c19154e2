"""SAM's image encoder against transformers': states, hidden states, the same weights both ways, and
the program of its scores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.interop.families import sam
from jaxdistill.models.vision.sam import Layer, SamVision

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
transformers = pytest.importorskip(
    "transformers", reason="parity with PyTorch needs transformers"
)

SIZES = dict(
    image_size=28,
    patch_size=4,
    hidden_size=32,
    mlp_dim=48,
    num_attention_heads=4,
    num_hidden_layers=3,
    window_size=3,
    global_attn_indexes=[1],
    output_channels=16,
    num_pos_feats=8,
)
X = np.random.default_rng(0).standard_normal((2, 28, 28, 3)).astype("f4")


@pytest.fixture(scope="module")
def encoder(imported):
    """(torch model, its folder, our net and params): windows of 3 over 7 x 7 patches, so that the
    last ones are padded.
    """
    torch.manual_seed(0)
    config = transformers.SamVisionConfig(**SIZES, initializer_range=0.2)
    return imported(
        transformers.SamVisionModel._from_config(
            config, attn_implementation="eager"
        ),
        std=0.3,
    )


def test_states_agree(encoder, agree):
    model, _, net, params = encoder
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(X.transpose(0, 3, 1, 2).copy()),
            output_hidden_states=True,
        )
    states, features = jax.jit(lambda p: net.apply(p, X, taps=(0, 1, 2)))(params)
    agree("states", states, theirs.last_hidden_state.permute(0, 2, 3, 1))
    for found, hidden in zip(features, theirs.hidden_states[-3:], strict=True):
        agree("hidden states", found, hidden.flatten(1, 2))


def test_round_trip(encoder, returns, halves):
    model, folder, net, params = encoder
    again = returns(type(model), model, net, params)
    for key in SIZES.keys() - {"num_pos_feats"}:
        assert getattr(again.config, key) == getattr(model.config, key), key
    halves(folder)


def test_the_encoder_in_a_whole_model(encoder, tmp_path):
    """`SamModel`'s folder, as released, gives the encoder that is in it; what is left of it is not
    weights of ours.
    """
    torch.manual_seed(1)
    config = transformers.SamConfig(
        vision_config=SIZES,
        prompt_encoder_config=dict(hidden_size=16, image_size=28, patch_size=4),
        mask_decoder_config=dict(
            hidden_size=16,
            mlp_dim=16,
            num_attention_heads=2,
            iou_head_hidden_dim=16,
        ),
    )
    whole = transformers.SamModel(config).eval()
    whole.save_pretrained(tmp_path)
    net, params = interop.load(tmp_path)
    assert net.config == encoder[2].config and interop.family_of(net) is sam.FAMILY
    expected = (
        whole.vision_encoder(torch.from_numpy(X.transpose(0, 3, 1, 2).copy()))
        .last_hidden_state.detach()
        .numpy()
    )
    np.testing.assert_allclose(
        net.apply(params, X),
        expected.transpose(0, 2, 3, 1),
        rtol=1e-4,
        atol=1e-4 * expected.std(),
    )


def test_released_sizes(covers):
    """ViT-B and ViT-H against transformers' own class on the meta device."""
    base = SamVision(
        size=1024,
        patch=16,
        dim=768,
        mlp=3072,
        heads=12,
        depth=12,
        window=14,
        global_layers=(2, 5, 8, 11),
        neck=256,
    )
    huge = SamVision(
        size=1024,
        patch=16,
        dim=1280,
        mlp=5120,
        heads=16,
        depth=32,
        window=14,
        global_layers=(7, 15, 23, 31),
        neck=256,
    )
    kinds = dict(
        hidden_size=1280,
        num_attention_heads=16,
        num_hidden_layers=32,
        mlp_dim=5120,
        global_attn_indexes=[7, 15, 23, 31],
    )
    for ours, theirs, count in ((base, {}, 89_670_912), (huge, kinds, 637_026_048)):
        with torch.device("meta"):
            model = transformers.SamVisionModel(
                transformers.SamVisionConfig(**theirs)
            )
        covers(ours, model, count, sam.FAMILY)


def test_scores_have_terms_of_rows_and_columns():
    """Against softmax(q k / sqrt(K) + q rows[y - y'] + q columns[x - x']) written out, for every
    pair of places.
    """
    cfg = SamVision(dim=6, heads=2)
    rng = np.random.default_rng(0)
    net = make_net(lambda rngs: Layer(cfg, 3, rngs))
    params = {
        **net.init(jax.random.key(0)),
        **{
            name: jnp.asarray(rng.standard_normal((5, 3)), "f4")
            for name in ("rows", "columns")
        },
    }
    rows = params["rows"]
    columns = params["columns"]
    h = rng.standard_normal((9, 6)).astype("f4")
    q, k, v = np.split(h @ np.asarray(params["to_qkv"]["kernel"]), 3, -1)
    out = np.zeros((9, 6))
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        for i in range(9):
            up = i // 3 - np.arange(9) // 3 + 2
            left = i % 3 - np.arange(9) % 3 + 2
            scores = (k[:, part] / 3**0.5 + rows[up] + columns[left]) @ q[i, part]
            weights = np.exp(scores - scores.max())
            out[i, part] = weights @ v[:, part] / weights.sum()
    ours = net.apply(params, h.reshape(1, 3, 3, 6), method="attend").reshape(9, 6)
    np.testing.assert_allclose(
        ours, out @ params["to_out"]["kernel"], rtol=1e-4, atol=1e-6
    )


def test_a_window_sees_itself_alone():
    # 6 x 6 patches, four windows
    net = make_net(SamVision(size=12, depth=1, global_layers=()))
    params = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, 12, 12, 3))
    call = jax.jit(
        lambda x: net.apply(params, x, taps=(0,))[1][0].reshape(6, 6, -1)
    )
    moved = np.abs(call(x.at[0, 0, 0].add(1.0)) - call(x)).max(-1) > 0
    assert moved[:3, :3].all() and not moved[3:].any() and not moved[:, 3:].any()


def test_gradients_reach_every_weight(weights):
    net = make_net(SamVision(remat="full"))
    x = np.random.default_rng(1).standard_normal((1, 8, 8, 3)).astype("f4")
    loss = lambda p: jnp.sum(net.apply(p, x, taps=(0, 1))[0] ** 3)
    grads = jax.device_get(jax.jit(jax.grad(loss))(weights(net)))
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.any(grad), path


def test_refusals(tmp_path):
    net = make_net(SamVision())
    with pytest.raises(
        Refused, match=r"x \[1, 8, 10, 3\]: expected images of \[8, 8, 3\]"
    ):
        jax.eval_shape(lambda p: net.apply(p, jnp.ones((1, 8, 10, 3))), net.shapes)
    with pytest.raises(Refused, match=r"taps=\(2,\): layers are numbered 0 to 1"):
        jax.eval_shape(
            lambda p: net.apply(p, jnp.ones((1, 8, 8, 3)), taps=(2,)), net.shapes
        )
    with pytest.raises(
        Refused, match=r"model.global_layers=\(2,\): layers are numbered 0 to 1"
    ):
        make_net(SamVision(global_layers=(2,)))
    with pytest.raises(Refused, match="heads=3 must divide dim=32"):
        make_net(SamVision(heads=3))
    config = sam.FAMILY.write(SamVision())["config.json"]
    assert (
        sam.FAMILY.read(config | {"mlp_dim": None, "mlp_ratio": 3.0}, tmp_path).mlp
        == 96
    )
    for change, message in (
        ({"use_rel_pos": False}, "use_rel_pos=False is not supported"),
        ({"hidden_act": "gelu_10"}, "hidden_act="),
    ):
        with pytest.raises(Refused, match=message):
            sam.FAMILY.read(config | change, tmp_path)
