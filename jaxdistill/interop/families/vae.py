"""`AutoencoderKL` of diffusers: the image autoencoders of Stable Diffusion 1 to 3, SDXL and FLUX.1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.interop.families.unet import resnet
from jaxdistill.interop.tables import CONV, Family, Row, fixed, linear, norm, setting
from jaxdistill.models.autoencoders.vae import VAE

FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}


def table(cfg: VAE) -> tuple[Row, ...]:
    return tuple(_rows(cfg))


def _rows(cfg: VAE) -> Iterator[Row]:
    last = len(cfg.widths) - 1
    for half, widths, count, way in (
        ("encoder", cfg.widths, cfg.layers, "down"),
        ("decoder", cfg.widths[::-1], cfg.layers + 1, "up"),
    ):
        yield from linear(f"{half}/conv_in", f"{half}.conv_in", CONV)
        for i, width in enumerate(widths):
            for j in range(count):
                before = widths[max(i - 1, 0)] if j == 0 else width
                yield from resnet(
                    f"{half}/levels/{i}/resnets/{j}",
                    f"{half}.{way}_blocks.{i}.resnets.{j}",
                    before,
                    width,
                    emb=False,
                )
            if i < last:
                yield from linear(
                    f"{half}/levels/{i}/resample/conv",
                    f"{half}.{way}_blocks.{i}.{way}samplers.0.conv",
                    CONV,
                )
        yield from resnet(f"{half}/mid/before", f"{half}.mid_block.resnets.0", 1, 1, emb=False)
        yield from resnet(f"{half}/mid/after", f"{half}.mid_block.resnets.1", 1, 1, emb=False)
        if cfg.attention:
            ours = f"{half}/mid/attention"
            theirs = f"{half}.mid_block.attentions.0"
            yield from norm(f"{ours}/norm", f"{theirs}.group_norm")
            for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
                yield from linear(f"{ours}/to_{part}", f"{theirs}.{name}")
        yield from norm(f"{half}/norm_out", f"{half}.conv_norm_out")
        yield from linear(f"{half}/conv_out", f"{half}.conv_out", CONV)
    if cfg.quant:
        yield from linear("quant", "quant_conv", CONV)
    if cfg.post_quant:
        yield from linear("post_quant", "post_quant_conv", CONV)


def read(config: dict[str, Any], folder: Path) -> VAE:
    where = folder / "config.json"
    widths = setting(config, "block_out_channels", where)
    channels = setting(config, "in_channels", where)
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    fixed(config, FIXED | kinds | {"out_channels": channels}, where)
    return VAE(
        size=config.get("sample_size") or 32,
        channels=channels,
        latents=setting(config, "latent_channels", where),
        widths=tuple(widths),
        layers=config.get("layers_per_block", 1),
        groups=config.get("norm_num_groups", 32),
        attention=config.get("mid_block_add_attention", True),
        quant=config.get("use_quant_conv", True),
        post_quant=config.get("use_post_quant_conv", True),
        scale=config.get("scaling_factor", 0.18215),
        shift=config.get("shift_factor") or 0.0,
    )


def write(cfg: VAE) -> dict[str, dict[str, Any]]:
    config = {
        "_class_name": FAMILY.name,
        "sample_size": cfg.size,
        "in_channels": cfg.channels,
        "out_channels": cfg.channels,
        "latent_channels": cfg.latents,
        "down_block_types": ["DownEncoderBlock2D"] * len(cfg.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(cfg.widths),
        "block_out_channels": list(cfg.widths),
        "layers_per_block": cfg.layers,
        "norm_num_groups": cfg.groups,
        "mid_block_add_attention": cfg.attention,
        "use_quant_conv": cfg.quant,
        "use_post_quant_conv": cfg.post_quant,
        "scaling_factor": cfg.scale,
        "shift_factor": cfg.shift or None,
        # a hint to pipelines in float16, where the large activations of SDXL's overflow
        "force_upcast": True,
        **FIXED,
    }
    return {"config.json": config}


FAMILY = Family(
    name="AutoencoderKL",
    library="diffusers",
    config=VAE,
    read=read,
    write=write,
    table=table,
    renamed=(
        (r"\.query\.", ".to_q."),
        (r"\.key\.", ".to_k."),
        (r"\.value\.", ".to_v."),
        (r"\.proj_attn\.", ".to_out.0."),
    ),  # of 2022
    free=("sample_size",),
)
