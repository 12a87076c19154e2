"""CLIP's towers (arXiv:2103.00020): `CLIPTextModel`, `CLIPVisionModel`, both `WithProjection`, and
those in a `CLIPModel`.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from jaxdistill.core.types import lookup
from jaxdistill.interop.tables import LINEAR, Family, Row, linear, norm, patches, setting, sizes
from jaxdistill.models.layers import ACTIVATIONS
from jaxdistill.models.vision.clip import (
    ClipText,
    ClipTextProjected,
    ClipVision,
    ClipVisionProjected,
)

SIZES = {
    "dim": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "depth": "num_hidden_layers",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "projection": "projection_dim",
}
TEXT = SIZES | {
    "vocab": "vocab_size",
    "max_length": "max_position_embeddings",
    "eos": "eos_token_id",
}
VISION = SIZES | {"size": "image_size", "patch": "patch_size", "channels": "num_channels"}
DEFAULTS = {
    "projection_dim": 512,
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
}  # transformers', which old files leave out


def text_table(cfg: ClipText) -> tuple[Row, ...]:
    rows = (
        Row("embed/embedding", "text_model.embeddings.token_embedding.weight"),
        Row("embed_position/embedding", "text_model.embeddings.position_embedding.weight"),
        *_blocks("text_model"),
        *norm("norm", "text_model.final_layer_norm"),
    )
    return (*rows, *_projection(cfg, ClipTextProjected, "text_projection"))


def vision_table(cfg: ClipVision) -> tuple[Row, ...]:
    rows = (
        Row("token", "vision_model.embeddings.class_embedding"),
        *linear(
            "patch_embed", "vision_model.embeddings.patch_embedding", patches(cfg.patch), bias=False
        ),
        Row("positions", "vision_model.embeddings.position_embedding.weight"),
        *norm("norm_in", "vision_model.pre_layrnorm"),  # spelt so
        *_blocks("vision_model"),
        *norm("norm_out", "vision_model.post_layernorm"),
    )
    return (*rows, *_projection(cfg, ClipVisionProjected, "visual_projection"))


def _blocks(base: str) -> tuple[Row, ...]:
    layer = base + ".encoder.layers.{i}."
    return (
        *norm("blocks/norm_attention", layer + "layer_norm1"),
        *(
            row
            for part in "qkv"
            for row in linear(f"blocks/to_{part}", f"{layer}self_attn.{part}_proj")
        ),
        *linear("blocks/to_out", layer + "self_attn.out_proj"),
        *norm("blocks/norm_mlp", layer + "layer_norm2"),
        *linear("blocks/up", layer + "mlp.fc1"),
        *linear("blocks/down", layer + "mlp.fc2"),
    )


def _projection(cfg: Any, projected: type, name: str) -> tuple[Row, ...]:
    return (Row("project/kernel", name + ".weight", LINEAR),) if isinstance(cfg, projected) else ()


def read(config: dict[str, Any], folder: Path, *, make: type, names: dict[str, str]) -> Any:
    where = folder / "config.json"
    found = sizes(DEFAULTS | config, names, where)
    lookup(ACTIVATIONS, setting(config, "hidden_act", where), f"{where}: hidden_act")
    return make(**found)


def write(cfg: Any, *, name: str, kind: str, names: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {
        "config.json": {
            "architectures": [name],
            "model_type": kind,
            **{theirs: getattr(cfg, ours) for ours, theirs in names.items()},
        }
    }


def _family(name: str, make: type, side: str) -> Family:
    names, table, own = {
        "text": (TEXT, text_table, "text_projection"),
        "vision": (VISION, vision_table, "visual_projection"),
    }[side]
    return Family(
        name=name,
        library="transformers",
        config=make,
        read=functools.partial(read, make=make, names=names),
        write=functools.partial(write, name=name, kind=f"clip_{side}_model", names=names),
        table=table,
        ignored=(r".*embeddings\.position_ids",),  # a constant that old files store
        renamed=(
            (rf"^(?!{side}_model\.|{own}\.)", f"{side}_model."),
        ),  # transformers 5 saves a tower without its prefix
    )


TEXT_TOWER = _family("CLIPTextModel", ClipText, "text")
TEXT_PROJECTED = _family("CLIPTextModelWithProjection", ClipTextProjected, "text")
VISION_TOWER = _family("CLIPVisionModel", ClipVision, "vision")
VISION_PROJECTED = _family("CLIPVisionModelWithProjection", ClipVisionProjected, "vision")


def _joint(tower: Family, side: str, ignored: str) -> Family:
    """A tower with its projection out of a `CLIPModel`, whose other half is left where it is."""

    def read(config: dict[str, Any], folder: Path) -> Any:
        where = folder / "config.json"
        shared = {"projection_dim": setting(config, "projection_dim", where)}
        return tower.read(setting(config, f"{side}_config", where) | shared, folder)

    return dataclasses.replace(
        tower,
        name="CLIPModel",
        read=read,
        ignored=(ignored, "logit_scale", *tower.ignored),
        renamed=(),
        part=f"its {side} tower",
    )


JOINT_VISION = _joint(VISION_PROJECTED, "vision", r"text_(model|projection)\..*")
JOINT_TEXT = _joint(TEXT_PROJECTED, "text", r"(vision_model|visual_projection)\..*")
