"""`Gemma2ForCausalLM` of transformers, and `Gemma2Model`, the same without a head: SANA's text
encoder.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused, lookup
from jaxdistill.interop.families import llama
from jaxdistill.interop.tables import Family, Row, fixed, sizes
from jaxdistill.models.language.gemma import Gemma2, Gemma2Text
from jaxdistill.models.layers import ACTIVATIONS

SIZES = llama.SIZES | {
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "window": "sliding_window",
    "query_scale": "query_pre_attn_scalar",
    "activation": "hidden_activation",
}
FIXED = {"attention_bias": False, "use_bidirectional_attention": None, "tie_word_embeddings": True}
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)
NORMS = {  # ours -> theirs
    "norm_attention": "input_layernorm",
    "norm_attention_out": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_mlp_out": "post_feedforward_layernorm",
}


def table(cfg: Gemma2, base: str = "model.") -> tuple[Row, ...]:
    shared = (row for row in llama.table(cfg) if not row.path.startswith("blocks/norm_"))
    norms = (
        Row(f"blocks/{ours}/scale", f"model.layers.{{i}}.{theirs}.weight")
        for ours, theirs in NORMS.items()
    )
    return tuple(
        Row(row.path, base + row.name.removeprefix("model."), row.layout)
        for row in (*shared, *norms)
    )


def read(config: dict[str, Any], folder: Path, *, make: type[Gemma2]) -> Gemma2:
    where = folder / "config.json"
    fixed(config, FIXED, where)
    depth = config.get("num_hidden_layers", 0)
    found = sizes({"head_dim": 256, "rms_norm_eps": 1e-6} | config, SIZES, where)
    kinds = config.get("layer_types") or []
    if not set(kinds) <= {"sliding_attention", "full_attention"} or len(kinds) not in (0, depth):
        raise Refused(
            f"{where}: layer_types={kinds}, expected {depth} of sliding_attention and full_attention"
        )
    lookup(ACTIVATIONS, found["activation"], f"{where}: hidden_activation")
    longest = min(found["window"], config.get("max_position_embeddings", found["window"]))
    return make(
        **found,
        **llama.read_rope(config, where),
        **llama.read_ids(config, folder),
        max_length=longest,
        cap=config.get("attn_logit_softcapping") or 0.0,
        logit_cap=config.get("final_logit_softcapping") or 0.0,
    )


def write(cfg: Gemma2, *, name: str) -> dict[str, dict[str, Any]]:
    if cfg.rope_factor != 1.0:
        raise Refused(f"{name}: rope_factor={cfg.rope_factor} cannot be written, expected 1.0")
    config = {
        "architectures": [name],
        "model_type": "gemma2",
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": cfg.kv_heads or cfg.heads,
        "head_dim": cfg.head_size,
        "max_position_embeddings": cfg.max_length,
        "rope_theta": cfg.rope_theta,
        "attn_logit_softcapping": cfg.cap or None,
        "final_logit_softcapping": cfg.logit_cap or None,
        **FIXED,
        **llama.write_ids(cfg),
    }
    return {"config.json": config, "generation_config.json": llama.write_ids(cfg)}


def _family(name: str, make: type[Gemma2], base: str, call: str, **more) -> Family:
    return Family(
        name=name,
        library="transformers",
        call=call,
        config=make,
        read=functools.partial(read, make=make),
        write=functools.partial(write, name=name),
        table=functools.partial(table, base=base),
        free=("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
        **more,
    )


FAMILY = _family(
    "Gemma2ForCausalLM", Gemma2, "model.", "model.generate(tokens, max_new_tokens=64)", tied=TIED
)
TEXT = _family(
    "Gemma2Model",
    Gemma2Text,
    "",
    "model(tokens, attention_mask=mask)[0]",
    renamed=((r"^model\.", ""),),
)
