"""`SanaTransformer2DModel` of diffusers: SANA, SANA 1.5 and SANA-Sprint (arXiv:2410.10629,
2501.18427, 2503.09641).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused
from jaxdistill.interop.tables import (
    CONV,
    POINT,
    Family,
    Row,
    fixed,
    linear,
    patches,
    setting,
    sizes,
)
from jaxdistill.models.denoisers.sana import Sana

FIXED = {"attention_bias": False, "norm_elementwise_affine": False, "dropout": 0.0}
NORM = "rms_norm_across_heads"
NAMES = {
    "size": "sample_size",
    "patch": "patch_size",
    "channels": "in_channels",
    "depth": "num_layers",
    "heads": "num_attention_heads",
    "cross_heads": "num_cross_attention_heads",
    "text_dim": "caption_channels",
    "mlp_ratio": "mlp_ratio",
    "norm_eps": "norm_eps",
}
ADDED = {  # keys that files written before them lack, with the value which they then have
    "interpolation": ("interpolation_scale", None),
    "guidance": ("guidance_embeds", False),
    "guidance_scale": ("guidance_embeds_scale", 0.1),
    "time_scale": ("timestep_scale", 1.0),
}


def table(cfg: Sana) -> tuple[Row, ...]:
    block = "transformer_blocks.{i}."
    time = "time_embed." if cfg.guidance else "time_embed.emb."

    def attention(name: str, bias: bool) -> tuple[Row, ...]:
        ours = f"blocks/{name}"
        theirs = block + name
        norms = ("norm_q", "norm_k") if cfg.qk_norm else ()
        return (
            *(
                row
                for part in ("to_q", "to_k", "to_v")
                for row in linear(f"{ours}/{part}", f"{theirs}.{part}", bias=bias)
            ),
            *linear(f"{ours}/to_out", f"{theirs}.to_out.0"),
            *(Row(f"{ours}/{part}/scale", f"{theirs}.{part}.weight") for part in norms),
        )

    def mapper(ours: str, theirs: str) -> tuple[Row, ...]:
        return tuple(
            row
            for part in ("linear_1", "linear_2")
            for row in linear(f"{ours}/{part}", f"{theirs}.{part}")
        )

    return (
        *linear("patch_embed", "patch_embed.proj", patches(cfg.patch)),
        *mapper("time_embed", time + "timestep_embedder"),
        *(mapper("guidance_embed", time + "guidance_embedder") if cfg.guidance else ()),
        *linear("time_proj", "time_embed.linear"),
        *linear("text_1", "caption_projection.linear_1"),
        *linear("text_2", "caption_projection.linear_2"),
        Row("text_norm/scale", "caption_norm.weight"),
        Row("blocks/table", block + "scale_shift_table"),
        *attention("attn1", False),
        *attention("attn2", True),
        *linear("blocks/gated/up", block + "ff.conv_inverted", POINT),
        *linear("blocks/gated/depth", block + "ff.conv_depth", CONV),
        *linear("blocks/gated/down", block + "ff.conv_point", POINT, bias=False),
        Row("table", "scale_shift_table"),
        *linear("proj_out", "proj_out"),
    )


def read(config: dict[str, Any], folder: Path) -> Sana:
    where = folder / "config.json"
    fixed(config, FIXED, where)
    get = lambda key: setting(config, key, where)
    dim = get("num_attention_heads") * get("attention_head_dim")
    across = get("num_cross_attention_heads") * get("cross_attention_head_dim")
    if across != dim:
        raise Refused(
            f"{where}: num_cross_attention_heads * cross_attention_head_dim = {across} is not supported, expected {dim}"
        )
    fixed(config, {"cross_attention_dim": dim}, where)
    if (config.get("out_channels") or get("in_channels")) != get("in_channels"):
        raise Refused(
            f"{where}: out_channels={config['out_channels']} is not supported, expected in_channels={get('in_channels')}"
        )
    if config.get("qk_norm") not in (None, NORM):
        raise Refused(
            f"{where}: qk_norm={config['qk_norm']!r} is not supported, expected None or {NORM!r}"
        )
    added = {ours: config.get(*theirs) for ours, theirs in ADDED.items()}
    return Sana(
        dim=dim, qk_norm=config.get("qk_norm") == NORM, **sizes(config, NAMES, where), **added
    )


def write(cfg: Sana) -> dict[str, dict[str, Any]]:
    config = {
        "_class_name": FAMILY.name,
        **{theirs: getattr(cfg, ours) for ours, theirs in NAMES.items()},
        **{theirs: getattr(cfg, ours) for ours, (theirs, _) in ADDED.items()},
        "out_channels": cfg.channels,
        "attention_head_dim": cfg.dim // cfg.heads,
        "cross_attention_head_dim": cfg.dim // cfg.cross_heads,
        "cross_attention_dim": cfg.dim,
        "qk_norm": NORM if cfg.qk_norm else None,
        **FIXED,
    }
    return {"config.json": config}


FAMILY = Family(
    name="SanaTransformer2DModel",
    library="diffusers",
    config=Sana,
    read=read,
    write=write,
    table=table,
    call="model({x}, timestep=model.config.timestep_scale * {t}, encoder_hidden_states=cond, guidance=guidance).sample",
    given="cond = torch.randn(2, 300, {text_dim})  # in its place, the text encoder's states of the prompts\n"
    "guidance = 4.5 * model.config.guidance_embeds_scale * torch.ones(2) if model.config.guidance_embeds else None",
)
