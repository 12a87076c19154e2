"""`GPTNeoXForCausalLM` of transformers: GPT-NeoX and Pythia."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused, lookup
from jaxdistill.interop.families.llama import read_ids, read_rope, write_ids
from jaxdistill.interop.tables import LINEAR, Family, Row, fixed, linear, norm, sizes
from jaxdistill.models.language.neox import NeoX
from jaxdistill.models.layers import ACTIVATIONS

SIZES = {
    "vocab": "vocab_size",
    "dim": "hidden_size",
    "mlp": "intermediate_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
}
FIXED = {"attention_bias": True}


def table(cfg: NeoX) -> tuple[Row, ...]:
    layer = "gpt_neox.layers.{i}."
    rows = (
        Row("embed/embedding", "gpt_neox.embed_in.weight"),
        *norm("blocks/norm_attention", layer + "input_layernorm"),
        *linear("blocks/to_qkv", layer + "attention.query_key_value"),
        *linear("blocks/to_out", layer + "attention.dense"),
        *norm("blocks/norm_mlp", layer + "post_attention_layernorm"),
        *linear("blocks/up", layer + "mlp.dense_h_to_4h"),
        *linear("blocks/down", layer + "mlp.dense_4h_to_h"),
        *norm("norm", "gpt_neox.final_layer_norm"),
    )
    return rows if cfg.tied else (*rows, Row("unembed/kernel", "embed_out.weight", LINEAR))


def read(config: dict[str, Any], folder: Path) -> NeoX:
    where = folder / "config.json"
    fixed(config, FIXED, where)
    found = sizes(config, SIZES, where)
    lookup(ACTIVATIONS, found["activation"], f"{where}: hidden_act")
    rope = config.get("rope_parameters") or {}  # older files have the two keys of their own
    share = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    return NeoX(
        **found,
        **read_rope({"rope_theta": config.get("rotary_emb_base", 10000.0), **config}, where),
        **read_ids(config, folder),
        rotary_share=share,
        parallel=config.get("use_parallel_residual", True),
        tied=config.get("tie_word_embeddings", False),
    )


def write(cfg: NeoX) -> dict[str, dict[str, Any]]:
    """config.json and generation_config.json, in the keys that transformers 4 and 5 both read."""
    if cfg.rope_factor != 1.0:
        raise Refused(
            f"{FAMILY.name}: rope_factor={cfg.rope_factor} cannot be written, expected 1.0"
        )
    config = {
        "architectures": [FAMILY.name],
        "model_type": "gpt_neox",
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
        "rotary_emb_base": cfg.rope_theta,
        "rotary_pct": cfg.rotary_share,
        "use_parallel_residual": cfg.parallel,
        "tie_word_embeddings": cfg.tied,
        "use_cache": True,
        **FIXED,
        **write_ids(cfg),
    }
    return {"config.json": config, "generation_config.json": write_ids(cfg)}


FAMILY = Family(
    name="GPTNeoXForCausalLM",
    library="transformers",
    call="model.generate(tokens, max_new_tokens=64)",
    config=NeoX,
    read=read,
    write=write,
    table=table,
    ignored=(  # constants of old files
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
    tied=(("embed_out.weight", "gpt_neox.embed_in.weight"),),
    renamed=(
        (r"^lm_head\.", "embed_out."),
    ),  # transformers 5 calls it so in memory, and embed_out in files
    free=("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
