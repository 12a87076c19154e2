"""`LlamaForCausalLM` of transformers: Llama 1 to 3, SmolLM, TinyLlama and others of the same graph.

`Qwen2ForCausalLM` (2 and 2.5) and `Qwen3ForCausalLM` differ from it in a few weights of the
attention. The language side of `Qwen2_5_VLForConditionalGeneration` is read as a text encoder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused, quoted
from jaxdistill.interop.keys import (
    Field,
    Fixed,
    Key,
    Written,
    read_keys,
    same,
    setting,
    token,
    tokens,
    write_keys,
)
from jaxdistill.interop.safetensors import read_json
from jaxdistill.interop.settings import check
from jaxdistill.interop.tables import LINEAR, Family, Row
from jaxdistill.models.language.lm import LM
from jaxdistill.models.language.qwen import Qwen2, Qwen2Text, Qwen3

SIZES = (
    same("vocab", "vocab_size"),
    same("dim", "hidden_size"),
    same("mlp", "intermediate_size"),
    same("depth", "num_hidden_layers"),
    same("heads", "num_attention_heads"),
)
# Keys in which two copies of one network may differ
FREE = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
TOKENS = (
    token("bos", "bos_token_id", missing=-1),
    tokens("eos", "eos_token_id", missing=[]),
    token("pad", "pad_token_id", missing=-1),
)


def _stretching(ours: LM) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    if ours.rope_factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": ours.rope_factor,
        "low_freq_factor": ours.rope_low,
        "high_freq_factor": ours.rope_high,
        "original_max_position_embeddings": ours.rope_original,
    }


KEYS = (
    *SIZES,
    Field(
        field="kv_heads",
        key="num_key_value_heads",
        write=lambda ours: ours.kv_heads or ours.heads,
        missing=0,
        null=0,
    ),
    Field(
        field="head_dim",
        key="head_dim",
        write=lambda ours: ours.head_size,
        missing=0,
        null=0,
    ),
    same("max_length", "max_position_embeddings", missing=2048),
    same("norm_eps", "rms_norm_eps", missing=1e-6),
    Written("rope_theta", lambda ours: ours.rope_theta),
    Written("rope_scaling", _stretching),
    same("tied", "tie_word_embeddings", missing=False),
    Written("initializer_range", 0.02),
    Written("use_cache", True),
    Fixed("hidden_act", "silu"),
)
LLAMA_KEYS = (*KEYS, Fixed("attention_bias", False), Fixed("mlp_bias", False))
QWEN2_KEYS = (*KEYS, Fixed("use_sliding_window", False))
QWEN3_KEYS = (
    *KEYS,
    Fixed("attention_bias", False),
    Fixed("use_sliding_window", False),
)


def table(cfg: LM) -> tuple[Row, ...]:
    layer = "model.layers.{i}."
    rows = (
        Row("embed/embedding", "model.embed_tokens.weight"),
        Row("blocks/norm_attention/scale", layer + "input_layernorm.weight"),
        Row("blocks/to_q/kernel", layer + "self_attn.q_proj.weight", LINEAR),
        Row("blocks/to_k/kernel", layer + "self_attn.k_proj.weight", LINEAR),
        Row("blocks/to_v/kernel", layer + "self_attn.v_proj.weight", LINEAR),
        Row("blocks/to_out/kernel", layer + "self_attn.o_proj.weight", LINEAR),
        Row("blocks/norm_mlp/scale", layer + "post_attention_layernorm.weight"),
        Row("blocks/gate/kernel", layer + "mlp.gate_proj.weight", LINEAR),
        Row("blocks/up/kernel", layer + "mlp.up_proj.weight", LINEAR),
        Row("blocks/down/kernel", layer + "mlp.down_proj.weight", LINEAR),
        Row("norm/scale", "model.norm.weight"),
    )
    if isinstance(cfg, Qwen2):
        rows += (
            Row("blocks/to_q/bias", layer + "self_attn.q_proj.bias"),
            Row("blocks/to_k/bias", layer + "self_attn.k_proj.bias"),
            Row("blocks/to_v/bias", layer + "self_attn.v_proj.bias"),
        )
    if isinstance(cfg, Qwen3):
        rows += (
            Row("blocks/norm_q/scale", layer + "self_attn.q_norm.weight"),
            Row("blocks/norm_k/scale", layer + "self_attn.k_norm.weight"),
        )
    return (
        rows
        if cfg.tied
        else (*rows, Row("unembed/kernel", "lm_head.weight", LINEAR))
    )


def _language_side(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """config.json of the language side of a model of text and images.

    Its rotary positions have three axes, which are one on text; it has no head.
    """
    values = (
        values | (values.get("text_config") or {}) | {"tie_word_embeddings": True}
    )
    rope = values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "mrope":
        values["rope_scaling"] = None
    return values


def rope_and_tokens(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Our fields of rotary positions and special tokens.

    The tokens are those of generation_config.json where there is one, since that is what stops
    generation.
    """
    generation = folder / "generation_config.json"
    given = read_json(generation) if generation.exists() else {}
    check(
        {key: value for key, value in given.items() if key.endswith("_token_id")},
        generation,
    )
    found = read_keys(TOKENS, {**values, **given}, folder / "config.json")
    return read_rope(values, folder / "config.json") | found


def tokens_of_both_files(ours: LM, *, name: str) -> dict[str, dict[str, Any]]:
    """Special tokens, in the keys of config.json and generation_config.json.

    Raises Refused where the class `name` has no stretched positions and ours are.
    """
    if ours.rope_factor != 1.0:
        raise Refused(
            f"{name}: rope_factor={ours.rope_factor} cannot be written, expected 1.0"
        )
    return _both_files(ours)


def _both_files(ours: LM) -> dict[str, dict[str, Any]]:
    found = write_keys(TOKENS, ours)
    return {"config.json": found, "generation_config.json": found}


def read_rope(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Our fields of rotary positions, from transformers 5's `rope_parameters` or from `rope_theta`
    and `rope_scaling` of older files.

    Raises Refused for another `rope_type`, and where both objects are given and differ: versions of
    transformers obey one or the other.
    """
    objects = [
        key for key in ("rope_scaling", "rope_parameters") if values.get(key)
    ]
    stated = [_rope(values, key, file) for key in objects or ["rope_scaling"]]
    first = stated[0]
    rope = stated[-1]
    for key in sorted(first | rope):
        if first.get(key) != rope.get(key):
            one = quoted(first.get(key))
            other = quoted(rope.get(key))
            raise Refused(
                f"{file}: rope_scaling and rope_parameters differ ({key}={one} and {other}), "
                "expected one of them"
            )
    found = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "default":
        return found
    return found | {
        "rope_factor": setting(rope, "factor", file),
        "rope_low": setting(rope, "low_freq_factor", file),
        "rope_high": setting(rope, "high_freq_factor", file),
        "rope_original": setting(rope, "original_max_position_embeddings", file),
    }


def _rope(values: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    """What config.json says of rotary positions if `key` is its only object on them."""
    given = values.get(key) or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise Refused(
            f"{file}: rope_type={quoted(kind)} is not supported, expected 'default' or 'llama3'"
        )
    rest = {name: value for name, value in given.items() if name != "type"}
    return {
        "rope_theta": values.get("rope_theta", 10000.0),
        **rest,
        "rope_type": kind,
    }


def _family(
    name: str, config: type[LM], model_type: str, keys: tuple[Key, ...]
) -> Family:
    return Family(
        name=name,
        library="transformers",
        config=config,
        model_type=model_type,
        keys=keys,
        more_fields=rope_and_tokens,
        more_files=_both_files,
        table=table,
        ignored=(
            r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        ),  # in old files
        tied=(("lm_head.weight", "model.embed_tokens.weight"),),
        free=FREE,
        call="model.generate(tokens, max_new_tokens=64)",
    )


FAMILY = _family("LlamaForCausalLM", LM, "llama", LLAMA_KEYS)
QWEN2 = _family("Qwen2ForCausalLM", Qwen2, "qwen2", QWEN2_KEYS)
QWEN3 = _family("Qwen3ForCausalLM", Qwen3, "qwen3", QWEN3_KEYS)
_TEXT = _family(
    "Qwen2_5_VLForConditionalGeneration", Qwen2Text, "qwen2_5_vl", QWEN2_KEYS
)
QWEN_VL = dataclasses.replace(
    _TEXT,
    prepare=_language_side,
    ignored=(*_TEXT.ignored, r"visual\..*", r"lm_head\.weight"),  # ours has no head
    tied=(),
    part="its language side",
)
