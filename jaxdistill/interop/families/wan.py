"""`WanTransformer3DModel` of diffusers: Wan 2.1 and 2.2 (arXiv:2503.20314)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused
from jaxdistill.interop.safetensors import read_json
from jaxdistill.interop.settings import PATCH, several
from jaxdistill.interop.tables import Family, Row, fixed, linear, norm, patches, setting
from jaxdistill.models.denoisers.wan import Wan

FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}


def experts(pipeline: str | Path) -> tuple[Path, Path, float]:
    """The two networks of a Wan 2.2 14B pipeline: (folder for t >= boundary, folder for t <
    boundary, boundary).

    `interop.load` reads each folder. The boundary is a time of the flow, in 0..1 (0.875 for text,
    0.9 for images in the released pipelines). Raises Refused where the pipeline has one network
    only: load its `transformer` folder.
    """
    index = Path(pipeline) / "model_index.json"
    config = read_json(index)
    boundary = config.get("boundary_ratio")
    if boundary is None or not all(
        (config.get(name) or [None])[-1] == FAMILY.name for name in ("transformer", "transformer_2")
    ):
        raise Refused(
            f"{index}: expected boundary_ratio, and a {FAMILY.name} as transformer and as transformer_2"
        )
    return index.with_name("transformer"), index.with_name("transformer_2"), float(boundary)


def table(cfg: Wan) -> tuple[Row, ...]:
    block = "blocks.{i}."
    embed = "condition_embedder."

    def attention(ours: str, theirs: str) -> tuple[Row, ...]:
        ours = f"blocks/{ours}"
        theirs = block + theirs
        return (
            *linear(f"{ours}/to_q", f"{theirs}.to_q"),
            *linear(f"{ours}/to_k", f"{theirs}.to_k"),
            *linear(f"{ours}/to_v", f"{theirs}.to_v"),
            *linear(f"{ours}/to_out", f"{theirs}.to_out.0"),
            Row(f"{ours}/norm_q/scale", f"{theirs}.norm_q.weight"),
            Row(f"{ours}/norm_k/scale", f"{theirs}.norm_k.weight"),
        )

    rows = (
        *linear("patch_embed", "patch_embedding", patches(cfg.patch)),
        *linear("time_embed/linear_1", embed + "time_embedder.linear_1"),
        *linear("time_embed/linear_2", embed + "time_embedder.linear_2"),
        *linear("time_proj", embed + "time_proj"),
        *linear("text_1", embed + "text_embedder.linear_1"),
        *linear("text_2", embed + "text_embedder.linear_2"),
        Row("blocks/table", block + "scale_shift_table"),
        *attention("attn1", "attn1"),
        *attention("attn2", "attn2"),
        *norm("blocks/norm", block + "norm2"),
        *linear("blocks/up", block + "ffn.net.0.proj"),
        *linear("blocks/down", block + "ffn.net.2"),
        Row("table", "scale_shift_table"),
        *linear("proj_out", "proj_out"),
    )
    if cfg.vision_dim:
        image = embed + "image_embedder."
        rows += (
            *norm("vision/norm1", image + "norm1"),
            *linear("vision/linear_1", image + "ff.net.0.proj"),
            *linear("vision/linear_2", image + "ff.net.2"),
            *norm("vision/norm2", image + "norm2"),
            *linear("blocks/attn2/to_k_vision", block + "attn2.add_k_proj"),
            *linear("blocks/attn2/to_v_vision", block + "attn2.add_v_proj"),
            Row("blocks/attn2/norm_k_vision/scale", block + "attn2.norm_added_k.weight"),
        )
    if cfg.vision_length:
        rows += (Row("vision/positions", embed + "image_embedder.pos_embed"),)
    return rows


def read(config: dict[str, Any], folder: Path) -> Wan:
    where = folder / "config.json"
    fixed(config, FIXED, where)
    get = lambda key: setting(config, key, where)
    heads = get("num_attention_heads")
    channels = get("in_channels")
    vision = config.get("image_dim") or 0
    dim = heads * get("attention_head_dim")
    out = config.get("out_channels") or channels
    added = config.get("added_kv_proj_dim")
    if added != (dim if vision else None):
        raise Refused(
            f"{where}: added_kv_proj_dim={added} is not supported with image_dim={vision or None}, expected {dim if vision else None}"
        )
    if out > channels:
        raise Refused(
            f"{where}: out_channels={out} is not supported, expected at most in_channels={channels}"
        )
    return Wan(
        patch=tuple(get("patch_size")),
        channels=out,
        image_channels=channels - out,
        dim=dim,
        mlp=get("ffn_dim"),
        depth=get("num_layers"),
        heads=heads,
        text_dim=get("text_dim"),
        vision_dim=vision,
        vision_length=(config.get("pos_embed_seq_len") or 0) if vision else 0,
        time_dim=get("freq_dim"),
        norm_eps=get("eps"),
    )


def write(cfg: Wan) -> dict[str, dict[str, Any]]:
    config = {
        "_class_name": FAMILY.name,
        "patch_size": list(cfg.patch),
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.dim // cfg.heads,
        "in_channels": cfg.channels + cfg.image_channels,
        "out_channels": cfg.channels,
        "text_dim": cfg.text_dim,
        "freq_dim": cfg.time_dim,
        "ffn_dim": cfg.mlp,
        "num_layers": cfg.depth,
        "eps": cfg.norm_eps,
        "image_dim": cfg.vision_dim or None,
        "added_kv_proj_dim": cfg.dim if cfg.vision_dim else None,
        "rope_max_seq_len": 1024,  # the length of PyTorch's table; ours has none
        "pos_embed_seq_len": cfg.vision_length or None,
        **FIXED,
    }
    return {"config.json": config}


FAMILY = Family(
    name="WanTransformer3DModel",
    library="diffusers",
    config=Wan,
    kinds={"patch_size": several(PATCH, 3, 3)},
    read=read,
    write=write,
    table=table,
    call="model({x}, timestep={t}, encoder_hidden_states=cond).sample",
    given="cond = torch.randn(2, 512, {text_dim})  # in its place, the text encoder's states of the prompts",
    ignored=(r"blocks\.\d+\.attn2\.norm_added_q\.weight",),  # stored by some files, used by none
)
