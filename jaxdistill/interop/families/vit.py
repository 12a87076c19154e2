"""`ViTModel` and `ViTForImageClassification` of transformers: ViT (arXiv:2010.11929)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jaxdistill.core.types import lookup
from jaxdistill.interop.settings import PATCH, SIDE, either, several
from jaxdistill.interop.tables import Family, Row, fixed, linear, norm, patches, sizes
from jaxdistill.models.layers import ACTIVATIONS
from jaxdistill.models.vision.vit import ViT, ViTClassifier

SIZES = {
    "size": "image_size",
    "patch": "patch_size",
    "channels": "num_channels",
    "dim": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "depth": "num_hidden_layers",
    "bias": "qkv_bias",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}


def table(cfg: ViT) -> tuple[Row, ...]:
    base = "" if type(cfg) is ViT else "vit."
    embed = base + "embeddings."
    layer = base + "encoder.layer.{i}."
    rows = (
        Row("token", embed + "cls_token"),
        Row("positions", embed + "position_embeddings"),
        *linear("patch_embed", embed + "patch_embeddings.projection", patches(cfg.patch)),
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
    return (
        *rows,
        *(
            linear("classifier", "classifier")
            if isinstance(cfg, ViTClassifier)
            else linear("pooler", "pooler.dense")
        ),
    )


def read(config: dict[str, Any], folder: Path, *, make: type[ViT]) -> ViT:
    where = folder / "config.json"
    found = sizes({"qkv_bias": True} | config, SIZES, where)
    for key in ("size", "patch"):  # a number, or the same twice
        first = found[key][0] if isinstance(found[key], list) else found[key]
        fixed(config, {SIZES[key]: [first] * 2 if isinstance(found[key], list) else first}, where)
        found[key] = first
    if make is ViTClassifier:
        found["classes"] = len(config.get("id2label", range(2)))
    else:
        fixed(config, {"pooler_act": "tanh"}, where)
        fixed(
            config, {"pooler_output_size": config.get("pooler_output_size") and found["dim"]}, where
        )
    lookup(ACTIVATIONS, found["activation"], f"{where}: hidden_act")
    return make(**found)


def write(cfg: ViT, *, name: str) -> dict[str, dict[str, Any]]:
    """config.json; classes are called LABEL_0, LABEL_1, ..., since ours have no names."""
    config = {
        "architectures": [name],
        "model_type": "vit",
        **{theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()},
    }
    if isinstance(cfg, ViTClassifier):
        labels = [f"LABEL_{i}" for i in range(cfg.classes)]
        config |= {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    return {"config.json": config}


def _family(name: str, make: type[ViT]) -> Family:
    return Family(
        name=name,
        library="transformers",
        config=make,
        kinds={
            key: either(kind, several(kind, 2, 2))
            for key, kind in (("image_size", SIDE), ("patch_size", PATCH))
        },
        read=functools.partial(read, make=make),
        write=functools.partial(write, name=name),
        table=table,
    )


FAMILY = _family("ViTModel", ViT)
CLASSIFIER = _family("ViTForImageClassification", ViTClassifier)
