"""`UNet2DConditionModel` of diffusers: Stable Diffusion 1 and 2, SDXL and their distilled
descendants (LCM, DMD2, BK-SDM).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused
from jaxdistill.interop.keys import (
    Config,
    Field,
    Fixed,
    Read,
    Written,
    check_value,
    listed,
    optional,
    same,
)
from jaxdistill.interop.settings import BLOCKS, WIDTH, either, several
from jaxdistill.interop.tables import CONV, LINEAR, POINT, Family, Row, linear, norm
from jaxdistill.models.denoisers.unet import UNet

CROSS = "CrossAttnDownBlock2D"  # a level with transformers
# on the way down and up
KINDS = {
    CROSS: "CrossAttnUpBlock2D",
    "DownBlock2D": "UpBlock2D",
}
MIDDLES = ("UNetMidBlock2DCrossAttn", None)
ADDED = ("text_time", None)  # what `addition_embed_type` may be


def _each(config: Config, key: str, missing: int) -> list[int]:
    """A number for each level, from a list or one number for all. Raises Refused on others."""
    count = len(config["block_out_channels"])
    value = config.get(key, missing)
    if not isinstance(value, list):
        value = [value] * count
    if len(value) != count or not all(isinstance(n, int) for n in value):
        raise Refused(
            f"{config.file}: {key}={value} is not supported, expected one whole number or {count}"
        )
    return value


def _equal(field: str, key: str, missing: int) -> Field:
    """A number of all levels. Raises Refused on a list of several."""

    def read(value: Any, config: Config) -> int:
        values = _each(config, key, missing)
        if len(set(values)) > 1:
            raise Refused(
                f"{config.file}: {key}={values} is not supported, expected the same at every level"
            )
        return values[0]

    return Field(field=field, key=key, read=read, missing=missing)


def _depths(kinds: list[str], config: Config) -> tuple[int, ...]:
    """Transformer blocks of each level; 0 of a level without."""
    if not set(kinds) <= KINDS.keys():
        raise config.refusal("down_block_types", " or ".join(KINDS))
    depths = _each(config, "transformer_layers_per_block", 1)
    return tuple(
        depth if kind == CROSS else 0 for depth, kind in zip(depths, kinds)
    )


def _down_kinds(ours: UNet) -> list[str]:
    return [CROSS if depth else "DownBlock2D" for depth in ours.depths]


def _up_kinds(down: list[str]) -> list[str]:
    return [KINDS[kind] for kind in reversed(down)]


def _check_up_kinds(config: Config) -> None:
    """Raises Refused where the levels on the way up have other kinds than those on the way down."""
    expected = _up_kinds(config["down_block_types"])
    check_value(config.values, "up_block_types", expected, config.file)


def _mid_depth(middle: str | None, config: Config) -> int:
    """Transformer blocks in the middle, as many as of the last level; 0 without a middle."""
    if middle not in MIDDLES:
        raise config.refusal("mid_block_type", "'UNetMidBlock2DCrossAttn' or null")
    return _each(config, "transformer_layers_per_block", 1)[-1] if middle else 0


def _depths_of_all(ours: UNet) -> list[int]:
    """Transformer blocks of each level, and in the last place those of the middle.

    Raises Refused where the last level has another number.
    """
    last = ours.depths[-1]
    if ours.mid_depth and last not in (0, ours.mid_depth):
        raise Refused(
            f"UNet2DConditionModel: depths={ours.depths} end in another number than "
            f"mid_depth={ours.mid_depth}"
        )
    return [
        *(depth or 1 for depth in ours.depths[:-1]),
        ours.mid_depth or last or 1,
    ]


def _image_channels(count: int, config: Config) -> int:
    """Channels of the input beyond those of the output."""
    out = config["out_channels"]
    if count < out:
        raise Refused(
            f"{config.file}: out_channels={out} is more than in_channels={count}"
        )
    return count - out


def _size_dim(config: Config) -> int:
    """Features of each of the six numbers of cond["size"]; 0 where the network reads none."""
    kind = config.get("addition_embed_type")
    if kind not in ADDED:
        raise config.refusal("addition_embed_type", "'text_time' or null")
    return config["addition_time_embed_dim"] if kind else 0


def _pooled_dim(config: Config) -> int:
    """Channels of cond["pooled"]: what is left of the added embedding's input."""
    size_dim = _size_dim(config)
    if not size_dim:
        return 0
    return config["projection_class_embeddings_input_dim"] - 6 * size_dim


def _added_dim(ours: UNet) -> int | None:
    """Channels of the added embedding's input; None where there is none."""
    return ours.pooled_dim + 6 * ours.size_dim if ours.pooled_dim else None


KEYS = (
    Field(field="size", key="sample_size", missing=UNet.size, null=UNet.size),
    Field(
        field="image_channels",
        key="in_channels",
        read=_image_channels,
        write=lambda ours: ours.channels + ours.image_channels,
    ),
    same("channels", "out_channels"),
    Field(field="depths", key="down_block_types", read=_depths, write=_down_kinds),
    Field(
        field="mid_depth",
        key="mid_block_type",
        read=_mid_depth,
        write=lambda ours: "UNetMidBlock2DCrossAttn" if ours.mid_depth else None,
        missing="UNetMidBlock2DCrossAttn",
        null=None,
    ),
    Read("", _check_up_kinds),
    Written("up_block_types", lambda ours: _up_kinds(_down_kinds(ours))),
    listed("widths", "block_out_channels"),
    _equal("layers", "layers_per_block", 2),
    Written("transformer_layers_per_block", _depths_of_all),
    Field(  # diffusers' name for the number of heads
        field="heads",
        key="attention_head_dim",
        read=lambda value, config: tuple(_each(config, "attention_head_dim", 8)),
        write=lambda ours: list(ours.heads),
        missing=8,
    ),
    _equal("text_dim", "cross_attention_dim", 1280),
    same("groups", "norm_num_groups", missing=32),
    same("matrices", "use_linear_projection", missing=False),
    Written("upcast_attention", True),  # scores and softmax in float32, as ours are
    Written(
        "addition_embed_type", lambda ours: "text_time" if ours.pooled_dim else None
    ),
    Read("size_dim", _size_dim),
    Written("addition_time_embed_dim", lambda ours: ours.size_dim or None),
    Read("pooled_dim", _pooled_dim),
    Written("projection_class_embeddings_input_dim", _added_dim),
    optional("guidance_dim", "time_cond_proj_dim"),
    Fixed("act_fn", "silu"),
    Fixed("attention_type", "default"),
    Fixed("center_input_sample", False),
    Fixed("class_embed_type", None),
    Fixed("class_embeddings_concat", False),
    Fixed("conv_in_kernel", 3),
    Fixed("conv_out_kernel", 3),
    Fixed("cross_attention_norm", None),
    Fixed("downsample_padding", 1),
    Fixed("dropout", 0.0),
    Fixed("dual_cross_attention", False),
    Fixed("encoder_hid_dim", None),
    Fixed("encoder_hid_dim_type", None),
    Fixed("flip_sin_to_cos", True),
    Fixed("freq_shift", 0),
    Fixed("mid_block_only_cross_attention", None),
    Fixed("mid_block_scale_factor", 1),
    Fixed("norm_eps", 1e-5),
    Fixed("num_attention_heads", None),
    Fixed("num_class_embeds", None),
    Fixed("only_cross_attention", False),
    Fixed("resnet_out_scale_factor", 1.0),
    Fixed("resnet_skip_time_act", False),
    Fixed("resnet_time_scale_shift", "default"),
    Fixed("reverse_transformer_layers_per_block", None),
    Fixed("time_embedding_act_fn", None),
    Fixed("time_embedding_dim", None),
    Fixed("time_embedding_type", "positional"),
    Fixed("timestep_post_act", None),
)


def _prepare(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """config.json in which `mid_block_only_cross_attention` is null where it is false."""
    only = values.get("mid_block_only_cross_attention") or None
    return values | {"mid_block_only_cross_attention": only}


def resnet(path: str, name: str, i: int, o: int, emb: bool) -> tuple[Row, ...]:
    """A `ResBlock` from i to o channels: diffusers' `ResnetBlock2D`."""
    return (
        *norm(f"{path}/norm1", f"{name}.norm1"),
        *linear(f"{path}/conv1", f"{name}.conv1", CONV),
        *norm(f"{path}/norm2", f"{name}.norm2"),
        *linear(f"{path}/conv2", f"{name}.conv2", CONV),
        *(linear(f"{path}/emb", f"{name}.time_emb_proj") if emb else ()),
        *(
            linear(f"{path}/shortcut", f"{name}.conv_shortcut", CONV)
            if i != o
            else ()
        ),
    )


def transformer(path: str, name: str, matrices: bool) -> tuple[Row, ...]:
    """A `Transformer`: diffusers' `Transformer2DModel`."""
    point = LINEAR if matrices else POINT
    block = f"{name}.transformer_blocks.{{i}}."

    def attend(which: str) -> tuple[Row, ...]:
        ours = f"{path}/blocks/{which}"
        theirs = block + which
        return (
            *linear(f"{ours}/to_q", f"{theirs}.to_q", bias=False),
            *linear(f"{ours}/to_k", f"{theirs}.to_k", bias=False),
            *linear(f"{ours}/to_v", f"{theirs}.to_v", bias=False),
            *linear(f"{ours}/to_out", f"{theirs}.to_out.0"),
        )

    return (
        *norm(f"{path}/norm", f"{name}.norm"),
        *linear(f"{path}/proj_in", f"{name}.proj_in", point),
        *norm(f"{path}/blocks/norm1", block + "norm1"),
        *norm(f"{path}/blocks/norm2", block + "norm2"),
        *norm(f"{path}/blocks/norm3", block + "norm3"),
        *attend("attn1"),
        *attend("attn2"),
        *linear(f"{path}/blocks/up", f"{block}ff.net.0.proj"),
        *linear(f"{path}/blocks/down", f"{block}ff.net.2"),
        *linear(f"{path}/proj_out", f"{name}.proj_out", point),
    )


def table(cfg: UNet) -> tuple[Row, ...]:
    return tuple(_rows(cfg))


def _rows(cfg: UNet) -> Iterator[Row]:
    last = len(cfg.widths) - 1
    yield from linear("conv_in", "conv_in", CONV)
    yield from linear("time_embed/linear_1", "time_embedding.linear_1")
    yield from linear("time_embed/linear_2", "time_embedding.linear_2")
    if cfg.pooled_dim:
        yield from linear("size_embed/linear_1", "add_embedding.linear_1")
        yield from linear("size_embed/linear_2", "add_embedding.linear_2")
    if cfg.guidance_dim:
        yield from linear("guidance_embed", "time_embedding.cond_proj", bias=False)
    before = cfg.widths[0]
    for i, width in enumerate(cfg.widths):
        inputs = [before] + [width] * (cfg.layers - 1)
        yield from _level(
            cfg, f"down/{i}", f"down_blocks.{i}", inputs, width, cfg.depths[i]
        )
        if i < last:
            name = f"down_blocks.{i}.downsamplers.0.conv"
            yield from linear(f"down/{i}/resample/conv", name, CONV)
        before = width
    if cfg.mid_depth:
        yield from resnet("mid/before", "mid_block.resnets.0", 1, 1, True)
        yield from transformer(
            "mid/attention", "mid_block.attentions.0", cfg.matrices
        )
        yield from resnet("mid/after", "mid_block.resnets.1", 1, 1, True)
    for i, width in enumerate(reversed(cfg.widths)):
        # the concatenated inputs never have the block's width: each block has a shortcut
        inputs = [0] * (cfg.layers + 1)
        yield from _level(
            cfg, f"up/{i}", f"up_blocks.{i}", inputs, width, cfg.depths[last - i]
        )
        if i < last:
            yield from linear(
                f"up/{i}/resample/conv", f"up_blocks.{i}.upsamplers.0.conv", CONV
            )
    yield from norm("norm_out", "conv_norm_out")
    yield from linear("conv_out", "conv_out", CONV)


def _level(
    cfg: UNet, path: str, name: str, inputs: list[int], out: int, depth: int
) -> Iterator[Row]:
    """The blocks of a level, from `inputs` to `out` channels, and its transformers."""
    for i, width in enumerate(inputs):
        yield from resnet(
            f"{path}/resnets/{i}", f"{name}.resnets.{i}", width, out, True
        )
        if depth:
            yield from transformer(
                f"{path}/attentions/{i}", f"{name}.attentions.{i}", cfg.matrices
            )


FAMILY = Family(
    name="UNet2DConditionModel",
    library="diffusers",
    config=UNet,
    keys=KEYS,
    prepare=_prepare,
    kinds={
        "attention_head_dim": either(WIDTH, several(WIDTH, 1)),
        "cross_attention_dim": either(WIDTH, several(WIDTH, 1)),
        "layers_per_block": either(BLOCKS, several(BLOCKS, 1)),
    },
    table=table,
    free=("sample_size",),
    call="model({x}, {t}, encoder_hidden_states=cond).sample",
    given="cond = torch.randn(2, 77, {text_dim})  "
    "# in its place, the text encoder's states of the prompts",
    component="unet",
)
