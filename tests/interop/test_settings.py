import json

import pytest

from jaxdistill import interop
from jaxdistill.core.types import Refused
from jaxdistill.interop import settings
from jaxdistill.interop.keys import setting
from tests import damage

WHOLE = [family for family in interop.FAMILIES if not family.part]
UNREAD = {  # written for PyTorch alone
    "use_cache",
    "upcast_attention",
    "force_upcast",
    "is_encoder_decoder",
    "initializer_range",
    "rope_max_seq_len",
    "scale_factor_temporal",
    "scale_factor_spatial",
}
WRONG = (
    "8",
    "ghost",
    2.5,
    True,
    None,
    [2.5],
    ["8"],
    {"a": 1},
    -1,
    10**12,
    10**400,
    float("nan"),
    float("inf"),
)


@pytest.fixture
def describe(tmp_path):
    """describe(family, **changes): what is said of the family's own config.json with some keys
    changed, None where it is accepted.
    """

    def run(family, **changes):
        for file, value in family.write(family.config()).items():
            (tmp_path / file).write_text(
                json.dumps(value | changes if file == "config.json" else value)
            )
        return damage.outcome(lambda: interop._describe(tmp_path), "config.json")

    return run


@pytest.mark.parametrize("family", WHOLE, ids=lambda family: family.name)
def test_a_size_of_a_wrong_type_or_absurd_is_refused_by_name(describe, family):
    config = family.write(family.config())["config.json"]
    assert describe(family) is None
    checked = 0
    for key, value in config.items():
        kind = family.kinds.get(key) or settings.KINDS.get(key)
        if type(value) is not int or kind is None:
            continue
        ids = key.endswith("_token_id")
        for wrong in WRONG:
            if wrong in ([None, -1] if ids else [None]) and kind.holds(wrong):
                continue  # there, null is a key that is missing
            message = describe(family, **{key: wrong})
            assert message and key in message, (key, wrong, message)
            checked += 1
        if not ids:
            message = describe(family, **{key: [value] * 2})
            assert message is None or "\n" not in message
    assert checked > 20 or family.name == "LPIPS"


@pytest.mark.parametrize("family", WHOLE, ids=lambda family: family.name)
def test_numbers_lists_and_flags_of_every_key_are_checked(describe, family):
    """A key of a new family that nobody checks fails here."""
    for key, value in family.write(family.config())["config.json"].items():
        if (
            isinstance(value, int | float | list)
            and key not in UNREAD
            and key != "architectures"
        ):
            for wrong in ("ghost", [None], [{"a": 1}], float("nan")):
                message = describe(family, **{key: wrong})
                assert message and key in message, (key, wrong, message)


def test_a_message_says_file_key_value_and_expectation(describe):
    llama = next(family for family in WHOLE if family.name == "LlamaForCausalLM")
    message = describe(llama, hidden_size="64")
    assert message.endswith(
        "config.json: hidden_size='64' is not supported, expected a whole number from 1 to 1048576"
    )
    message = describe(llama, rope_scaling={"rope_type": "llama3", "factor": "8"})
    assert message.endswith(
        "config.json: rope_scaling.factor='8' is not supported, expected a number above 0, to 1e+09"
    )
    assert describe(llama, rope_scaling={"rope_type": "llama3"}).endswith(
        "config.json: factor is missing"
    )
    assert len(describe(llama, vocab_size=["x"] * 10_000)) < 1000


def test_special_tokens_of_both_files(tmp_path):
    llama = next(family for family in WHOLE if family.name == "LlamaForCausalLM")
    for file, value in llama.write(llama.config()).items():
        (tmp_path / file).write_text(json.dumps(value))
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [2, "3"], "temperature": "any"}'
    )
    with pytest.raises(
        Refused,
        match=r"generation_config.json: eos_token_id=\[2, '3'\] is not supported, "
        "expected a whole number",
    ):
        interop.describe(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [2, 3], "temperature": "any"}'
    )
    assert interop.describe(tmp_path).eos == (2, 3)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("UNet2DConditionModel", {"norm_num_groups": 7}),
        ("AutoencoderKL", {"norm_num_groups": 7}),
        ("GPTNeoXForCausalLM", {"rotary_pct": 0.001}),
        ("DiTTransformer2DModel", {"patch_size": 7}),
        ("ViTModel", {"patch_size": 1000}),
        ("BertModel", {"num_attention_heads": 7}),
        ("Qwen3ForCausalLM", {"head_dim": 3}),
    ],
)
def test_sizes_that_make_no_network_are_one_line(tmp_path, name, changes):
    family = next(family for family in WHOLE if family.name == name)
    (tmp_path / "config.json").write_text(
        json.dumps(family.write(family.config())["config.json"] | changes)
    )
    damage.outcome(lambda: interop.describe(tmp_path), "config.json")
    damage.outcome(lambda: interop.load(tmp_path), "config.json", str(tmp_path))


def test_groups_that_do_not_divide_are_named(tmp_path):
    family = next(
        family for family in WHOLE if family.name == "UNet2DConditionModel"
    )
    (tmp_path / "config.json").write_text(
        json.dumps(
            family.write(family.config())["config.json"] | {"norm_num_groups": 7}
        )
    )
    with pytest.raises(
        Refused, match=r"config.json: no UNet2DConditionModel has these sizes"
    ):
        interop.describe(tmp_path)


def test_null_is_missing(tmp_path):
    with pytest.raises(Refused, match=r"config.json: a is null"):
        setting({"a": None}, "a", tmp_path / "config.json")
    with pytest.raises(Refused, match=r"config.json: a is missing"):
        setting({}, "a", tmp_path / "config.json")
