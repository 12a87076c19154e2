"""`SanaTransformer2DModel` of diffusers: SANA, SANA 1.5 and SANA-Sprint (arXiv:2410.10629,
2501.18427, 2503.09641).
"""

from __future__ import annotations

from jaxdistill.core.types import Refused
from jaxdistill.interop.keys import (
    Config,
    Field,
    Fixed,
    Implied,
    Read,
    Written,
    one_of,
    optional,
    same,
)
from jaxdistill.interop.tables import CONV, POINT, Family, Row, linear, patches
from jaxdistill.models.denoisers.sana import Sana


def _check_cross(config: Config) -> None:
    """Raises Refused where the heads of the attention to the text are not as wide as the rest."""
    dim = _dim(config["attention_head_dim"], config)
    across = (
        config["num_cross_attention_heads"] * config["cross_attention_head_dim"]
    )
    if across != dim:
        raise Refused(
            f"{config.file}: num_cross_attention_heads * cross_attention_head_dim = {across} is "
            f"not supported, expected {dim}"
        )


def _dim(head: int, config: Config) -> int:
    """The width of the network for the width of a head."""
    return config["num_attention_heads"] * head


def _check_channels(config: Config) -> None:
    """Raises Refused where the output has other channels than the input."""
    channels = config["in_channels"]
    if (config.get("out_channels") or channels) != channels:
        raise config.refusal("out_channels", f"in_channels={channels}")


QK_NORMS = {None: False, "rms_norm_across_heads": True}
KEYS = (
    Read("", _check_cross),
    Read("", _check_channels),
    same("size", "sample_size"),
    same("patch", "patch_size"),
    same("channels", "in_channels"),
    same("depth", "num_layers"),
    same("heads", "num_attention_heads"),
    same("cross_heads", "num_cross_attention_heads"),
    same("text_dim", "caption_channels"),
    same("mlp_ratio", "mlp_ratio"),
    same("norm_eps", "norm_eps"),
    # the next four are missing in older files
    optional("interpolation", "interpolation_scale", none=None),
    same("guidance", "guidance_embeds", missing=False),
    same("guidance_scale", "guidance_embeds_scale", missing=0.1),
    same("time_scale", "timestep_scale", missing=1.0),
    Written("out_channels", lambda ours: ours.channels),
    Field(
        field="dim",
        key="attention_head_dim",
        read=_dim,
        write=lambda ours: ours.dim // ours.heads,
    ),
    Written("cross_attention_head_dim", lambda ours: ours.dim // ours.cross_heads),
    Implied("cross_attention_dim", lambda ours: ours.dim),
    one_of("qk_norm", "qk_norm", QK_NORMS, missing=None),
    Fixed("attention_bias", False),
    Fixed("norm_elementwise_affine", False),
    Fixed("dropout", 0.0),
)


def table(cfg: Sana) -> tuple[Row, ...]:
    block = "transformer_blocks.{i}."
    time = "time_embed." if cfg.guidance else "time_embed.emb."

    def attention(name: str, bias: bool) -> tuple[Row, ...]:
        ours = f"blocks/{name}"
        theirs = block + name
        norms = ("norm_q", "norm_k") if cfg.qk_norm else ()
        return (
            *linear(f"{ours}/to_q", f"{theirs}.to_q", bias=bias),
            *linear(f"{ours}/to_k", f"{theirs}.to_k", bias=bias),
            *linear(f"{ours}/to_v", f"{theirs}.to_v", bias=bias),
            *linear(f"{ours}/to_out", f"{theirs}.to_out.0"),
            *(
                Row(f"{ours}/{part}/scale", f"{theirs}.{part}.weight")
                for part in norms
            ),
        )

    def embedder(ours: str, theirs: str) -> tuple[Row, ...]:
        return (
            *linear(f"{ours}/linear_1", f"{theirs}.linear_1"),
            *linear(f"{ours}/linear_2", f"{theirs}.linear_2"),
        )

    return (
        *linear("patch_embed", "patch_embed.proj", patches(cfg.patch)),
        *embedder("time_embed", time + "timestep_embedder"),
        *(
            embedder("guidance_embed", time + "guidance_embedder")
            if cfg.guidance
            else ()
        ),
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


FAMILY = Family(
    name="SanaTransformer2DModel",
    library="diffusers",
    config=Sana,
    keys=KEYS,
    table=table,
    call="model({x}, timestep=model.config.timestep_scale * {t}, encoder_hidden_states=cond, "
    "guidance=guidance).sample",
    given="cond = torch.randn(2, 300, {text_dim})  "
    "# in its place, the text encoder's states of the prompts\n"
    "guidance = 4.5 * model.config.guidance_embeds_scale * torch.ones(2) "
    "if model.config.guidance_embeds else None",
)
