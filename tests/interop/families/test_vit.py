"""ViT against transformers' `ViTModel` and `ViTForImageClassification`: the same outputs, the same
weights, both ways.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.vision.vit import ViT, ViTClassifier

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
transformers = pytest.importorskip(
    "transformers", reason="parity with PyTorch needs transformers"
)

SIZES = dict(
    image_size=12,
    patch_size=4,
    num_channels=3,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
)
CLASSES = {
    "ViTModel": (ViT, {}),
    "ViTForImageClassification": (
        ViTClassifier,
        {"num_labels": 5, "qkv_bias": False},
    ),
}


@pytest.fixture(scope="module", params=CLASSES)
def pair(request, tmp_path_factory):
    """(name, torch model, its folder, our net and params, our jitted call with features of the
    first and the last block).
    """
    torch.manual_seed(0)
    cls, change = CLASSES[request.param]
    model = getattr(transformers, request.param)(
        transformers.ViTConfig(**SIZES | change, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # attention far from uniform
            weight.normal_(std=0.3).add_(
                float("norm" in name and name.endswith("weight"))
            )
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    net, params = interop.load(folder)
    assert type(net.config) is cls
    return (
        request.param,
        model,
        folder,
        net,
        params,
        jax.jit(lambda x: net.apply(params, x, taps=(0, 2))),
    )


def test_outputs_agree(pair, agree):
    name, model, _, net, params, call = pair
    x = np.random.default_rng(0).standard_normal((3, 12, 12, 3)).astype("f4")
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            output_hidden_states=True,
        )
    ours, features = call(x)
    agree(name, ours, theirs[0])
    for found, layer in zip(features, (1, 3), strict=True):
        agree(f"{name} features", found, theirs.hidden_states[layer])
    if name == "ViTModel":
        agree(
            f"{name} pooled",
            net.apply(params, ours, method="pool"),
            theirs.pooler_output,
        )


def test_round_trip_is_exact(pair, returns):
    _, model, _, net, params, _ = pair
    again = returns(type(model), model, net, params)
    for key in (*SIZES, "qkv_bias", "hidden_act", "layer_norm_eps", "num_labels"):
        assert getattr(again.config, key) == getattr(model.config, key), key


def test_loads_in_bfloat16(pair, halves):
    halves(pair[2])


def test_released_size():
    """ViT-B/16 has 86 M weights (arXiv:2010.11929, table 1)."""
    sizes = dict(
        size=224, patch=16, channels=3, dim=768, mlp=3072, heads=12, depth=12
    )
    with torch.device("meta"):
        theirs = [
            transformers.ViTModel(transformers.ViTConfig()),
            transformers.ViTForImageClassification(transformers.ViTConfig()),
        ]
    for cfg, model in zip(
        (ViT(**sizes), ViTClassifier(**sizes, classes=2)), theirs, strict=True
    ):
        assert make_net(cfg).size == sum(p.numel() for p in model.parameters())
    assert make_net(ViTClassifier(**sizes, classes=1000)).size == 86_567_656


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu_10"}, "hidden_act='gelu_10': did you mean"),
        (
            {"image_size": [8, 16]},
            r"image_size=\[8, 16\] is not supported, expected \[8, 8\]",
        ),
        (
            {"pooler_act": "relu"},
            "pooler_act='relu' is not supported, expected 'tanh'",
        ),
        (
            {"pooler_output_size": 16},
            "pooler_output_size=16 is not supported, expected 64",
        ),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    config = interop.families.vit.FAMILY.write(ViT())["config.json"]
    for same in ({}, {"image_size": [8, 8]}, {"pooler_output_size": 64}):
        (tmp_path / "config.json").write_text(json.dumps(config | same))
        assert interop.describe(tmp_path) == ViT()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Refused, match=message):
        interop.describe(tmp_path)


def test_refusals():
    net = make_net(ViT())
    with pytest.raises(
        Refused, match=r"x \[1, 8, 10, 1\]: expected images of \[8, 8, 1\]"
    ):
        jax.eval_shape(lambda p: net.apply(p, jnp.ones((1, 8, 10, 1))), net.shapes)
    with pytest.raises(Refused, match="heads=3 must divide dim=64"):
        make_net(ViT(heads=3))


def test_rematerialised_gradients_are_the_same(rematerialised):
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype("f4")
    rematerialised(ViTClassifier(depth=2), x)
