"""`WanTransformer3DModel` of diffusers: Wan 2.1 and 2.2 (arXiv:2503.20314)."""

from __future__ import annotations

from pathlib import Path

from jaxdistill.core.types import Refused
from jaxdistill.interop.keys import (
    Config,
    Field,
    Fixed,
    Read,
    Written,
    listed,
    optional,
    same,
)
from jaxdistill.interop.safetensors import read_json
from jaxdistill.interop.settings import PATCH, several
from jaxdistill.interop.tables import Family, Row, linear, norm, patches
from jaxdistill.models.denoisers.wan import Wan


def _out_channels(count: int | None, config: Config) -> int:
    """Channels of the output; those of the input beyond them are the condition's."""
    channels = config["in_channels"]
    if not count:
        return channels
    if count > channels:
        raise config.refusal("out_channels", f"at most in_channels={channels}")
    return count


def _check_added(config: Config) -> None:
    """Raises Refused where the maps of image features are not as wide as the others."""
    vision = config.get("image_dim") or None
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    added = config.get("added_kv_proj_dim")
    expected = dim if vision else None
    if added != expected:
        raise Refused(
            f"{config.file}: added_kv_proj_dim={added} is not supported with image_dim={vision}, "
            f"expected {expected}"
        )


KEYS = (
    listed("patch", "patch_size"),
    same("heads", "num_attention_heads"),
    Field(
        field="dim",
        key="attention_head_dim",
        read=lambda size, config: size * config["num_attention_heads"],
        write=lambda ours: ours.dim // ours.heads,
    ),
    Field(
        field="image_channels",
        key="in_channels",
        read=lambda count, config: count - (config.get("out_channels") or count),
        write=lambda ours: ours.channels + ours.image_channels,
    ),
    Field(
        field="channels",
        key="out_channels",
        read=_out_channels,
        missing=None,
        null=None,
    ),
    same("text_dim", "text_dim"),
    same("time_dim", "freq_dim"),
    same("mlp", "ffn_dim"),
    same("depth", "num_layers"),
    same("norm_eps", "eps"),
    optional("vision_dim", "image_dim"),
    Read("", _check_added),
    Written(
        "added_kv_proj_dim", lambda ours: ours.dim if ours.vision_dim else None
    ),
    Written(
        "rope_max_seq_len", 1024
    ),  # the length of PyTorch's table; ours has none
    Field(
        field="vision_length",
        key="pos_embed_seq_len",
        read=lambda length, config: length if config.get("image_dim") else 0,
        write=lambda ours: ours.vision_length or None,
        missing=0,
        null=0,
    ),
    Fixed("cross_attn_norm", True),
    Fixed("qk_norm", "rms_norm_across_heads"),
)


def experts(pipeline: str | Path) -> tuple[Path, Path, float]:
    """The folders of the two networks of a Wan 2.2 14B pipeline, for `interop.load`.

    Returns:
        The folder for times from the boundary on, that for times below it, and the boundary, a time
        of the flow in 0..1 (0.875 for text, 0.9 for images in the released pipelines).

    Raises:
        Refused: The pipeline has one network only, which is in its folder `transformer`.
    """
    index = Path(pipeline) / "model_index.json"
    config = read_json(index)
    boundary = config.get("boundary_ratio")
    classes = [
        (config.get(name) or [None])[-1]
        for name in ("transformer", "transformer_2")
    ]
    if boundary is None or classes != [FAMILY.name, FAMILY.name]:
        raise Refused(
            f"{index}: expected boundary_ratio, and a {FAMILY.name} as transformer and as "
            "transformer_2"
        )
    return (
        index.with_name("transformer"),
        index.with_name("transformer_2"),
        float(boundary),
    )


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
            Row(
                "blocks/attn2/norm_k_vision/scale",
                block + "attn2.norm_added_k.weight",
            ),
        )
    if cfg.vision_length:
        rows += (Row("vision/positions", embed + "image_embedder.pos_embed"),)
    return rows


FAMILY = Family(
    name="WanTransformer3DModel",
    library="diffusers",
    config=Wan,
    keys=KEYS,
    kinds={"patch_size": several(PATCH, 3, 3)},
    table=table,
    call="model({x}, timestep={t}, encoder_hidden_states=cond).sample",
    given="cond = torch.randn(2, 512, {text_dim})  "
    "# in its place, the text encoder's states of the prompts",
    ignored=(
        r"blocks\.\d+\.attn2\.norm_added_q\.weight",
    ),  # stored by some files, used by none
)
