"""`QwenImageTransformer2DModel` of diffusers: Qwen-Image and Qwen-Image-Edit (arXiv:2508.02324)."""

from __future__ import annotations

from jaxdistill.interop.keys import Config, Field, Fixed, Read, Written, same
from jaxdistill.interop.tables import Family, Row, linear
from jaxdistill.models.denoisers.qwen_image import QwenImage


def _check_channels(config: Config) -> None:
    """Raises Refused where the tokens are not the patches of `out_channels` channels."""
    channels = config["out_channels"]
    if config["patch_size"] ** 2 * channels != config["in_channels"]:
        raise config.refusal("in_channels", "patch_size^2 out_channels")


def _axes(axes: list[int], config: Config) -> tuple[int, ...]:
    """The channels of a head that turn with frame, row and column: all of them."""
    if sum(axes) != config["attention_head_dim"]:
        expected = f"{sum(axes)}, the sum of {tuple(axes)}"
        raise config.refusal("attention_head_dim", expected)
    return tuple(axes)


KEYS = (
    same("patch", "patch_size"),
    Read("", _check_channels),
    Written("in_channels", lambda ours: ours.patch**2 * ours.channels),
    same("channels", "out_channels"),
    same("depth", "num_layers"),
    Written("attention_head_dim", lambda ours: sum(ours.axes)),
    same("heads", "num_attention_heads"),
    same("text_dim", "joint_attention_dim"),
    Field(
        field="axes",
        key="axes_dims_rope",
        read=_axes,
        write=lambda ours: list(ours.axes),
    ),
    same("clean_pictures", "zero_cond_t", missing=False),
    Fixed("guidance_embeds", False),
    Fixed("use_additional_t_cond", False),
    Fixed("use_layer3d_rope", False),
)


def _stream(path: str, prefix: str, names: tuple[str, ...]) -> tuple[Row, ...]:
    """The weights of pictures or of texts in all blocks.

    `prefix` is that of the modulation and the MLP; `names` are those of q, k, v, out and the norms
    of q and k inside the attention.
    """
    block = "transformer_blocks.{i}."
    to_q, to_k, to_v, to_out, norm_q, norm_k = (
        f"{block}attn.{name}" for name in names
    )
    return (
        *linear(f"{path}/modulation", f"{block}{prefix}_mod.1"),
        *linear(f"{path}/to_q", to_q),
        *linear(f"{path}/to_k", to_k),
        *linear(f"{path}/to_v", to_v),
        *linear(f"{path}/to_out", to_out),
        Row(f"{path}/norm_q/scale", f"{norm_q}.weight"),
        Row(f"{path}/norm_k/scale", f"{norm_k}.weight"),
        *linear(f"{path}/up", f"{block}{prefix}_mlp.net.0.proj"),
        *linear(f"{path}/down", f"{block}{prefix}_mlp.net.2"),
    )


PICTURES = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
TEXTS = (
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "norm_added_q",
    "norm_added_k",
)


def table(cfg: QwenImage) -> tuple[Row, ...]:
    return (
        *linear("patch_embed", "img_in"),
        *linear(
            "time_embed/linear_1", "time_text_embed.timestep_embedder.linear_1"
        ),
        *linear(
            "time_embed/linear_2", "time_text_embed.timestep_embedder.linear_2"
        ),
        Row("text_norm/scale", "txt_norm.weight"),
        *linear("text_embed", "txt_in"),
        *_stream("blocks/image", "img", PICTURES),
        *_stream("blocks/text", "txt", TEXTS),
        *linear("modulation_out", "norm_out.linear"),
        *linear("proj_out", "proj_out"),
    )


FAMILY = Family(
    name="QwenImageTransformer2DModel",
    library="diffusers",
    config=QwenImage,
    keys=KEYS,
    table=table,
    free=("zero_cond_t",),
)
