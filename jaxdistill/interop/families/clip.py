"""CLIP's towers (arXiv:2103.00020): `CLIPTextModel`, `CLIPVisionModel`, both `WithProjection`, and
those in a `CLIPModel`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxdistill.interop.keys import activation, same, setting
from jaxdistill.interop.tables import LINEAR, Family, Row, linear, norm, patches
from jaxdistill.models.vision.clip import (
    ClipText,
    ClipTextProjected,
    ClipVision,
    ClipVisionProjected,
)

# Defaults are those of transformers, which old files leave out
SHARED = (
    same("dim", "hidden_size"),
    same("mlp", "intermediate_size"),
    same("heads", "num_attention_heads"),
    same("depth", "num_hidden_layers"),
    activation("hidden_act"),
    same("norm_eps", "layer_norm_eps", missing=1e-5),
    same("projection", "projection_dim", missing=512),
)
TEXT = (
    *SHARED,
    same("vocab", "vocab_size"),
    same("max_length", "max_position_embeddings"),
    same("eos", "eos_token_id"),
)
VISION = (
    *SHARED,
    same("size", "image_size"),
    same("patch", "patch_size"),
    same("channels", "num_channels", missing=3),
)


def text_table(cfg: ClipText) -> tuple[Row, ...]:
    rows = (
        Row("embed/embedding", "text_model.embeddings.token_embedding.weight"),
        Row(
            "embed_position/embedding",
            "text_model.embeddings.position_embedding.weight",
        ),
        *_blocks("text_model"),
        *norm("norm", "text_model.final_layer_norm"),
    )
    return (*rows, *_projection(cfg, ClipTextProjected, "text_projection"))


def vision_table(cfg: ClipVision) -> tuple[Row, ...]:
    rows = (
        Row("token", "vision_model.embeddings.class_embedding"),
        *linear(
            "patch_embed",
            "vision_model.embeddings.patch_embedding",
            patches(cfg.patch),
            bias=False,
        ),
        Row("positions", "vision_model.embeddings.position_embedding.weight"),
        *norm(
            "norm_in", "vision_model.pre_layrnorm"
        ),  # the spelling of transformers
        *_blocks("vision_model"),
        *norm("norm_out", "vision_model.post_layernorm"),
    )
    return (*rows, *_projection(cfg, ClipVisionProjected, "visual_projection"))


def _blocks(base: str) -> tuple[Row, ...]:
    layer = base + ".encoder.layers.{i}."
    return (
        *norm("blocks/norm_attention", layer + "layer_norm1"),
        *linear("blocks/to_q", layer + "self_attn.q_proj"),
        *linear("blocks/to_k", layer + "self_attn.k_proj"),
        *linear("blocks/to_v", layer + "self_attn.v_proj"),
        *linear("blocks/to_out", layer + "self_attn.out_proj"),
        *norm("blocks/norm_mlp", layer + "layer_norm2"),
        *linear("blocks/up", layer + "mlp.fc1"),
        *linear("blocks/down", layer + "mlp.fc2"),
    )


def _projection(cfg: Any, projected: type, name: str) -> tuple[Row, ...]:
    if not isinstance(cfg, projected):
        return ()
    return (Row("project/kernel", name + ".weight", LINEAR),)


def _family(name: str, config: type, side: str) -> Family:
    if side == "text":
        keys = TEXT
        table = text_table
        projection = "text_projection"
    else:
        keys = VISION
        table = vision_table
        projection = "visual_projection"
    return Family(
        name=name,
        library="transformers",
        config=config,
        model_type=f"clip_{side}_model",
        keys=keys,
        table=table,
        ignored=(r".*embeddings\.position_ids",),  # a constant that old files store
        # transformers 5 saves a tower without its prefix
        renamed=((rf"^(?!{side}_model\.|{projection}\.)", f"{side}_model."),),
    )


TEXT_TOWER = _family("CLIPTextModel", ClipText, "text")
TEXT_PROJECTED = _family("CLIPTextModelWithProjection", ClipTextProjected, "text")
VISION_TOWER = _family("CLIPVisionModel", ClipVision, "vision")
VISION_PROJECTED = _family(
    "CLIPVisionModelWithProjection", ClipVisionProjected, "vision"
)


def _joint(tower: Family, side: str, other: str) -> Family:
    """A tower with its projection inside a `CLIPModel`; `other` matches the names of the rest."""

    def prepare(values: dict[str, Any], file: Path) -> dict[str, Any]:
        shared = setting(values, "projection_dim", file)
        return setting(values, f"{side}_config", file) | {"projection_dim": shared}

    return dataclasses.replace(
        tower,
        name="CLIPModel",
        prepare=prepare,
        ignored=(other, "logit_scale", *tower.ignored),
        renamed=(),
        part=f"its {side} tower",
    )


JOINT_VISION = _joint(VISION_PROJECTED, "vision", r"text_(model|projection)\..*")
JOINT_TEXT = _joint(TEXT_PROJECTED, "text", r"(vision_model|visual_projection)\..*")
