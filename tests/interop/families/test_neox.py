"""GPT-NeoX and Pythia against transformers: logits and texts agree, and so do weights both ways."""

import json

import jax
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.language.neox import NeoX
from jaxdistill.samplers.text import generate
from tests.interop.parity import gap

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
transformers = pytest.importorskip(
    "transformers", reason="parity with PyTorch needs transformers"
)

VARIANTS = {
    "parallel": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 300.0,
            "partial_rotary_factor": 0.5,
        }
    },
    "serial": {
        "use_parallel_residual": False,
        "hidden_act": "gelu_fast",
        "tie_word_embeddings": True,
    },
}
PADS = np.array([0, 3, 7])


def build(**changes):
    sizes = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**sizes | changes)
    ).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model


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


def padding():
    return np.arange(24) >= PADS[:, None]


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
    model, _, net, params, call = pair
    with torch.no_grad():
        expected = model(
            torch.tensor(tokens()),
            attention_mask=torch.tensor(padding().astype(np.int64)),
        ).logits.numpy()
    logits = call(tokens(), padding())[0]
    record_property("gap", found := gap(logits, expected, padding()))
    assert found <= 1e-5
    assert (
        gap(
            logits[1, PADS[1] :],
            np.asarray(jax.jit(net.apply)(params, tokens()[1:2, PADS[1] :]))[0],
        )
        <= 1e-5
    )


def test_cached_steps_equal_the_full_pass(pair):
    _, _, net, params, call = pair
    step = jax.jit(
        lambda tokens, mask, cache: net.apply(
            params, tokens, mask=mask, cache=cache
        )
    )
    cache = net.apply(params, 3, 24, method="init_cache")
    parts = []
    for low in range(0, 24, 8):
        logits, cache = step(
            tokens()[:, low : low + 8], padding()[:, low : low + 8], cache
        )
        parts.append(logits)
    assert (
        gap(
            np.concatenate(parts, 1),
            np.asarray(call(tokens(), padding())[0]),
            padding(),
        )
        <= 1e-5
    )


def test_greedy_text_agrees(pair):
    model, _, net, params, _ = pair
    prompt = tokens()[:, :10]
    mask = padding()[:, :10]
    expected = model.generate(
        torch.tensor(prompt),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        max_new_tokens=8,
        do_sample=False,
    )
    bound = lambda *a, **k: net.apply(params, *a, **k)
    write = jax.jit(
        lambda prompt, mask: generate(
            bound, prompt, 18, jax.random.key(0), prompt_mask=mask, temperature=0.0
        )
    )
    np.testing.assert_array_equal(write(prompt, mask)[0], expected.numpy())


def test_probe_reads_the_same_pass(pair):
    _, _, net, params, call = pair
    read = lambda before, inside, after: (after, inside.neurons)
    states, neurons = jax.jit(
        lambda tokens: net.apply(params, read, tokens, method="probe")
    )(tokens())
    assert gap(states[0], np.asarray(call(tokens(), None)[1][0])) <= 1e-5
    assert neurons.shape == (3, 3, 24, 48)


def test_transformers_loads_what_we_save(pair, tmp_path):
    model, _, net, params, _ = pair
    interop.save(tmp_path / "out", net, params)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(again) is type(model) and not any(info.values())
    for key in (
        "tie_word_embeddings",
        "layer_norm_eps",
        "use_parallel_residual",
        "hidden_act",
        "rope_parameters",
        "pad_token_id",
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


def test_rope_keys_of_older_files(tmp_path):
    build(**VARIANTS["parallel"]).save_pretrained(tmp_path)
    expected = interop.describe(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    file.write_text(
        json.dumps(
            config
            | {
                "rotary_emb_base": rope["rope_theta"],
                "rotary_pct": rope["partial_rotary_factor"],
            }
        )
    )
    assert interop.describe(tmp_path) == expected
    assert (expected.rope_theta, expected.rotary_share) == (300.0, 0.5)


@pytest.mark.parametrize(
    ("config", "weights"),
    [  # tables of arXiv:2304.01373 and the model cards
        (NeoX(vocab=50304, dim=512, mlp=2048, heads=8, depth=6), 70_426_624),
        (NeoX(vocab=50304, dim=768, mlp=3072, heads=12, depth=12), 162_322_944),
    ],
)
def test_released_sizes(config, weights):
    assert make_net(config).size == weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention_bias": False},
            "attention_bias=False is not supported, expected True",
        ),
        ({"hidden_act": "swish"}, "hidden_act='swish': expected one of gelu"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type='linear' is not supported",
        ),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    build().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(Refused, match=message):
        interop.load(tmp_path)


def test_refuses_heads_of_other_sizes():
    with pytest.raises(
        Refused, match="kv_heads=2, head_dim=0: NeoX has heads=4 of dim / heads"
    ):
        make_net(NeoX(kv_heads=2))
    with pytest.raises(
        Refused,
        match=r"1 of a head's 4 channels turn \(rotary_share=0.25\), not pairs",
    ):
        make_net(NeoX(dim=16))
