"""`SamVisionModel` and the image encoder of `SamModel` of transformers: Segment Anything
(arXiv:2304.02643).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxdistill.interop.keys import Fixed, activation, listed, same, setting
from jaxdistill.interop.tables import (
    CONV,
    POINT,
    Family,
    Row,
    linear,
    norm,
    patches,
)
from jaxdistill.models.vision.sam import SamVision

KEYS = (
    same("size", "image_size"),
    same("patch", "patch_size"),
    same("channels", "num_channels"),
    same("dim", "hidden_size"),
    same("mlp", "mlp_dim"),
    same("heads", "num_attention_heads"),
    same("depth", "num_hidden_layers"),
    same("window", "window_size"),
    listed("global_layers", "global_attn_indexes"),
    same("neck", "output_channels"),
    activation("hidden_act"),
    same("norm_eps", "layer_norm_eps"),
    Fixed("use_abs_pos", True),
    Fixed("use_rel_pos", True),
    Fixed("qkv_bias", True),
)


def table(cfg: SamVision) -> tuple[Row, ...]:
    base = "vision_encoder."
    rows = [
        *linear("patch_embed", base + "patch_embed.projection", patches(cfg.patch)),
        Row("positions", base + "pos_embed"),
        *linear("neck_1", base + "neck.conv1", POINT, bias=False),
        *norm("norm_1", base + "neck.layer_norm1"),
        *linear("neck_2", base + "neck.conv2", CONV, bias=False),
        *norm("norm_2", base + "neck.layer_norm2"),
    ]
    for i in range(cfg.depth):
        ours = f"layers/{i}"
        theirs = f"{base}layers.{i}"
        rows += [
            *norm(f"{ours}/norm_attention", f"{theirs}.layer_norm1"),
            *linear(f"{ours}/to_qkv", f"{theirs}.attn.qkv"),
            *linear(f"{ours}/to_out", f"{theirs}.attn.proj"),
            Row(f"{ours}/rows", f"{theirs}.attn.rel_pos_h"),
            Row(f"{ours}/columns", f"{theirs}.attn.rel_pos_w"),
            *norm(f"{ours}/norm_mlp", f"{theirs}.layer_norm2"),
            *linear(f"{ours}/up", f"{theirs}.mlp.lin1"),
            *linear(f"{ours}/down", f"{theirs}.mlp.lin2"),
        ]
    return tuple(rows)


def _prepare(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """config.json with the width of the MLP, which some files state as a multiple of the width."""
    width = values.get("mlp_dim")
    if not width:
        width = round(
            setting(values, "hidden_size", file) * values.get("mlp_ratio", 4.0)
        )
    return values | {"mlp_dim": width}


def _image_encoder(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """config.json of the image encoder inside a `SamModel`."""
    return _prepare(setting(values, "vision_config", file), file)


FAMILY = Family(
    name="SamVisionModel",
    library="transformers",
    config=SamVision,
    model_type="sam_vision_model",
    keys=KEYS,
    prepare=_prepare,
    table=table,
)
WHOLE = dataclasses.replace(
    FAMILY,
    name="SamModel",
    prepare=_image_encoder,
    ignored=(r"(shared_image_embedding|prompt_encoder|mask_decoder)\..*",),
    part="its image encoder",
)
