"""`BertModel`, `BertForMaskedLM` and `BertForSequenceClassification` of transformers."""

from __future__ import annotations

import dataclasses

from jaxdistill.interop.keys import Fixed, activation, labels, same, token
from jaxdistill.interop.tables import Family, Row, linear, norm
from jaxdistill.models.language.bert import Bert, BertClassifier, MaskedBert

KEYS = (
    same("vocab", "vocab_size"),
    same("dim", "hidden_size"),
    same("mlp", "intermediate_size"),
    same("depth", "num_hidden_layers"),
    same("heads", "num_attention_heads"),
    same("max_length", "max_position_embeddings"),
    same("types", "type_vocab_size"),
    activation("hidden_act"),
    same("norm_eps", "layer_norm_eps"),
    Fixed("position_embedding_type", "absolute"),
    Fixed("is_decoder", False),
    Fixed("add_cross_attention", False),
    Fixed("tie_word_embeddings", True),
    token("pad", "pad_token_id", missing=0),
)
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
    if isinstance(cfg, BertClassifier):
        rows += linear("classifier", "classifier")
    return rows


def _family(name: str, config: type[Bert], *ignored: str) -> Family:
    return Family(
        name=name,
        library="transformers",
        config=config,
        model_type="bert",
        keys=(*KEYS, *labels()) if config is BertClassifier else KEYS,
        table=table,
        ignored=(
            r"(bert\.)?embeddings\.position_ids",
            *ignored,
        ),  # a constant in old files
        renamed=(
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
        free=("pad_token_id",),
        call="model(tokens, attention_mask=mask)[0]",
    )


FAMILY = _family("BertModel", Bert)
# the released files hold both heads of pretraining
MASKED = dataclasses.replace(
    _family(
        "BertForMaskedLM",
        MaskedBert,
        r"bert\.pooler\..*",
        r"cls\.seq_relationship\..*",
    ),
    tied=TIED,
)
CLASSIFIER = _family("BertForSequenceClassification", BertClassifier)
