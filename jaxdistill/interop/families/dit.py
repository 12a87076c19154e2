"""`DiTTransformer2DModel` of diffusers: DiT (arXiv:2212.09748) and its flow-matched descendants."""

from __future__ import annotations

from jaxdistill.core.types import Refused
from jaxdistill.interop.keys import Field, Fixed, same
from jaxdistill.interop.tables import Family, Row, linear, patches
from jaxdistill.models.denoisers.dit import DiT

KEYS = (
    same("heads", "num_attention_heads"),
    Field(
        field="dim",
        key="attention_head_dim",
        read=lambda size, config: size * config["num_attention_heads"],
        write=lambda ours: ours.dim // ours.heads,
    ),
    same("channels", "in_channels"),
    Field(
        field="out_channels",
        key="out_channels",
        read=lambda count, config: 0 if count == config["in_channels"] else count,
        write=lambda ours: ours.out_channels or ours.channels,
        missing=0,
        null=0,
    ),
    same("depth", "num_layers"),
    same("size", "sample_size"),
    same("patch", "patch_size"),
    same("classes", "num_embeds_ada_norm"),
    Fixed("norm_type", "ada_norm_zero"),
    Fixed("activation_fn", "gelu-approximate"),
    Fixed("attention_bias", True),
    Fixed("norm_elementwise_affine", False),
    Fixed("norm_eps", 1e-5),
    Fixed("dropout", 0.0),
)


def table(cfg: DiT) -> tuple[Row, ...]:
    block = "transformer_blocks.{i}."
    embed = block + "norm1.emb."
    if cfg.second_time:
        raise Refused(
            "DiTTransformer2DModel takes one time; models.denoisers.dit.fold_gap folds the second "
            "one in for a single step"
        )
    return (
        Row("patch_embed/kernel", "pos_embed.proj.weight", patches(cfg.patch)),
        Row("patch_embed/bias", "pos_embed.proj.bias"),
        *linear(
            "time_embed/linear_1",
            embed + "timestep_embedder.linear_1",
            copies=cfg.depth,
        ),
        *linear(
            "time_embed/linear_2",
            embed + "timestep_embedder.linear_2",
            copies=cfg.depth,
        ),
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


FAMILY = Family(
    name="DiTTransformer2DModel",
    library="diffusers",
    config=DiT,
    keys=KEYS,
    table=table,
    call="model({x}, timestep={t}, class_labels=cond).sample",
    given="cond = torch.arange({classes})",
    adapters=False,
)
