"""`UNet2DConditionModel` of diffusers: Stable Diffusion 1 and 2, SDXL and their distilled
descendants (LCM, DMD2, BK-SDM).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused
from jaxdistill.interop.settings import BLOCKS, WIDTH, either, several
from jaxdistill.interop.tables import CONV, LINEAR, POINT, Family, Row, fixed, linear, norm, setting
from jaxdistill.models.denoisers.unet import UNet

FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


def resnet(path: str, name: str, i: int, o: int, emb: bool) -> tuple[Row, ...]:
    """A `ResBlock` from i to o channels: diffusers' `ResnetBlock2D`."""
    return (
        *norm(f"{path}/norm1", f"{name}.norm1"),
        *linear(f"{path}/conv1", f"{name}.conv1", CONV),
        *norm(f"{path}/norm2", f"{name}.norm2"),
        *linear(f"{path}/conv2", f"{name}.conv2", CONV),
        *(linear(f"{path}/emb", f"{name}.time_emb_proj") if emb else ()),
        *(linear(f"{path}/shortcut", f"{name}.conv_shortcut", CONV) if i != o else ()),
    )


def transformer(path: str, name: str, matrices: bool) -> tuple[Row, ...]:
    """A `Transformer`: diffusers' `Transformer2DModel`."""
    point = LINEAR if matrices else POINT
    block = f"{name}.transformer_blocks.{{i}}."
    attend = lambda which: (
        *(
            row
            for part in "qkv"
            for row in linear(
                f"{path}/blocks/{which}/to_{part}", f"{block}{which}.to_{part}", bias=False
            )
        ),
        *linear(f"{path}/blocks/{which}/to_out", f"{block}{which}.to_out.0"),
    )
    return (
        *norm(f"{path}/norm", f"{name}.norm"),
        *linear(f"{path}/proj_in", f"{name}.proj_in", point),
        *(row for i in (1, 2, 3) for row in norm(f"{path}/blocks/norm{i}", f"{block}norm{i}")),
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
    yield from (
        row
        for i in (1, 2)
        for row in linear(f"time_embed/linear_{i}", f"time_embedding.linear_{i}")
    )
    if cfg.pooled_dim:
        yield from (
            row
            for i in (1, 2)
            for row in linear(f"size_embed/linear_{i}", f"add_embedding.linear_{i}")
        )
    if cfg.guidance_dim:
        yield from linear("guidance_embed", "time_embedding.cond_proj", bias=False)
    before = cfg.widths[0]
    for i, width in enumerate(cfg.widths):
        yield from _level(
            cfg,
            f"down/{i}",
            f"down_blocks.{i}",
            [before] + [width] * (cfg.layers - 1),
            width,
            cfg.depths[i],
        )
        if i < last:
            yield from linear(
                f"down/{i}/resample/conv", f"down_blocks.{i}.downsamplers.0.conv", CONV
            )
        before = width
    if cfg.mid_depth:
        yield from resnet("mid/before", "mid_block.resnets.0", 1, 1, True)
        yield from transformer("mid/attention", "mid_block.attentions.0", cfg.matrices)
        yield from resnet("mid/after", "mid_block.resnets.1", 1, 1, True)
    for i, width in enumerate(reversed(cfg.widths)):
        # a concatenated input never has the block's width: every block on the way up has a shortcut
        yield from _level(
            cfg, f"up/{i}", f"up_blocks.{i}", [0] * (cfg.layers + 1), width, cfg.depths[last - i]
        )
        if i < last:
            yield from linear(f"up/{i}/resample/conv", f"up_blocks.{i}.upsamplers.0.conv", CONV)
    yield from norm("norm_out", "conv_norm_out")
    yield from linear("conv_out", "conv_out", CONV)


def _level(cfg: UNet, path: str, name: str, ins: list[int], out: int, depth: int) -> Iterator[Row]:
    for i, width in enumerate(ins):
        yield from resnet(f"{path}/resnets/{i}", f"{name}.resnets.{i}", width, out, True)
        if depth:
            yield from transformer(f"{path}/attentions/{i}", f"{name}.attentions.{i}", cfg.matrices)


def read(config: dict[str, Any], folder: Path) -> UNet:
    where = folder / "config.json"
    fixed(
        {
            **config,
            "mid_block_only_cross_attention": config.get("mid_block_only_cross_attention") or None,
        },
        FIXED,
        where,
    )
    widths = setting(config, "block_out_channels", where)
    down = setting(config, "down_block_types", where)
    kinds = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    if not set(down) <= kinds.keys():
        raise Refused(
            f"{where}: down_block_types={down} is not supported, expected {' or '.join(kinds)}"
        )
    fixed(config, {"up_block_types": [kinds[kind] for kind in reversed(down)]}, where)
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle not in ("UNetMidBlock2DCrossAttn", None):
        raise Refused(
            f"{where}: mid_block_type={middle!r} is not supported, expected 'UNetMidBlock2DCrossAttn' or null"
        )
    kind = config.get("addition_embed_type")
    if kind not in ("text_time", None):
        raise Refused(
            f"{where}: addition_embed_type={kind!r} is not supported, expected 'text_time' or null"
        )
    depths = _each(config, "transformer_layers_per_block", 1, len(widths), where)
    extra = setting(config, "in_channels", where) - setting(config, "out_channels", where)
    if extra < 0:
        raise Refused(
            f"{where}: out_channels={config['out_channels']} is more than in_channels={config['in_channels']}"
        )
    size_dim = setting(config, "addition_time_embed_dim", where) if kind else 0
    return UNet(
        size=config.get("sample_size") or UNet.size,
        channels=config["out_channels"],
        image_channels=extra,
        widths=tuple(widths),
        layers=_same(config, "layers_per_block", 2, len(widths), where),
        depths=tuple(
            depth if kind == "CrossAttnDownBlock2D" else 0 for depth, kind in zip(depths, down)
        ),
        mid_depth=depths[-1] if middle else 0,
        heads=tuple(_each(config, "attention_head_dim", 8, len(widths), where)),
        text_dim=_same(config, "cross_attention_dim", 1280, len(widths), where),
        pooled_dim=setting(config, "projection_class_embeddings_input_dim", where) - 6 * size_dim
        if kind
        else 0,
        size_dim=size_dim,
        guidance_dim=config.get("time_cond_proj_dim") or 0,
        groups=config.get("norm_num_groups", 32),
        matrices=config.get("use_linear_projection", False),
    )


def _each(config: dict[str, Any], key: str, default: int, count: int, where: Path) -> list[int]:
    """One number a level, from a list or one number for all."""
    value = config.get(key, default)
    value = value if isinstance(value, list) else [value] * count
    if len(value) != count or not all(isinstance(n, int) for n in value):
        raise Refused(
            f"{where}: {key}={value} is not supported, expected one whole number or {count}"
        )
    return value


def _same(config: dict[str, Any], key: str, default: int, count: int, where: Path) -> int:
    value = _each(config, key, default, count, where)
    if len(set(value)) > 1:
        raise Refused(f"{where}: {key}={value} is not supported, expected the same at every level")
    return value[0]


def write(cfg: UNet) -> dict[str, dict[str, Any]]:
    if cfg.mid_depth and cfg.depths[-1] not in (0, cfg.mid_depth):
        raise Refused(
            f"UNet2DConditionModel: depths={cfg.depths} end in another number than mid_depth={cfg.mid_depth}"
        )
    kind = lambda way, depth: f"CrossAttn{way}Block2D" if depth else f"{way}Block2D"
    config = {
        "_class_name": FAMILY.name,
        "sample_size": cfg.size,
        "in_channels": cfg.channels + cfg.image_channels,
        "out_channels": cfg.channels,
        "down_block_types": [kind("Down", depth) for depth in cfg.depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if cfg.mid_depth else None,
        "up_block_types": [kind("Up", depth) for depth in reversed(cfg.depths)],
        "block_out_channels": list(cfg.widths),
        "layers_per_block": cfg.layers,
        "transformer_layers_per_block": [
            *(depth or 1 for depth in cfg.depths[:-1]),
            cfg.mid_depth or cfg.depths[-1] or 1,
        ],
        "attention_head_dim": list(cfg.heads),  # diffusers' name for the number of heads
        "cross_attention_dim": cfg.text_dim,
        "norm_num_groups": cfg.groups,
        "use_linear_projection": cfg.matrices,
        "upcast_attention": True,  # scores and softmax in float32, as ours are
        "addition_embed_type": "text_time" if cfg.pooled_dim else None,
        "addition_time_embed_dim": cfg.size_dim or None,
        "projection_class_embeddings_input_dim": cfg.pooled_dim + 6 * cfg.size_dim
        if cfg.pooled_dim
        else None,
        "time_cond_proj_dim": cfg.guidance_dim or None,
        **FIXED,
    }
    return {"config.json": config}


FAMILY = Family(
    name="UNet2DConditionModel",
    library="diffusers",
    config=UNet,
    kinds={
        **{
            key: either(WIDTH, several(WIDTH, 1))
            for key in ("attention_head_dim", "cross_attention_dim")
        },
        "layers_per_block": either(BLOCKS, several(BLOCKS, 1)),
    },
    read=read,
    write=write,
    table=table,
    free=("sample_size",),
    call="model({x}, {t}, encoder_hidden_states=cond).sample",
    given="cond = torch.randn(2, 77, {text_dim})  # in its place, the text encoder's states of the prompts",
    component="unet",
)
