"""`BertModel`, `BertForMaskedLM` and `BertForSequenceClassification` of transformers."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from jaxdistill.core.types import lookup
from jaxdistill.interop.tables import Family, Row, fixed, linear, norm, sizes
from jaxdistill.models.language.bert import Bert, BertClassifier, MaskedBert
from jaxdistill.models.layers import ACTIVATIONS

SIZES = {
    "vocab": "vocab_size",
    "dim": "hidden_size",
    "mlp": "intermediate_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "types": "type_vocab_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
FIXED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}

TIED = (
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
)


def table(cfg: Bert) -> tuple[Row, ...]:
    base = "" if type(cfg) is Bert else "bert."
    embed = base + "embeddings."
    layer = base + "encoder.layer.{i}."
    rows = (
        Row("embed/embedding", embed + "word_embeddings.weight"),
        Row("embed_position/embedding", embed + "position_embeddings.weight"),
        Row("embed_type/embedding", embed + "token_type_embeddings.weight"),
        *norm("norm", embed + "LayerNorm"),
        *linear("blocks/to_q", layer + "attention.self.query"),
        *linear("blocks/to_k", layer + "attention.self.key"),
        *linear("blocks/to_v", layer + "attention.self.value"),
        *linear("blocks/to_out", layer + "attention.output.dense"),
        *norm("blocks/norm_attention", layer + "attention.output.LayerNorm"),
        *linear("blocks/up", layer + "intermediate.dense"),
        *linear("blocks/down", layer + "output.dense"),
        *norm("blocks/norm_mlp", layer + "output.LayerNorm"),
    )
    if isinstance(cfg, MaskedBert):
        head = "cls.predictions."
        return (
            *rows,
            *linear("transform", head + "transform.dense"),
            *norm("norm_out", head + "transform.LayerNorm"),
            Row("bias", head + "bias"),
        )
    rows += linear("pooler", base + "pooler.dense")
    return (*rows, *linear("classifier", "classifier")) if isinstance(cfg, BertClassifier) else rows


def read(config: dict[str, Any], folder: Path, *, make: type[Bert]) -> Bert:
    where = folder / "config.json"
    fixed(config, FIXED, where)
    found = sizes(config, SIZES, where)
    lookup(ACTIVATIONS, found["activation"], f"{where}: hidden_act")
    if make is BertClassifier:
        found["classes"] = len(config.get("id2label", range(2)))
    pad = config.get("pad_token_id", 0)
    return make(**found, pad=-1 if pad is None else pad)


def write(cfg: Bert, *, name: str) -> dict[str, dict[str, Any]]:
    """config.json; classes are called LABEL_0, LABEL_1, ..., since ours have no names."""
    config = {
        "architectures": [name],
        "model_type": "bert",
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
        **FIXED,
        "pad_token_id": None if cfg.pad < 0 else cfg.pad,
    }
    if isinstance(cfg, BertClassifier):
        labels = [f"LABEL_{i}" for i in range(cfg.classes)]
        config |= {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    return {"config.json": config}


def _family(name: str, make: type[Bert], *ignored: str) -> Family:
    return Family(
        name=name,
        library="transformers",
        call="model(tokens, attention_mask=mask)[0]",
        config=make,
        read=functools.partial(read, make=make),
        write=functools.partial(write, name=name),
        table=table,
        ignored=(r"(bert\.)?embeddings\.position_ids", *ignored),  # a constant of old files
        renamed=(
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
        free=("pad_token_id",),
    )


FAMILY = _family("BertModel", Bert)
MASKED = dataclasses.replace(  # the released files hold both heads of pretraining
    _family("BertForMaskedLM", MaskedBert, r"bert\.pooler\..*", r"cls\.seq_relationship\..*"),
    tied=TIED,
)
CLASSIFIER = _family("BertForSequenceClassification", BertClassifier)
