"""`Gemma2ForCausalLM` of transformers, and `Gemma2Model`, the same without a head: SANA's text
encoder.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxdistill.core.types import Refused
from jaxdistill.interop.families import llama
from jaxdistill.interop.keys import (
    Config,
    Field,
    Fixed,
    Read,
    Written,
    activation,
    optional,
    same,
)
from jaxdistill.interop.tables import Family, Row
from jaxdistill.models.language.gemma import Gemma2, Gemma2Text


def _check_layers(config: Config) -> None:
    """Raises Refused on layers other than those of full attention and of a sliding window."""
    depth = config.get("num_hidden_layers", 0)
    kinds = config.get("layer_types") or []
    known = set(kinds) <= {"sliding_attention", "full_attention"}
    if not known or len(kinds) not in (0, depth):
        raise Refused(
            f"{config.file}: layer_types={kinds}, expected {depth} of sliding_attention and "
            "full_attention"
        )


def _longest(config: Config) -> int:
    """Tokens of the longest text for which the window is the complete context."""
    window = config["sliding_window"]
    return min(window, config.get("max_position_embeddings", window))


KEYS = (
    Read("", _check_layers),
    *llama.SIZES,
    Field(
        field="kv_heads",
        key="num_key_value_heads",
        write=lambda ours: ours.kv_heads or ours.heads,
    ),
    Field(
        field="head_dim",
        key="head_dim",
        write=lambda ours: ours.head_size,
        missing=256,
    ),
    same("norm_eps", "rms_norm_eps", missing=1e-6),
    same("window", "sliding_window"),
    same("query_scale", "query_pre_attn_scalar"),
    activation("hidden_activation"),
    Read("max_length", _longest),
    Written("max_position_embeddings", lambda ours: ours.max_length),
    Written("rope_theta", lambda ours: ours.rope_theta),
    optional("cap", "attn_logit_softcapping", none=0.0),
    optional("logit_cap", "final_logit_softcapping", none=0.0),
    Fixed("attention_bias", False),
    Fixed("use_bidirectional_attention", None),
    Fixed("tie_word_embeddings", True),
)
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)
NORMS = {  # ours -> theirs
    "norm_attention": "input_layernorm",
    "norm_attention_out": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_mlp_out": "post_feedforward_layernorm",
}


def table(cfg: Gemma2, base: str = "model.") -> tuple[Row, ...]:
    """Llama's rows with four norms in each layer; `base` stands before PyTorch's names."""
    rows = [
        row for row in llama.table(cfg) if not row.path.startswith("blocks/norm_")
    ]
    for ours, theirs in NORMS.items():
        rows.append(
            Row(f"blocks/{ours}/scale", f"model.layers.{{i}}.{theirs}.weight")
        )
    renamed = [
        dataclasses.replace(r, name=base + r.name.removeprefix("model."))
        for r in rows
    ]
    return tuple(renamed)


def _family(
    name: str, config: type[Gemma2], base: str, call: str, **more: Any
) -> Family:
    return Family(
        name=name,
        library="transformers",
        config=config,
        model_type="gemma2",
        keys=KEYS,
        more_fields=llama.rope_and_tokens,
        more_files=functools.partial(llama.tokens_of_both_files, name=name),
        table=functools.partial(table, base=base),
        free=llama.FREE,
        call=call,
        **more,
    )


FAMILY = _family(
    "Gemma2ForCausalLM",
    Gemma2,
    "model.",
    "model.generate(tokens, max_new_tokens=64)",
    tied=TIED,
)
TEXT = _family(
    "Gemma2Model",
    Gemma2Text,
    "",
    "model(tokens, attention_mask=mask)[0]",
    renamed=((r"^model\.", ""),),
)
