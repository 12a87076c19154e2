"""`SamVisionModel` and the image encoder of `SamModel` of transformers: Segment Anything
(arXiv:2304.02643).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxdistill.core.types import lookup
from jaxdistill.interop.tables import (
    CONV,
    POINT,
    Family,
    Row,
    fixed,
    linear,
    norm,
    patches,
    setting,
    sizes,
)
from jaxdistill.models.layers import ACTIVATIONS
from jaxdistill.models.vision.sam import SamVision

SIZES = {
    "size": "image_size",
    "patch": "patch_size",
    "channels": "num_channels",
    "dim": "hidden_size",
    "mlp": "mlp_dim",
    "heads": "num_attention_heads",
    "depth": "num_hidden_layers",
    "window": "window_size",
    "global_layers": "global_attn_indexes",
    "neck": "output_channels",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
ALWAYS = {"use_abs_pos": True, "use_rel_pos": True, "qkv_bias": True}


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


def read(config: dict[str, Any], folder: Path) -> SamVision:
    where = folder / "config.json"
    fixed(config, ALWAYS, where)
    usual = round(setting(config, "hidden_size", where) * config.get("mlp_ratio", 4.0))
    found = sizes(config | {"mlp_dim": config.get("mlp_dim") or usual}, SIZES, where)
    lookup(ACTIVATIONS, found["activation"], f"{where}: hidden_act")
    return SamVision(**{**found, "global_layers": tuple(found["global_layers"])})


def read_whole(config: dict[str, Any], folder: Path) -> SamVision:
    return read(setting(config, "vision_config", folder / "config.json"), folder)


def write(cfg: SamVision) -> dict[str, dict[str, Any]]:
    found = {theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()} | {
        "global_attn_indexes": list(cfg.global_layers)
    }
    return {
        "config.json": {
            "architectures": ["SamVisionModel"],
            "model_type": "sam_vision_model",
            **found,
            **ALWAYS,
        }
    }


FAMILY = Family(
    name="SamVisionModel",
    library="transformers",
    config=SamVision,
    read=read,
    write=write,
    table=table,
)
WHOLE = dataclasses.replace(
    FAMILY,
    name="SamModel",
    read=read_whole,
    ignored=(r"(shared_image_embedding|prompt_encoder|mask_decoder)\..*",),
    part="its image encoder",
)
