"""CLIP's towers against transformers': states, hidden states, summaries; the same weights, both
ways.
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
from jaxdistill.models.vision.clip import (
    ClipText,
    ClipTextProjected,
    ClipVision,
    ClipVisionProjected,
)

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
transformers = pytest.importorskip(
    "transformers", reason="parity with PyTorch needs transformers"
)

BODY = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    projection_dim=24,
)
TEXT = BODY | dict(
    vocab_size=61, max_position_embeddings=12, eos_token_id=60, bos_token_id=59
)
VISION = BODY | dict(image_size=12, patch_size=4)
TEXTS = {
    "CLIPTextModel": (ClipText, {}),
    "CLIPTextModelWithProjection": (ClipTextProjected, {"hidden_act": "gelu"}),
}
VISIONS = {
    "CLIPVisionModel": (ClipVision, {}),
    "CLIPVisionModelWithProjection": (ClipVisionProjected, {"hidden_act": "gelu"}),
}
LENGTHS = np.array([12, 8, 3])


def build(name, **changes):
    """A random model of weights and biases that all matter."""
    torch.manual_seed(0)
    config, sizes = (
        (transformers.CLIPTextConfig, TEXT)
        if "Text" in name
        else (transformers.CLIPVisionConfig, VISION)
    )
    model = getattr(transformers, name)(
        config(**sizes | changes, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # attention far from uniform
            weight.normal_(std=0.3).add_(
                float("norm" in name and name.endswith("weight"))
            )
    return model


def loaded(name, cls, changes, folder):
    model = build(name, **changes)
    model.save_pretrained(folder)
    net, params = interop.load(folder)
    assert type(net.config) is cls
    return (
        model,
        folder,
        net,
        params,
        jax.jit(lambda *a, **k: net.apply(params, *a, **k, taps=(0, 1))),
    )


@pytest.fixture(scope="module", params=TEXTS)
def text(request, tmp_path_factory):
    """(PyTorch's model, its folder, our net, params, jitted call with features of two blocks)."""
    return loaded(
        request.param, *TEXTS[request.param], tmp_path_factory.mktemp(request.param)
    )


@pytest.fixture(scope="module", params=VISIONS)
def vision(request, tmp_path_factory):
    return loaded(
        request.param,
        *VISIONS[request.param],
        tmp_path_factory.mktemp(request.param),
    )


def sentences():
    """tokens [3 12] that end with eos at other places, and the mask of what is before and at it."""
    tokens = np.random.default_rng(0).integers(0, 59, (3, 12))
    mask = np.arange(12) < LENGTHS[:, None]
    tokens[np.arange(3), LENGTHS - 1] = 60
    # padded with eos, as CLIP's tokenizer does
    return np.where(mask, tokens, 60), mask


@pytest.mark.parametrize("padded", [False, True])
def test_texts_agree(text, padded, agree):
    model, _, net, params, call = text
    tokens, mask = sentences()
    with torch.no_grad():
        given = (
            {"attention_mask": torch.tensor(mask.astype(np.int64))}
            if padded
            else {}
        )
        theirs = model(torch.tensor(tokens), output_hidden_states=True, **given)
    states, features = call(tokens, **({"mask": mask} if padded else {}))
    where = mask[..., None] if padded else True
    agree("states", states, theirs.last_hidden_state, where)
    for found, layer in zip(features, (1, 2), strict=True):
        agree("hidden states", found, theirs.hidden_states[layer], where)
    pooled = (
        theirs.text_embeds
        if isinstance(net.config, ClipTextProjected)
        else theirs.pooler_output
    )
    agree("summary", net.apply(params, states, tokens, method="pool"), pooled)


def test_a_text_sees_nothing_behind(text):
    _, _, _, _, call = text
    tokens, mask = sentences()
    short = call(tokens[1:2, : LENGTHS[1]])[0]
    for states in (call(tokens)[0], call(tokens, mask=mask)[0]):
        np.testing.assert_allclose(
            states[1:2, : LENGTHS[1]], short, rtol=1e-4, atol=1e-5
        )


def test_the_largest_token_is_the_end_in_old_configurations(agree, tmp_path):
    """eos_token_id = 2: summaries are those of the largest token."""
    model, _, net, params, call = loaded(
        "CLIPTextModel", ClipText, {"eos_token_id": 2}, tmp_path
    )
    tokens = np.random.default_rng(1).permutation(58)[None, :12]
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).pooler_output
    agree(
        "summary", net.apply(params, call(tokens)[0], tokens, method="pool"), theirs
    )


def test_images_agree(vision, agree):
    model, _, net, params, call = vision
    x = np.random.default_rng(0).standard_normal((3, 12, 12, 3)).astype("f4")
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            output_hidden_states=True,
        )
    states, features = call(x)
    agree("states", states, theirs.last_hidden_state)
    for found, layer in zip(features, (1, 2), strict=True):
        agree("hidden states", found, theirs.hidden_states[layer])
    pooled = (
        theirs.image_embeds
        if isinstance(net.config, ClipVisionProjected)
        else theirs.pooler_output
    )
    agree("summary", net.apply(params, states, method="pool"), pooled)


def test_round_trip_of_a_text_tower(text, returns, halves):
    kept(text, returns, halves, TEXT.keys() - {"bos_token_id"})


def test_round_trip_of_an_image_tower(vision, returns, halves):
    kept(vision, returns, halves, VISION)


def kept(tower, returns, halves, keys):
    """Weights bit-equal, settings too; and the folder in bfloat16."""
    model, folder, net, params, _ = tower
    again = returns(type(model), model, net, params)
    for key in (*keys, "hidden_act", "layer_norm_eps"):
        assert getattr(again.config, key) == getattr(model.config, key), key
    halves(folder)


def test_files_with_and_without_the_prefix(tmp_path):
    """As released (prefix, a constant of positions) and as transformers 5 saves a tower."""
    build("CLIPTextModel").save_pretrained(tmp_path)
    expected = interop.load(tmp_path)[1]
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {
        name.removeprefix("text_model."): value for name, value in tensors.items()
    }
    for stored in (
        bare,
        {f"text_model.{name}": value for name, value in bare.items()},
    ):
        save_file(
            stored | {"text_model.embeddings.position_ids": np.arange(12)[None]},
            tmp_path / "model.safetensors",
        )
        jax.tree.map(
            np.testing.assert_array_equal, interop.load(tmp_path)[1], expected
        )


def test_towers_in_a_joint_model(tmp_path):
    """`CLIPModel`'s folder, as CLIP is published, gives either tower to a net of its kind:
    summaries are its embeddings.
    """
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config=VISION, projection_dim=24
    )
    joint = transformers.CLIPModel(config).eval()
    joint.save_pretrained(tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype("f4")
    tokens = sentences()[0]
    with torch.no_grad():
        theirs = joint(
            torch.tensor(tokens), torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        )
    # the image tower, where nothing says which
    net, params = interop.load(tmp_path)
    assert (
        type(net.config) is ClipVisionProjected
        and interop.family_of(net) is interop.families.clip.VISION_PROJECTED
    )
    unit = lambda e: e / np.linalg.norm(e, axis=-1, keepdims=True)
    call = lambda net, params, x, *more: unit(
        net.apply(params, net.apply(params, x), *more, method="pool")
    )
    np.testing.assert_allclose(
        call(net, params, x), unit(theirs.image_embeds.numpy()), atol=1e-5
    )
    sizes = dict(
        vocab=61,
        max_length=12,
        eos=60,
        dim=32,
        mlp=48,
        depth=3,
        heads=4,
        projection=24,
    )
    text = make_net(ClipTextProjected(**sizes), config=ClipTextProjected(**sizes))
    params = interop.load_into(tmp_path, text, text.shapes)
    np.testing.assert_allclose(
        call(text, params, tokens, tokens),
        unit(theirs.text_embeds.numpy()),
        atol=1e-5,
    )
    with pytest.raises(Refused, match="holds a CLIPModel, expected a ClipVision"):
        interop.load_into(tmp_path, make_net(ClipVision(), config=ClipVision()), {})


def test_released_sizes():
    """Against transformers' own classes on the meta device; CLIP-L/14's towers are Stable Diffusion
    1's and Wan-style vision's.
    """
    body = dict(
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_size=768,
        projection_dim=768,
    )
    image = dict(
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        hidden_size=1024,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device("meta"):
        texts = transformers.CLIPTextModel(transformers.CLIPTextConfig(**body))
        images = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**image)
        )
    sizes = dict(dim=768, mlp=3072, heads=12, depth=12)
    ours = make_net(ClipText(vocab=49408, max_length=77, **sizes)).size
    assert ours == sum(p.numel() for p in texts.parameters()) == 123_060_480
    ours = make_net(
        ClipVisionProjected(
            size=224,
            patch=14,
            dim=1024,
            mlp=4096,
            heads=16,
            depth=24,
            projection=768,
        )
    ).size
    assert ours == sum(p.numel() for p in images.parameters())


def test_refusals(tmp_path):
    config = interop.families.clip.TEXT_TOWER.write(ClipText())["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert interop.describe(tmp_path) == ClipText()
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"hidden_act": "gelu_10"})
    )
    with pytest.raises(Refused, match="hidden_act='gelu_10': did you mean"):
        interop.describe(tmp_path)
    net = make_net(ClipText(max_length=8))
    with pytest.raises(Refused, match="tokens: 9 in a sequence, max_length=8"):
        jax.eval_shape(lambda p: net.apply(p, jnp.zeros((1, 9), int)), net.shapes)
    net = make_net(ClipVision())
    with pytest.raises(
        Refused, match=r"x \[1, 8, 10, 3\]: expected images of \[8, 8, 3\]"
    ):
        jax.eval_shape(lambda p: net.apply(p, jnp.ones((1, 8, 10, 3))), net.shapes)
    with pytest.raises(Refused, match="heads=3 must divide dim=64"):
        make_net(ClipText(heads=3))


def test_gradients_flow_through_both_towers(weights):
    text = make_net(ClipTextProjected(depth=2))
    image = make_net(ClipVisionProjected(depth=2, remat="full"))
    params = (weights(text), weights(image))
    tokens = jnp.array([[3, 5, 63, 63]])
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype("f4")

    def score(params):
        a = text.apply(
            params[0], text.apply(params[0], tokens), tokens, method="pool"
        )
        b = image.apply(params[1], image.apply(params[1], x), method="pool")
        return jnp.vdot(a, b)

    for grad in jax.tree.leaves(jax.device_get(jax.jit(jax.grad(score))(params))):
        assert np.isfinite(grad).all() and np.any(grad)
