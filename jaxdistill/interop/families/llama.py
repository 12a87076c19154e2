"""`LlamaForCausalLM` of transformers (Llama 1 to 3, SmolLM, TinyLlama and others of the same
graph), and the two that differ from it in a few weights of the attention: `Qwen2ForCausalLM` (2 and
2.5) and `Qwen3ForCausalLM`. The language side of `Qwen2_5_VLForConditionalGeneration` is read as a
text encoder.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused
from jaxdistill.interop.safetensors import read_json, shown
from jaxdistill.interop.settings import check
from jaxdistill.interop.tables import LINEAR, Family, Row, fixed, sizes
from jaxdistill.models.language.lm import LM
from jaxdistill.models.language.qwen import Qwen2, Qwen2Text, Qwen3

SIZES = {
    "vocab": "vocab_size",
    "dim": "hidden_size",
    "mlp": "intermediate_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
}
FIXED = {  # what our models cannot do otherwise
    LM: {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    Qwen2: {"hidden_act": "silu", "use_sliding_window": False},
    Qwen2Text: {"hidden_act": "silu", "use_sliding_window": False},
    Qwen3: {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
}
TYPES = {LM: "llama", Qwen2: "qwen2", Qwen2Text: "qwen2_5_vl", Qwen3: "qwen3"}  # model_type


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
        rows += tuple(Row(f"blocks/to_{x}/bias", f"{layer}self_attn.{x}_proj.bias") for x in "qkv")
    if isinstance(cfg, Qwen3):
        rows += tuple(
            Row(f"blocks/norm_{x}/scale", f"{layer}self_attn.{x}_norm.weight") for x in "qk"
        )
    return rows if cfg.tied else (*rows, Row("unembed/kernel", "lm_head.weight", LINEAR))


def read(config: dict[str, Any], folder: Path, *, make: type[LM] = LM) -> LM:
    where = folder / "config.json"
    fixed(config, FIXED[make], where)
    found = sizes(config, SIZES, where)
    return make(
        **found,
        **read_rope(config, where),
        **read_ids(config, folder),
        kv_heads=config.get("num_key_value_heads") or 0,
        head_dim=config.get("head_dim") or 0,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        max_length=config.get("max_position_embeddings", 2048),
    )


def read_vl(config: dict[str, Any], folder: Path) -> Qwen2Text:
    """The language side of a model of text and images, whose rotary positions have three axes that
    are one on text.
    """
    config = (
        config | (config.get("text_config") or {}) | {"tie_word_embeddings": True}
    )  # there is no head
    rope = config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "mrope":
        config["rope_scaling"] = None
    return read(config, folder, make=Qwen2Text)


def read_ids(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Special tokens: from generation_config.json where there is one, since that is what stops
    generation.
    """
    generation = folder / "generation_config.json"
    given = read_json(generation) if generation.exists() else {}
    check({key: value for key, value in given.items() if key.endswith("_token_id")}, generation)
    ids = {**config, **given}
    eos = ids.get("eos_token_id")
    return {
        "eos": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        "bos": _or(ids.get("bos_token_id"), -1),
        "pad": _or(ids.get("pad_token_id"), -1),
    }


def write_ids(cfg: LM) -> dict[str, Any]:
    """Special tokens, in the keys of both files."""
    return {
        "bos_token_id": None if cfg.bos < 0 else cfg.bos,
        "eos_token_id": list(cfg.eos) if len(cfg.eos) > 1 else cfg.eos[0] if cfg.eos else None,
        "pad_token_id": None if cfg.pad < 0 else cfg.pad,
    }


def read_rope(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """Rotary settings, from transformers 5's `rope_parameters` or from `rope_theta` and
    `rope_scaling` of older files.

    Raises Refused for another `rope_type`, and where both stand and differ: versions of
    transformers obey one or the other.
    """
    stated = [
        _rope(config, key, where) for key in ("rope_scaling", "rope_parameters") if config.get(key)
    ]
    rope = stated[-1] if stated else _rope(config, "rope_scaling", where)
    if stated and stated[0] != rope:
        key = next(key for key in sorted(stated[0] | rope) if stated[0].get(key) != rope.get(key))
        values = (shown(repr(values.get(key))) for values in (stated[0], rope))
        raise Refused(
            f"{where}: rope_scaling and rope_parameters differ ({key}={' and '.join(values)}), expected one of them"
        )
    if rope["rope_type"] == "default":
        return {"rope_theta": rope["rope_theta"]}
    names = {
        "rope_factor": "factor",
        "rope_low": "low_freq_factor",
        "rope_high": "high_freq_factor",
        "rope_original": "original_max_position_embeddings",
    }
    return {"rope_theta": rope["rope_theta"], **sizes(rope, names, where)}


def _rope(config: dict[str, Any], key: str, where: Path) -> dict[str, Any]:
    """All that config.json says of rotary positions, were `key` the only object on them."""
    given = config.get(key) or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise Refused(
            f"{where}: rope_type={shown(repr(kind))} is not supported, expected 'default' or 'llama3'"
        )
    rest = {name: value for name, value in given.items() if name != "type"}
    return {"rope_theta": config.get("rope_theta", 10000.0), **rest, "rope_type": kind}


def write(cfg: LM, *, name: str) -> dict[str, dict[str, Any]]:
    """config.json and generation_config.json, in the keys that transformers 4 and 5 both read."""
    stretched = {
        "rope_type": "llama3",
        "factor": cfg.rope_factor,
        "low_freq_factor": cfg.rope_low,
        "high_freq_factor": cfg.rope_high,
        "original_max_position_embeddings": cfg.rope_original,
    }
    ids = write_ids(cfg)
    config = {
        "architectures": [name],
        "model_type": TYPES[type(cfg)],
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": cfg.kv_heads or cfg.heads,
        "head_dim": cfg.head_size,
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if cfg.rope_factor == 1.0 else stretched,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": 0.02,
        "use_cache": True,
        **FIXED[type(cfg)],
        **ids,
    }
    return {"config.json": config, "generation_config.json": ids}


def _or(value, default):
    return default if value is None else value


def _family(name: str, make: type[LM]) -> Family:
    return Family(
        name=name,
        library="transformers",
        call="model.generate(tokens, max_new_tokens=64)",
        config=make,
        read=functools.partial(read, make=make),
        write=functools.partial(write, name=name),
        table=table,
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # old files' constants
        tied=(("lm_head.weight", "model.embed_tokens.weight"),),
        free=("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    )


FAMILY = _family("LlamaForCausalLM", LM)
QWEN2 = _family("Qwen2ForCausalLM", Qwen2)
QWEN3 = _family("Qwen3ForCausalLM", Qwen3)
_TEXT = _family("Qwen2_5_VLForConditionalGeneration", Qwen2Text)
QWEN_VL = dataclasses.replace(  # the head is no part of ours
    _TEXT,
    read=read_vl,
    ignored=(*_TEXT.ignored, r"visual\..*", r"lm_head\.weight"),
    tied=(),
    part="its language side",
)
