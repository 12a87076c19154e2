"""`T5ForConditionalGeneration`, `T5EncoderModel` and `UMT5EncoderModel` of transformers: T5, T5
1.1, Flan-T5 and UMT5.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxdistill.interop.keys import (
    Config,
    Field,
    Key,
    Read,
    Written,
    named,
    same,
    token,
    tokens,
    write_keys,
)
from jaxdistill.interop.tables import LINEAR, Family, Row
from jaxdistill.models.language.t5 import T5, T5Encoder, UMT5Encoder

TOKENS = (
    tokens("eos", "eos_token_id", missing=1),
    token("pad", "pad_token_id", missing=0),
)
GATED = {"relu": False, "gated-gelu": True}


def _keys(mlp: str) -> tuple[Key, ...]:
    """The keys of an encoder; `mlp` is its `feed_forward_proj` where the key is missing."""
    return (
        same("vocab", "vocab_size"),
        same("dim", "d_model"),
        same("mlp", "d_ff"),
        same("depth", "num_layers"),
        same("heads", "num_heads"),
        same("head_dim", "d_kv"),
        same("buckets", "relative_attention_num_buckets", missing=32),
        same("distance", "relative_attention_max_distance", missing=128),
        same("norm_eps", "layer_norm_epsilon", missing=1e-6),
        named("gated", "feed_forward_proj", GATED, missing=mlp),
        Written("is_encoder_decoder", lambda ours: isinstance(ours, T5)),
        Written("use_cache", lambda ours: isinstance(ours, T5)),
        *TOKENS,
    )


def _tied(config: Config) -> bool:
    """Whether the head is the embedding table.

    transformers 5 says so in `scale_decoder_outputs` and sets `tie_word_embeddings` to true in
    every file; transformers 4 says so in the latter.
    """
    return config.get(
        "scale_decoder_outputs", config.get("tie_word_embeddings", True)
    )


START = Field(field="start", key="decoder_start_token_id", missing=0, null=0)
T5_KEYS = (
    *_keys("relu"),
    Field(
        field="depth_decoder",
        key="num_decoder_layers",
        write=lambda ours: ours.depth_decoder or ours.depth,
        missing=0,
        null=0,
    ),
    Read("tied", _tied),
    Written("tie_word_embeddings", lambda ours: ours.tied),
    START,
)
# Names of the embedding besides its own; the last one where the head is tied
COPIES = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "lm_head.weight",
)


def table(cfg: T5Encoder) -> tuple[Row, ...]:
    rows = (Row("embed/embedding", "shared.weight"), *_side("encoder", cfg, 1))
    if not isinstance(cfg, T5):
        return rows
    cross = _attention(
        "decoder/blocks/cross", "decoder.block.{i}.layer.1.", "EncDecAttention"
    )
    rows += _side("decoder", cfg, 2) + cross
    return (
        rows
        if cfg.tied
        else (*rows, Row("unembed/kernel", "lm_head.weight", LINEAR))
    )


def _side(side: str, cfg: T5Encoder, last: int) -> tuple[Row, ...]:
    """Rows of encoder or decoder, whose MLP is number `last` of a layer's parts."""
    layer = side + ".block.{i}."
    mlp = f"{side}.block.{{i}}.layer.{last}."
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    if cfg.shared_bias:
        position = Row(f"{side}/position/embedding", f"{side}.block.0.{bias}")
    else:
        position = Row(f"{side}/blocks/position/embedding", layer + bias)
    if cfg.gated:
        maps = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    else:
        maps = {"up": "wi", "down": "wo"}
    kernels = [
        Row(
            f"{side}/blocks/{ours}/kernel",
            f"{mlp}DenseReluDense.{theirs}.weight",
            LINEAR,
        )
        for ours, theirs in maps.items()
    ]
    return (
        position,
        *_attention(
            f"{side}/blocks/attention", layer + "layer.0.", "SelfAttention"
        ),
        Row(f"{side}/blocks/norm_mlp/scale", mlp + "layer_norm.weight"),
        *kernels,
        Row(f"{side}/norm/scale", f"{side}.final_layer_norm.weight"),
    )


def _attention(path: str, layer: str, name: str) -> tuple[Row, ...]:
    maps = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o"}
    rows = tuple(
        Row(f"{path}/{ours}/kernel", f"{layer}{name}.{theirs}.weight", LINEAR)
        for ours, theirs in maps.items()
    )
    return (Row(f"{path}/norm/scale", layer + "layer_norm.weight"), *rows)


def _generation(ours: T5) -> dict[str, dict[str, Any]]:
    return {"generation_config.json": write_keys((*TOKENS, START), ours)}


# A table that the first T5 files hold and nothing reads
UNREAD = (
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
# in files of the full model
DECODER = (
    r"decoder\.embed_tokens\.weight",
    r"lm_head\.weight",
)
FAMILY = Family(
    name="T5ForConditionalGeneration",
    library="transformers",
    config=T5,
    model_type="t5",
    keys=T5_KEYS,
    more_files=_generation,
    table=table,
    ignored=(UNREAD,),
    tied=tuple((copy, "shared.weight") for copy in COPIES),
    free=("eos_token_id", "pad_token_id"),
    call="model.generate(tokens, max_new_tokens=64)",
)
ENCODER = dataclasses.replace(
    FAMILY,
    name="T5EncoderModel",
    config=T5Encoder,
    keys=_keys("relu"),
    more_files=lambda ours: {},
    ignored=(*DECODER, UNREAD),
    tied=((COPIES[0], "shared.weight"),),
)
UMT5_ENCODER = dataclasses.replace(
    ENCODER,
    name="UMT5EncoderModel",
    config=UMT5Encoder,
    model_type="umt5",
    keys=_keys("gated-gelu"),
)
