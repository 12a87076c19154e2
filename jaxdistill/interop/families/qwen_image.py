"""`QwenImageTransformer2DModel` of diffusers: Qwen-Image and Qwen-Image-Edit (arXiv:2508.02324)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused
from jaxdistill.interop.tables import Family, Row, fixed, linear, setting
from jaxdistill.models.denoisers.qwen_image import QwenImage

FIXED = {"guidance_embeds": False, "use_additional_t_cond": False, "use_layer3d_rope": False}
# ours -> (prefix of modulation and MLP, then q, k, v, out, norms of q and k inside `attn`)
STREAMS = {
    "image": ("img", "to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"),
    "text": (
        "txt",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "norm_added_q",
        "norm_added_k",
    ),
}


def table(cfg: QwenImage) -> tuple[Row, ...]:
    def stream(ours: str, prefix: str, *names: str) -> tuple[Row, ...]:
        path = f"blocks/{ours}"
        block = "transformer_blocks.{i}."
        maps = zip(("to_q", "to_k", "to_v", "to_out"), names)
        norms = zip(("norm_q", "norm_k"), names[4:])
        return (
            *linear(f"{path}/modulation", f"{block}{prefix}_mod.1"),
            *(row for our, name in maps for row in linear(f"{path}/{our}", f"{block}attn.{name}")),
            *(Row(f"{path}/{our}/scale", f"{block}attn.{name}.weight") for our, name in norms),
            *linear(f"{path}/up", f"{block}{prefix}_mlp.net.0.proj"),
            *linear(f"{path}/down", f"{block}{prefix}_mlp.net.2"),
        )

    return (
        *linear("patch_embed", "img_in"),
        *linear("time_embed/linear_1", "time_text_embed.timestep_embedder.linear_1"),
        *linear("time_embed/linear_2", "time_text_embed.timestep_embedder.linear_2"),
        Row("text_norm/scale", "txt_norm.weight"),
        *linear("text_embed", "txt_in"),
        *(row for ours, names in STREAMS.items() for row in stream(ours, *names)),
        *linear("modulation_out", "norm_out.linear"),
        *linear("proj_out", "proj_out"),
    )


def read(config: dict[str, Any], folder: Path) -> QwenImage:
    where = folder / "config.json"
    fixed(config, FIXED, where)
    get = lambda key: setting(config, key, where)
    patch = get("patch_size")
    channels = get("out_channels")
    axes = tuple(get("axes_dims_rope"))
    if not channels or patch**2 * channels != get("in_channels"):
        raise Refused(
            f"{where}: in_channels={get('in_channels')} is not supported, expected patch_size^2 out_channels"
        )
    if sum(axes) != get("attention_head_dim"):
        raise Refused(
            f"{where}: attention_head_dim={get('attention_head_dim')} is not supported, expected {sum(axes)}, the sum of {axes}"
        )
    return QwenImage(
        patch=patch,
        channels=channels,
        heads=get("num_attention_heads"),
        axes=axes,
        depth=get("num_layers"),
        text_dim=get("joint_attention_dim"),
        clean_pictures=config.get("zero_cond_t", False),
    )


def write(cfg: QwenImage) -> dict[str, dict[str, Any]]:
    config = {
        "_class_name": FAMILY.name,
        "patch_size": cfg.patch,
        "in_channels": cfg.patch**2 * cfg.channels,
        "out_channels": cfg.channels,
        "num_layers": cfg.depth,
        "attention_head_dim": sum(cfg.axes),
        "num_attention_heads": cfg.heads,
        "joint_attention_dim": cfg.text_dim,
        "axes_dims_rope": list(cfg.axes),
        "zero_cond_t": cfg.clean_pictures,
        **FIXED,
    }
    return {"config.json": config}


FAMILY = Family(
    name="QwenImageTransformer2DModel",
    library="diffusers",
    config=QwenImage,
    read=read,
    write=write,
    table=table,
    free=("zero_cond_t",),
)
