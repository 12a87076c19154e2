"""Llama, Qwen 2 and 3, Gemma 2 against transformers: the same folder gives the same logits, and
ours loads there without a key to spare.
"""

import json

import jax
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.language.gemma import Gemma2
from jaxdistill.models.language.lm import LM
from jaxdistill.models.language.qwen import Qwen2, Qwen3
from jaxdistill.samplers.text import generate
from tests.interop.parity import gap

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
transformers = pytest.importorskip(
    "transformers", reason="parity with PyTorch needs transformers"
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PADS = np.array([0, 3, 7])


def build(family="Llama", **changes):
    """A causal model whose attention is far from uniform."""
    sizes = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model


VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "stretched": {"rope_parameters": LLAMA3, "num_key_value_heads": 4},
    "qwen2": {"family": "Qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "Qwen3"},
    "gemma2": dict(
        family="Gemma2",
        query_pre_attn_scalar=5,
        sliding_window=30,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=9.0,
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(torch model, its folder, our net and params, its jitted call)."""
    model = build(**VARIANTS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    net, params = interop.load(folder)
    return (
        model,
        folder,
        net,
        params,
        jax.jit(
            lambda tokens, mask: net.apply(params, tokens, mask=mask, taps=(0, 2))
        ),
    )


def tokens():
    return np.random.default_rng(0).integers(0, 61, (3, 24))


def test_logits_and_states_agree(pair, record_property):
    model, _, _, _, call = pair
    with torch.no_grad():
        out = model(torch.tensor(tokens()), output_hidden_states=True)
    logits, (first, last) = call(tokens(), None)
    record_property("gap", found := gap(logits, out.logits.numpy()))
    assert found <= 1e-5
    assert gap(first, out.hidden_states[1].numpy()) <= 1e-5
    # transformers gives the last one after the final norm
    assert last.shape == first.shape


def test_logits_agree_under_left_padding(pair, record_property):
    model, _, _, _, call = pair
    mask = np.arange(24) >= PADS[:, None]
    with torch.no_grad():
        expected = model(
            torch.tensor(tokens()),
            attention_mask=torch.tensor(mask.astype(np.int64)),
        ).logits.numpy()
    record_property("gap", found := gap(call(tokens(), mask)[0], expected, mask))
    assert found <= 1e-5


def test_cached_steps_equal_the_full_pass(pair):
    _, _, net, params, call = pair
    mask = np.arange(24) >= PADS[:, None]
    step = jax.jit(
        lambda tokens, mask, cache: net.apply(
            params, tokens, mask=mask, cache=cache
        )
    )
    cache = net.apply(params, 3, 24, method="init_cache")
    parts = []
    for low in range(0, 24, 8):
        logits, cache = step(
            tokens()[:, low : low + 8], mask[:, low : low + 8], cache
        )
        parts.append(logits)
    assert (
        gap(np.concatenate(parts, 1), np.asarray(call(tokens(), mask)[0]), mask)
        <= 1e-5
    )


def test_weights_in_bfloat16(pair):
    _, folder, _, params, _ = pair
    _, half = interop.load(folder, "bfloat16")
    jax.tree.map(
        lambda h, w: np.testing.assert_array_equal(h, w.astype("bfloat16")),
        half,
        params,
    )


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (
            LM(
                vocab=128256,
                dim=2048,
                mlp=8192,
                heads=32,
                kv_heads=8,
                depth=16,
                tied=True,
            ),
            1_235_814_400,
        ),  # Llama 3.2: 1.23B
        (
            Qwen2(
                vocab=151936,
                dim=896,
                mlp=4864,
                heads=14,
                kv_heads=2,
                depth=24,
                tied=True,
            ),
            494_032_768,
        ),  # Qwen2.5-0.5B: 0.49B
        (
            Gemma2(
                vocab=256000,
                dim=2304,
                mlp=9216,
                heads=8,
                kv_heads=4,
                head_dim=256,
                depth=26,
            ),
            2_614_341_888,
        ),  # 2.6B
        (
            Qwen3(
                vocab=151936,
                dim=1024,
                mlp=3072,
                heads=16,
                kv_heads=8,
                head_dim=128,
                depth=28,
                tied=True,
            ),
            596_049_920,
        ),  # 0.6B
    ],
)
def test_released_sizes(config, weights):
    """The model cards' rounded counts, and their safetensors' exact ones."""
    assert make_net(config).size == weights


@pytest.mark.parametrize("pair", ["tied", "stretched"], indirect=True)
def test_greedy_text_agrees(pair):
    model, _, net, params, _ = pair
    prompt = tokens()[:, :10]
    mask = np.arange(10) >= PADS[:, None]
    bare = model.generate(
        torch.tensor(prompt),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        max_new_tokens=14,
        do_sample=False,
    )
    eos = int(bare[0, 14])
    expected = model.generate(
        torch.tensor(prompt),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        max_new_tokens=14,
        do_sample=False,
        eos_token_id=eos,
    ).numpy()
    write = lambda prompt, mask: generate(
        lambda *a, **k: net.apply(params, *a, **k),
        prompt,
        24,
        jax.random.key(0),
        prompt_mask=mask,
        temperature=0.0,
        eos=eos,
    )
    found, valid = jax.jit(write)(prompt, mask)
    width = expected.shape[1]  # transformers stops when every row has ended
    np.testing.assert_array_equal(found[:, :width], expected)
    assert not valid[0, 15:].any() and (found[:, width:] == 0).all()


def test_transformers_loads_what_we_save(pair, tmp_path):
    model, _, net, params, _ = pair
    interop.save(tmp_path / "out", net, params, max_shard_bytes=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    assert again.config.rope_parameters == model.config.rope_parameters
    assert type(again) is type(model)
    for key in (
        "tie_word_embeddings",
        "rms_norm_eps",
        "head_dim",
        "num_key_value_heads",
        "pad_token_id",
        "eos_token_id",
    ):
        assert getattr(again.config, key) == getattr(model.config, key), key
    ours = again.state_dict()
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    "name", ["Gemma2Model", "Qwen2_5_VLForConditionalGeneration"]
)
def test_encoders_of_prompts(name, tmp_path, agree, returns, halves):
    """The last normed states, texts padded on the right as the pipelines of SANA and Qwen-Image
    give them.
    """
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    if name == "Gemma2Model":
        model = transformers.Gemma2Model(
            transformers.Gemma2Config(
                **sizes,
                head_dim=6,
                query_pre_attn_scalar=5,
                sliding_window=30,
                attn_logit_softcapping=3.0,
            )
        ).eval()
    else:
        rope = {
            "rope_type": "default",
            "rope_theta": 300.0,
            "mrope_section": [1, 1, 2],
        }
        eye = dict(
            depth=1,
            hidden_size=16,
            num_heads=2,
            intermediate_size=16,
            out_hidden_size=32,
            patch_size=2,
            fullatt_block_indexes=[0],
        )
        config = transformers.Qwen2_5_VLConfig(
            text_config={**sizes, "rope_parameters": rope}, vision_config=eye
        )
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    model.save_pretrained(tmp_path / "in")
    net, params = interop.load(tmp_path / "in")
    mask = np.arange(24) < 24 - PADS[:, None]
    with torch.no_grad():
        out = model(
            torch.tensor(tokens()),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            output_hidden_states=True,
        )
    agree(
        name,
        jax.jit(net.apply)(params, tokens(), mask=mask),
        out.hidden_states[-1],
        mask[..., None],
    )
    halves(tmp_path / "in")
    if name == "Gemma2Model":
        returns(type(model), model, net, params)
    else:
        with pytest.raises(
            Refused,
            match="Qwen2Text is its language side of Qwen2_5_VLForConditionalGeneration, "
            "which cannot be saved",
        ):
            interop.save(tmp_path / "out", net, params)


def test_axes_of_positions_are_one_on_text_alone(tmp_path):
    """Qwen2.5-VL's first files say "mrope"; a language model with such a setting is another
    network.
    """
    build("Qwen2").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config = {k: v for k, v in config.items() if k != "rope_parameters"} | {
        "rope_theta": 300.0
    }
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 1]}
    file.write_text(json.dumps(config))
    with pytest.raises(Refused, match="rope_type='mrope' is not supported"):
        interop.describe(tmp_path)
    file.write_text(
        json.dumps(
            config | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
        )
    )
    assert interop.describe(tmp_path).rope_theta == 300.0


SCALINGS = {
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
}


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_two_statements_on_positions_must_agree(family, tmp_path):
    """transformers 5 obeys `rope_scaling` where config.json has both."""
    build(family).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["rope_parameters"]["rope_type"] == "default"
    for kind, scaling in SCALINGS.items():
        file.write_text(json.dumps(config | {"rope_scaling": scaling}))
        said = (
            "rope_scaling and rope_parameters differ"
            if kind == "llama3"
            else f"rope_type='{kind}' is not supported"
        )
        with pytest.raises(Refused, match=said) as found:
            interop.describe(tmp_path)
        assert str(found.value).isprintable()
    file.write_text(
        json.dumps(
            config
            | {
                "rope_scaling": {"type": "default"},
                "rope_parameters": {"rope_theta": 300.0},
            }
        )
    )
    with pytest.raises(Refused, match=r"differ \(rope_theta=10000.0 and 300.0\)"):
        interop.describe(tmp_path)
    both = {
        "rope_theta": 300.0,
        "rope_scaling": SCALINGS["llama3"],
        "rope_parameters": LLAMA3,
    }
    file.write_text(json.dumps(config | both))
    read = interop.describe(tmp_path)
    assert (read.rope_theta, read.rope_factor) == (300.0, 4.0)


def test_capped_logits_are_not_made_in_chunks():
    net = make_net(Gemma2(logit_cap=30.0))
    with pytest.raises(
        Refused,
        match=r"logits are capped at 30\.0 and cannot be made in chunks; set method.chunk=0",
    ):
        jax.eval_shape(lambda p: net.apply(p, method="unembedding"), net.shapes)
    with pytest.raises(Refused, match="max_length=2048 is more than window=1024"):
        make_net(Gemma2(window=1024))


@pytest.mark.parametrize("pair", ["tied"], indirect=True)
def test_sharded_folders_load(pair, tmp_path):
    model, _, net, params, _ = pair
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    found, again = interop.load(tmp_path)
    assert found.config == net.config
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_stop_tokens_come_from_generation_config(tmp_path):
    model = build(eos_token_id=5, bos_token_id=4)
    model.generation_config.eos_token_id = [5, 7]
    model.save_pretrained(tmp_path / "in")
    net, params = interop.load(tmp_path / "in")
    assert (net.config.bos, net.config.eos, net.config.pad) == (4, (5, 7), 0)
    interop.save(tmp_path / "out", net, params)
    assert transformers.GenerationConfig.from_pretrained(
        tmp_path / "out"
    ).eos_token_id == [5, 7]


def test_rope_keys_of_older_files(tmp_path):
    build(rope_parameters=LLAMA3).save_pretrained(tmp_path)
    expected = interop.describe(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    file.write_text(json.dumps(config | {"rope_scaling": rope}))
    assert interop.describe(tmp_path) == expected
    assert (expected.rope_theta, expected.rope_factor, expected.rope_original) == (
        300.0,
        4.0,
        16,
    )


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "Llama",
            {"attention_bias": True},
            "attention_bias=True is not supported, expected False",
        ),
        (
            "Llama",
            {"hidden_act": "gelu"},
            "hidden_act='gelu' is not supported, expected 'silu'",
        ),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type='linear' is not supported",
        ),
        (
            "Qwen2",
            {"use_sliding_window": True},
            "use_sliding_window=True is not supported, expected False",
        ),
        (
            "Qwen3",
            {"attention_bias": True},
            "attention_bias=True is not supported, expected False",
        ),
        (
            "Gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not supported, expected None",
        ),
        (
            "Gemma2",
            {"layer_types": ["sliding_attention"]},
            "layer_types=.*expected 3 of sliding_attention and full_attention",
        ),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, family, change, message):
    build(family).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(Refused, match=message):
        interop.load(tmp_path)
    config = {
        k: v
        for k, v in json.loads(file.read_text()).items()
        if k not in (*change, "hidden_size")
    }
    file.write_text(json.dumps(config))
    with pytest.raises(Refused, match="hidden_size is missing"):
        interop.load(tmp_path)
