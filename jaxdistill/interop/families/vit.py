"""`ViTModel` and `ViTForImageClassification` of transformers: ViT (arXiv:2010.11929)."""

from __future__ import annotations

from jaxdistill.interop.keys import (
    Config,
    Field,
    Fixed,
    Key,
    Read,
    activation,
    check_value,
    labels,
    same,
)
from jaxdistill.interop.settings import PATCH, SIDE, either, several
from jaxdistill.interop.tables import Family, Row, linear, norm, patches
from jaxdistill.models.vision.vit import ViT, ViTClassifier


def _square(field: str, key: str) -> Field:
    """A number, or a list of the same number twice. Raises Refused on two numbers."""

    def read(value: int | list[int], config: Config) -> int:
        if not isinstance(value, list):
            return value
        check_value(config.values, key, [value[0]] * 2, config.file)
        return value[0]

    return Field(field=field, key=key, read=read)


def _check_pooler(config: Config) -> None:
    """Raises Refused where the summary has another width than the features."""
    if config.get("pooler_output_size"):
        check_value(
            config.values, "pooler_output_size", config["hidden_size"], config.file
        )


KEYS = (
    _square("size", "image_size"),
    _square("patch", "patch_size"),
    same("channels", "num_channels"),
    same("dim", "hidden_size"),
    same("mlp", "intermediate_size"),
    same("heads", "num_attention_heads"),
    same("depth", "num_hidden_layers"),
    same("bias", "qkv_bias", missing=True),
    activation("hidden_act"),
    same("norm_eps", "layer_norm_eps"),
)
ENCODER_KEYS = (
    *KEYS,
    Fixed("pooler_act", "tanh", is_written=False),
    Read("", _check_pooler),
)
SQUARES = {
    "image_size": either(SIDE, several(SIDE, 2, 2)),
    "patch_size": either(PATCH, several(PATCH, 2, 2)),
}


def table(cfg: ViT) -> tuple[Row, ...]:
    base = "" if type(cfg) is ViT else "vit."
    embed = base + "embeddings."
    layer = base + "encoder.layer.{i}."
    rows = (
        Row("token", embed + "cls_token"),
        Row("positions", embed + "position_embeddings"),
        *linear(
            "patch_embed", embed + "patch_embeddings.projection", patches(cfg.patch)
        ),
        *norm("blocks/norm_attention", layer + "layernorm_before"),
        *linear("blocks/to_q", layer + "attention.attention.query", bias=cfg.bias),
        *linear("blocks/to_k", layer + "attention.attention.key", bias=cfg.bias),
        *linear("blocks/to_v", layer + "attention.attention.value", bias=cfg.bias),
        *linear("blocks/to_out", layer + "attention.output.dense"),
        *norm("blocks/norm_mlp", layer + "layernorm_after"),
        *linear("blocks/up", layer + "intermediate.dense"),
        *linear("blocks/down", layer + "output.dense"),
        *norm("norm", base + "layernorm"),
    )
    if isinstance(cfg, ViTClassifier):
        return (*rows, *linear("classifier", "classifier"))
    return (*rows, *linear("pooler", "pooler.dense"))


def _family(name: str, config: type[ViT], keys: tuple[Key, ...]) -> Family:
    return Family(
        name=name,
        library="transformers",
        config=config,
        model_type="vit",
        keys=keys,
        kinds=SQUARES,
        table=table,
    )


FAMILY = _family("ViTModel", ViT, ENCODER_KEYS)
CLASSIFIER = _family("ViTForImageClassification", ViTClassifier, (*KEYS, *labels()))
