"""T5 and UMT5 against transformers: encoder states, teacher-forced logits, greedy texts; the same
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
from jaxdistill.models.language.t5 import (
    T5,
    T5Encoder,
    UMT5Encoder,
    bucket,
    shifted,
)
from jaxdistill.samplers.text import answer
from tests.interop.parity import gap

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
transformers = pytest.importorskip(
    "transformers", reason="parity with PyTorch needs transformers"
)

SIZES = dict(
    vocab_size=61,
    d_model=32,
    d_kv=6,
    d_ff=48,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)
GATED = {"feed_forward_proj": "gated-gelu"}
ENCODERS = {"T5": ("T5", {}), "gated": ("T5", GATED), "UMT5": ("UMT5", GATED)}
DECODERS = {"tied": {}, "untied": GATED | {"tie_word_embeddings": False}}
LENGTHS = np.array([20, 11, 4])


def build(name, config, untied=False, **changes):
    """A random model whose position biases and norms matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{config}Config")(
        **SIZES
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        | changes
    )
    model = getattr(transformers, name)(config).eval()
    if untied:  # transformers 5 ties what it builds, and keeps apart what a file holds apart
        model.lm_head.weight = torch.nn.Parameter(
            model.lm_head.weight.detach().clone()
        )
        model.all_tied_weights_keys = {
            k: v
            for k, v in model.all_tied_weights_keys.items()
            if k != "lm_head.weight"
        }
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3).add_(0.05)
    return model


@pytest.fixture(scope="module", params=ENCODERS)
def tower(request, tmp_path_factory):
    """(torch encoder, its folder, our net and params, its jitted call)."""
    config, changes = ENCODERS[request.param]
    return loaded(
        build(f"{config}EncoderModel", config, **changes),
        tmp_path_factory.mktemp(request.param),
    )


@pytest.fixture(scope="module", params=DECODERS)
def pair(request, tmp_path_factory):
    """(torch encoder-decoder, its folder, our net and params, its jitted call)."""
    model = build(
        "T5ForConditionalGeneration",
        "T5",
        request.param == "untied",
        **DECODERS[request.param],
    )
    return loaded(model, tmp_path_factory.mktemp(request.param))


def loaded(model, folder):
    model.save_pretrained(folder)
    net, params = interop.load(folder)
    return (
        model,
        folder,
        net,
        params,
        jax.jit(lambda *a, **k: net.apply(params, *a, **k, taps=(0, 1))),
    )


def inputs():
    """Source tokens [3 20], its padding on the right, target tokens [3 14]."""
    rng = np.random.default_rng(0)
    return (
        rng.integers(2, 61, (3, 20)),
        np.arange(20) < LENGTHS[:, None],
        rng.integers(2, 61, (3, 14)),
    )


def ints(mask):
    return torch.tensor(mask.astype(np.int64))


@pytest.mark.parametrize("padded", [False, True])
def test_encoder_states_agree(tower, padded, record_property):
    model, _, _, _, call = tower
    source, mask, _ = inputs()
    with torch.no_grad():
        expected = model(
            torch.tensor(source),
            attention_mask=ints(mask) if padded else None,
            output_hidden_states=True,
        )
    states, features = call(source, **({"mask": mask} if padded else {}))
    real = mask if padded else ...
    record_property(
        "gap", found := gap(states, expected.last_hidden_state.numpy(), real)
    )
    assert found <= 1e-5
    for state, layer in zip(features, (1, 2)):
        assert gap(state, expected.hidden_states[layer].numpy(), real) <= 1e-5


@pytest.mark.parametrize("padded", [False, True])
def test_teacher_forced_logits_agree(pair, padded, record_property):
    model, _, net, _, call = pair
    source, mask, targets = inputs()
    with torch.no_grad():
        expected = model(
            torch.tensor(source),
            attention_mask=ints(mask) if padded else None,
            labels=torch.tensor(targets),
            output_hidden_states=True,
        )
    logits, features = call(
        source,
        shifted(jnp.asarray(targets), net.config.start),
        **({"source_mask": mask} if padded else {}),
    )
    record_property("gap", found := gap(logits, expected.logits.numpy()))
    assert found <= 1e-5
    assert gap(features[0], expected.decoder_hidden_states[1].numpy()) <= 1e-5
    # transformers gives the last one after the final norm
    assert features[1].shape == features[0].shape


def test_padding_of_the_text_changes_nothing(pair):
    _, _, net, params, call = pair
    source, mask, targets = inputs()
    left = np.arange(14) >= np.array([0, 3, 5])[:, None]
    found = np.asarray(call(source, targets, source_mask=mask, mask=left)[0])
    alone = jax.jit(net.apply)(params, source[1:2, : LENGTHS[1]], targets[1:2, 3:])
    assert gap(found[1:2, 3:], np.asarray(alone)) <= 1e-5


def test_hidden_times_head_is_logits(pair):
    _, _, net, params, call = pair
    source, _, targets = inputs()
    hidden = jax.jit(lambda s, t: net.apply(params, s, t, hidden_only=True))(
        source, targets
    )
    head = net.apply(params, method="unembedding")
    assert gap(hidden @ head, np.asarray(call(source, targets)[0])) <= 1e-5


def test_cached_steps_equal_the_full_pass(pair):
    _, _, net, params, call = pair
    source, mask, targets = inputs()
    left = np.arange(14) >= np.array([0, 3, 5])[:, None]
    states = jax.jit(lambda s, m: net.apply(params, s, mask=m, method="encode"))(
        source, mask
    )
    cache = net.apply(params, states, 16, source_mask=mask, method="init_cache")
    parts = []
    step = jax.jit(
        lambda tokens, mask, cache: net.apply(
            params, tokens, mask=mask, cache=cache, taps=(0, 1), method="decode"
        )
    )
    for low in range(0, 14, 7):
        logits, cache, features = step(
            targets[:, low : low + 7], left[:, low : low + 7], cache
        )
        parts.append((logits, *features))
    expected, features = call(source, targets, source_mask=mask, mask=left)
    for part, whole in zip(zip(*parts), (expected, *features)):
        assert gap(np.concatenate(part, 1), np.asarray(whole), left) <= 1e-5
    assert int(cache["length"]) == 14 and not cache["valid"][:, 14:].any()


def test_greedy_text_agrees(pair):
    model, _, net, params, _ = pair
    source, mask, _ = inputs()
    how = dict(attention_mask=ints(mask), max_new_tokens=12, do_sample=False)
    bare = model.generate(torch.tensor(source), **how, eos_token_id=None)
    eos = int(bare[0, 5])
    expected = model.generate(
        torch.tensor(source), **how, eos_token_id=eos
    ).numpy()[:, 1:]
    bound = lambda *a, **k: net.apply(params, *a, **k)
    found, valid = jax.jit(
        lambda s, m: answer(
            bound, s, 12, jax.random.key(0), source_mask=m, temperature=0.0, eos=eos
        )
    )(source, mask)
    width = expected.shape[1]  # transformers stops when every row has ended
    np.testing.assert_array_equal(found[:, :width], expected)
    assert found.shape == valid.shape == (3, 12)
    assert valid[0].sum() == 1 + list(np.asarray(found[0])).index(eos) <= 5
    assert (np.asarray(found)[~np.asarray(valid)] == 0).all()


def same(model, net, params, folder, keys):
    """What we save loads in transformers with equal bits."""
    interop.save(folder, net, params)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for key in (*SIZES, *keys):
        assert getattr(again.config, key) == getattr(model.config, key), key
    ours = again.state_dict()
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    return again


def test_transformers_loads_our_encoder(tower, tmp_path):
    model, _, net, params, _ = tower
    # an encoder's decoder depth is nobody's: transformers fills it in
    keys = (
        "feed_forward_proj",
        "layer_norm_epsilon",
        "pad_token_id",
        "eos_token_id",
    )
    model.config.num_decoder_layers = model.config.num_layers
    same(model, net, params, tmp_path / "out", keys)


def test_transformers_loads_our_decoder(pair, tmp_path):
    model, _, net, params, _ = pair
    again = same(
        model,
        net,
        params,
        tmp_path / "out",
        ("feed_forward_proj", "scale_decoder_outputs", "decoder_start_token_id"),
    )
    source, _, targets = inputs()
    with torch.no_grad():
        logits = [
            m(torch.tensor(source), decoder_input_ids=torch.tensor(targets)).logits
            for m in (again, model)
        ]
    assert torch.equal(*logits)


def test_weights_in_bfloat16(pair):
    _, folder, _, params, _ = pair
    _, half = interop.load(folder, "bfloat16")
    jax.tree.map(
        lambda h, w: np.testing.assert_array_equal(h, w.astype("bfloat16")),
        half,
        params,
    )


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 12), (32, 20)])
@pytest.mark.parametrize("both", [False, True])
def test_buckets_agree(buckets, distance, both):
    from transformers.models.t5.modeling_t5 import T5Attention

    apart = np.arange(-3 * distance, 3 * distance + 1)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(apart), both, buckets, distance
    )
    np.testing.assert_array_equal(
        bucket(jnp.asarray(apart), buckets, distance, both=both), expected
    )


@pytest.mark.parametrize(
    ("config", "weights"),
    [  # the exact counts of the files; the paper and cards say 60M, 220M, 4.7B and 5.7B (encoders)
        (
            T5(vocab=32128, dim=512, mlp=2048, heads=8, head_dim=64, depth=6),
            60_506_624,
        ),
        (
            T5(vocab=32128, dim=768, mlp=3072, heads=12, head_dim=64, depth=12),
            222_903_552,
        ),
        (
            T5Encoder(
                vocab=32128,
                dim=4096,
                mlp=10240,
                heads=64,
                head_dim=64,
                depth=24,
                gated=True,
            ),
            4_762_310_656,
        ),
        (
            UMT5Encoder(
                vocab=256384,
                dim=4096,
                mlp=10240,
                heads=64,
                head_dim=64,
                depth=24,
                gated=True,
            ),
            5_680_910_336,
        ),
    ],
)
def test_released_sizes(config, weights):
    assert make_net(config).size == weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"feed_forward_proj": "gated-silu"},
            "feed_forward_proj='gated-silu': did you mean 'gated-gelu'",
        ),
        (
            {"tie_word_embeddings": False, "scale_decoder_outputs": False},
            "lm_head.weight .* is missing",
        ),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    build("T5ForConditionalGeneration", "T5").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(Refused, match=message):
        interop.load(tmp_path)
    file.write_text(
        json.dumps(
            {k: v for k, v in json.loads(file.read_text()).items() if k != "d_kv"}
        )
    )
    with pytest.raises(Refused, match="d_kv is missing"):
        interop.load(tmp_path)


def test_refuses_buckets_that_do_not_grow():
    net = make_net(T5Encoder(buckets=2))
    with pytest.raises(
        Refused, match="buckets=2, distance=128: expected distance > 0 > 0"
    ):
        jax.eval_shape(net.apply, net.shapes, jax.ShapeDtypeStruct((1, 4), "int32"))
