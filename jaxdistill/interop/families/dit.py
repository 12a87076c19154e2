"""`DiTTransformer2DModel` of diffusers: DiT (arXiv:2212.09748) and its flow-matched descendants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused
from jaxdistill.interop.tables import Family, Row, fixed, linear, patches, setting
from jaxdistill.models.denoisers.dit import DiT

FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
    "dropout": 0.0,
}


def table(cfg: DiT) -> tuple[Row, ...]:
    block = "transformer_blocks.{i}."
    embed = block + "norm1.emb."
    if cfg.second_time:
        raise Refused(
            "DiTTransformer2DModel takes one time; models.denoisers.dit.fold_gap folds the second one in for a single step"
        )
    return (
        Row("patch_embed/kernel", "pos_embed.proj.weight", patches(cfg.patch)),
        Row("patch_embed/bias", "pos_embed.proj.bias"),
        *linear("time_embed/linear_1", embed + "timestep_embedder.linear_1", copies=cfg.depth),
        *linear("time_embed/linear_2", embed + "timestep_embedder.linear_2", copies=cfg.depth),
        Row(
            "label_embed/embedding",
            embed + "class_embedder.embedding_table.weight",
            copies=cfg.depth,
        ),
        *linear("blocks/modulation", block + "norm1.linear"),
        *linear("blocks/to_q", block + "attn1.to_q"),
        *linear("blocks/to_k", block + "attn1.to_k"),
        *linear("blocks/to_v", block + "attn1.to_v"),
        *linear("blocks/to_out", block + "attn1.to_out.0"),
        *linear("blocks/up", block + "ff.net.0.proj"),
        *linear("blocks/down", block + "ff.net.2"),
        *linear("modulation_out", "proj_out_1"),
        *linear("proj_out", "proj_out_2"),
    )


def read(config: dict[str, Any], folder: Path) -> DiT:
    where = folder / "config.json"
    fixed(config, FIXED, where)
    get = lambda key: setting(config, key, where)
    heads = get("num_attention_heads")
    channels = get("in_channels")
    out = config.get("out_channels") or channels
    return DiT(
        size=get("sample_size"),
        patch=get("patch_size"),
        channels=channels,
        out_channels=0 if out == channels else out,
        dim=heads * get("attention_head_dim"),
        depth=get("num_layers"),
        heads=heads,
        classes=get("num_embeds_ada_norm"),
    )


def write(cfg: DiT) -> dict[str, dict[str, Any]]:
    config = {
        "_class_name": FAMILY.name,
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.dim // cfg.heads,
        "in_channels": cfg.channels,
        "out_channels": cfg.out_channels or cfg.channels,
        "num_layers": cfg.depth,
        "sample_size": cfg.size,
        "patch_size": cfg.patch,
        "num_embeds_ada_norm": cfg.classes,
        **FIXED,
    }
    return {"config.json": config}


FAMILY = Family(
    name="DiTTransformer2DModel",
    library="diffusers",
    config=DiT,
    read=read,
    write=write,
    table=table,
    call="model({x}, timestep={t}, class_labels=cond).sample",
    given="cond = torch.arange({classes})",
    adapters=False,
)
