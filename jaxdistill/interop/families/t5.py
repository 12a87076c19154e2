"""`T5ForConditionalGeneration`, `T5EncoderModel` and `UMT5EncoderModel` of transformers: T5, T5
1.1, Flan-T5 and UMT5.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jaxdistill.core.types import lookup
from jaxdistill.interop.tables import LINEAR, Family, Row, sizes
from jaxdistill.models.language.t5 import T5, T5Encoder, UMT5Encoder

SIZES = {
    "vocab": "vocab_size",
    "dim": "d_model",
    "mlp": "d_ff",
    "depth": "num_layers",
    "heads": "num_heads",
    "head_dim": "d_kv",
}
DEFAULTS = {
    "buckets": ("relative_attention_num_buckets", 32),
    "distance": ("relative_attention_max_distance", 128),
    "norm_eps": ("layer_norm_epsilon", 1e-6),
}
GATED = {"relu": False, "gated-gelu": True}  # feed_forward_proj
COPIES = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "lm_head.weight",
)  # of the embedding; the last if tied
TYPES = {T5: "t5", T5Encoder: "t5", UMT5Encoder: "umt5"}  # model_type


def table(cfg: T5Encoder) -> tuple[Row, ...]:
    rows = (Row("embed/embedding", "shared.weight"), *_side("encoder", cfg, 1))
    if not isinstance(cfg, T5):
        return rows
    rows += _side("decoder", cfg, 2) + _attention(
        "decoder/blocks/cross", "decoder.block.{i}.layer.1.", "EncDecAttention"
    )
    return rows if cfg.tied else (*rows, Row("unembed/kernel", "lm_head.weight", LINEAR))


def _side(side: str, cfg: T5Encoder, last: int) -> tuple[Row, ...]:
    """Rows of encoder or decoder, whose MLP is number `last` of a layer's parts."""
    layer = side + ".block.{i}."
    mlp = f"{side}.block.{{i}}.layer.{last}."
    table = "layer.0.SelfAttention.relative_attention_bias.weight"
    maps = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if cfg.gated else {"up": "wi", "down": "wo"}
    return (
        Row(f"{side}/position/embedding", f"{side}.block.0.{table}")
        if cfg.shared_bias
        else Row(f"{side}/blocks/position/embedding", layer + table),
        *_attention(f"{side}/blocks/attention", layer + "layer.0.", "SelfAttention"),
        Row(f"{side}/blocks/norm_mlp/scale", mlp + "layer_norm.weight"),
        *(
            Row(f"{side}/blocks/{ours}/kernel", f"{mlp}DenseReluDense.{theirs}.weight", LINEAR)
            for ours, theirs in maps.items()
        ),
        Row(f"{side}/norm/scale", f"{side}.final_layer_norm.weight"),
    )


def _attention(path: str, layer: str, name: str) -> tuple[Row, ...]:
    maps = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o"}
    rows = tuple(
        Row(f"{path}/{ours}/kernel", f"{layer}{name}.{theirs}.weight", LINEAR)
        for ours, theirs in maps.items()
    )
    return (Row(f"{path}/norm/scale", layer + "layer_norm.weight"), *rows)


def read(config: dict[str, Any], folder: Path, *, make: type[T5Encoder]) -> T5Encoder:
    """Sizes from config.json. That the head is tied is what `scale_decoder_outputs` says since
    transformers 5, which sets `tie_word_embeddings` to true in every file; before, the latter.
    """
    where = folder / "config.json"
    found = sizes(config, SIZES, where)
    found |= {ours: config.get(theirs, default) for ours, (theirs, default) in DEFAULTS.items()}
    kind = config.get("feed_forward_proj", "gated-gelu" if make is UMT5Encoder else "relu")
    found["gated"] = lookup(GATED, kind, f"{where}: feed_forward_proj")
    if make is T5:
        found["depth_decoder"] = config.get("num_decoder_layers") or 0
        found["tied"] = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        found["start"] = config.get("decoder_start_token_id") or 0
    eos = config.get("eos_token_id", 1)
    pad = config.get("pad_token_id", 0)
    return make(
        **found,
        eos=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad=-1 if pad is None else pad,
    )


def write(cfg: T5Encoder, *, name: str) -> dict[str, dict[str, Any]]:
    """config.json, and generation_config.json of what generates, in the keys that transformers 4
    and 5 both read.
    """
    ids = {
        "eos_token_id": list(cfg.eos) if len(cfg.eos) > 1 else cfg.eos[0] if cfg.eos else None,
        "pad_token_id": None if cfg.pad < 0 else cfg.pad,
    }
    config = {
        "architectures": [name],
        "model_type": TYPES[type(cfg)],
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
        **{theirs: getattr(cfg, ours) for ours, (theirs, _) in DEFAULTS.items()},
        "feed_forward_proj": next(key for key, gated in GATED.items() if gated == cfg.gated),
        "is_encoder_decoder": isinstance(cfg, T5),
        "use_cache": isinstance(cfg, T5),
        **ids,
    }
    if not isinstance(cfg, T5):
        return {"config.json": config}
    ids["decoder_start_token_id"] = cfg.start
    config |= {
        "num_decoder_layers": cfg.depth_decoder or cfg.depth,
        "tie_word_embeddings": cfg.tied,
        **ids,
    }
    return {"config.json": config, "generation_config.json": ids}


def _family(name: str, make: type[T5Encoder]) -> Family:
    return Family(
        name=name,
        library="transformers",
        call="model.generate(tokens, max_new_tokens=64)",
        config=make,
        read=functools.partial(read, make=make),
        write=functools.partial(write, name=name),
        table=table,
        ignored=(  # of the whole model; a table that the first T5 files hold and nothing reads
            *(() if make is T5 else (r"decoder\.embed_tokens\.weight", r"lm_head\.weight")),
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        ),
        tied=tuple((name, "shared.weight") for name in (COPIES if make is T5 else COPIES[:1])),
        free=("eos_token_id", "pad_token_id"),
    )


ENCODER = _family("T5EncoderModel", T5Encoder)
FAMILY = _family("T5ForConditionalGeneration", T5)
UMT5_ENCODER = _family("UMT5EncoderModel", UMT5Encoder)
