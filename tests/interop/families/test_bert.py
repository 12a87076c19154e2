"""BERT against transformers: features, summaries, logits and attention agree, and so do weights
both ways.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.language.bert import Bert, BertClassifier, MaskedBert
from tests.interop.parity import gap

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
transformers = pytest.importorskip(
    "transformers", reason="parity with PyTorch needs transformers"
)

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=20,
)
CLASSES = {
    "BertModel": Bert,
    "BertForMaskedLM": MaskedBert,
    "BertForSequenceClassification": BertClassifier,
}
LENGTHS = np.array([16, 9, 3])


def build(name, **changes):
    """A random model of weights and biases that all matter."""
    torch.manual_seed(0)
    changes = changes or ({"num_labels": 5} if "Sequence" in name else {})
    model = getattr(transformers, name)(
        transformers.BertConfig(**SIZES | changes, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # attention far from uniform
            weight.normal_(std=0.3).add_(name.endswith("LayerNorm.weight"))
    return model


@pytest.fixture(scope="module", params=CLASSES)
def pair(request, tmp_path_factory):
    """(torch model, its folder, our net and params, its jitted call)."""
    model = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    net, params = interop.load(folder)
    assert type(net.config) is CLASSES[request.param]
    return (
        model,
        folder,
        net,
        params,
        jax.jit(
            lambda *a, **k: net.apply(params, *a, **k, taps=(0, 2), scores=(0, 2))
        ),
    )


def inputs():
    rng = np.random.default_rng(0)
    return (
        rng.integers(0, 61, (3, 16)),
        rng.integers(0, 2, (3, 16)),
        np.arange(16) < LENGTHS[:, None],
    )


@pytest.mark.parametrize("padded", [False, True])
def test_outputs_agree(pair, padded, record_property):
    model, _, net, params, call = pair
    tokens, types, mask = inputs()
    given = {"types": types, "mask": mask} if padded else {}
    theirs = (
        {
            "token_type_ids": torch.tensor(types),
            "attention_mask": torch.tensor(mask.astype(np.int64)),
        }
        if padded
        else {}
    )
    with torch.no_grad():
        expected = model(
            torch.tensor(tokens),
            output_hidden_states=True,
            output_attentions=True,
            **theirs,
        )
    found, features, scores = call(tokens, **given)
    real = mask if padded else ...
    output = expected[0].numpy()
    record_property(
        "gap", size := gap(found, output, real if output.ndim == 3 else ...)
    )
    assert size <= 1e-5
    for state, layer in zip(features, (1, 3)):
        assert gap(state, expected.hidden_states[layer].numpy(), real) <= 1e-5
    for score, layer in zip(scores, (0, 2)):
        score = (
            np.where(mask[:, None, None, :], score, -np.inf) if padded else score
        )
        weights = np.moveaxis(np.asarray(jax.nn.softmax(score)), 1, 2)
        # scores reach 10, and what they are off by (1e-6 of that) is a weight's relative error
        assert (
            gap(
                weights, np.moveaxis(expected.attentions[layer].numpy(), 1, 2), real
            )
            <= 1e-4
        )
    if type(net.config) is Bert:
        pooled = net.apply(params, found, method="pool")
        assert gap(pooled, expected.pooler_output.numpy()) <= 1e-5


def test_padding_changes_nothing(pair):
    _, _, net, params, call = pair
    tokens, types, mask = inputs()
    found = np.asarray(call(tokens, types=types, mask=mask)[0])
    row = 1
    length = LENGTHS[1]
    alone = np.asarray(
        jax.jit(net.apply)(
            params,
            tokens[row : row + 1, :length],
            types=types[row : row + 1, :length],
        )
    )
    assert (
        gap(alone[0], found[row, :length] if found.ndim == 3 else found[row])
        <= 1e-5
    )


def test_transformers_loads_what_we_save(pair, tmp_path):
    model, _, net, params, _ = pair
    interop.save(tmp_path / "out", net, params)
    again, info = type(model).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    for key in (
        *SIZES,
        "hidden_act",
        "layer_norm_eps",
        "pad_token_id",
        "num_labels",
    ):
        assert getattr(again.config, key) == getattr(model.config, key), key
    ours = again.state_dict()
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_weights_in_bfloat16(pair):
    _, folder, _, params, _ = pair
    _, half = interop.load(folder, "bfloat16")
    jax.tree.map(
        lambda h, w: np.testing.assert_array_equal(h, w.astype("bfloat16")),
        half,
        params,
    )


def test_names_of_the_first_files(tmp_path):
    """As bert-base-uncased is stored: both heads of pretraining, tied copies, gamma and beta."""
    build("BertForMaskedLM").save_pretrained(tmp_path)
    expected = interop.load(tmp_path)[1]
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )
    tensors = {
        old(name): value
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["cls.predictions.decoder.weight"] = tensors[
        "bert.embeddings.word_embeddings.weight"
    ]
    tensors["cls.seq_relationship.weight"] = tensors["bert.pooler.dense.weight"] = (
        np.ones((2, 32), np.float32)
    )
    tensors["bert.embeddings.position_ids"] = np.arange(20)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path)[1], expected)


def test_released_sizes():
    """BERT-base has 110M weights (arXiv:1810.04805, section 3)."""
    assert (
        make_net(
            Bert(vocab=30522, dim=768, mlp=3072, heads=12, depth=12, max_length=512)
        ).size
        == 109_482_240
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu_10"}, "hidden_act='gelu_10': did you mean"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' is not supported, expected 'absolute'",
        ),
        ({"is_decoder": True}, "is_decoder=True is not supported, expected False"),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    build("BertModel").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(Refused, match=message):
        interop.load(tmp_path)


def test_refusals():
    net = make_net(Bert(max_length=8))
    for given, message in (
        ({"scores": (4,)}, r"scores=\(4,\): layers are numbered 0 to 3"),
        ({}, "9 in a sequence, max_length=8"),
    ):
        with pytest.raises(Refused, match=message):
            jax.eval_shape(
                lambda p, t: net.apply(p, t, **given),
                net.shapes,
                jax.ShapeDtypeStruct((1, 8 if given else 9), "int32"),
            )
    with pytest.raises(Refused, match="heads=3 must divide dim=64"):
        make_net(Bert(heads=3))
