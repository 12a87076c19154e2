"""`GPTNeoXForCausalLM` of transformers: GPT-NeoX and Pythia."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jaxdistill.interop.families import llama
from jaxdistill.interop.keys import Fixed, Written, activation, same
from jaxdistill.interop.tables import LINEAR, Family, Row, linear, norm
from jaxdistill.models.language.neox import NeoX

KEYS = (
    *llama.SIZES,
    same("max_length", "max_position_embeddings"),
    same("norm_eps", "layer_norm_eps"),
    activation("hidden_act"),
    Written("rotary_emb_base", lambda ours: ours.rope_theta),
    same("rotary_share", "rotary_pct", missing=0.25),
    same("parallel", "use_parallel_residual", missing=True),
    same("tied", "tie_word_embeddings", missing=False),
    Written("use_cache", True),
    Fixed("attention_bias", True),
)


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
    return (
        rows
        if cfg.tied
        else (*rows, Row("unembed/kernel", "embed_out.weight", LINEAR))
    )


def _prepare(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """config.json with the rotary settings of transformers 5 under the keys of older files."""
    rope = values.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", values.get("rotary_pct", 0.25))
    base = values.get("rotary_emb_base", 10000.0)
    return {"rope_theta": base, **values, "rotary_pct": share}


FAMILY = Family(
    name="GPTNeoXForCausalLM",
    library="transformers",
    call="model.generate(tokens, max_new_tokens=64)",
    config=NeoX,
    model_type="gpt_neox",
    keys=KEYS,
    prepare=_prepare,
    more_fields=llama.rope_and_tokens,
    more_files=functools.partial(
        llama.tokens_of_both_files, name="GPTNeoXForCausalLM"
    ),
    table=table,
    ignored=(  # constants in old files
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
    tied=(("embed_out.weight", "gpt_neox.embed_in.weight"),),
    # transformers 5 calls the head so in memory, and embed_out in files
    renamed=((r"^lm_head\.", "embed_out."),),
    free=llama.FREE,
)
