"""`AutoencoderKL` of diffusers: the image autoencoders of Stable Diffusion 1 to 3, SDXL and
FLUX.1.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxdistill.interop.families.unet import resnet
from jaxdistill.interop.keys import (
    Field,
    Fixed,
    Implied,
    Written,
    listed,
    optional,
    same,
)
from jaxdistill.interop.tables import CONV, Family, Row, linear, norm
from jaxdistill.models.autoencoders.vae import VAE

KEYS = (
    Field(field="size", key="sample_size", missing=32, null=32),
    same("channels", "in_channels"),
    Implied("out_channels", lambda ours: ours.channels),
    same("latents", "latent_channels"),
    Implied(
        "down_block_types", lambda ours: ["DownEncoderBlock2D"] * len(ours.widths)
    ),
    Implied("up_block_types", lambda ours: ["UpDecoderBlock2D"] * len(ours.widths)),
    listed("widths", "block_out_channels"),
    same("layers", "layers_per_block", missing=1),
    same("groups", "norm_num_groups", missing=32),
    same("attention", "mid_block_add_attention", missing=True),
    same("quant", "use_quant_conv", missing=True),
    same("post_quant", "use_post_quant_conv", missing=True),
    same("scale", "scaling_factor", missing=0.18215),
    optional("shift", "shift_factor", none=0.0),
    # a hint to pipelines in float16, where the large activations of SDXL's overflow
    Written("force_upcast", True),
    Fixed("act_fn", "silu"),
    Fixed("latents_mean", None),
    Fixed("latents_std", None),
)


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
        yield from resnet(
            f"{half}/mid/before", f"{half}.mid_block.resnets.0", 1, 1, emb=False
        )
        yield from resnet(
            f"{half}/mid/after", f"{half}.mid_block.resnets.1", 1, 1, emb=False
        )
        if cfg.attention:
            ours = f"{half}/mid/attention"
            theirs = f"{half}.mid_block.attentions.0"
            yield from norm(f"{ours}/norm", f"{theirs}.group_norm")
            for part, name in (
                ("q", "to_q"),
                ("k", "to_k"),
                ("v", "to_v"),
                ("out", "to_out.0"),
            ):
                yield from linear(f"{ours}/to_{part}", f"{theirs}.{name}")
        yield from norm(f"{half}/norm_out", f"{half}.conv_norm_out")
        yield from linear(f"{half}/conv_out", f"{half}.conv_out", CONV)
    if cfg.quant:
        yield from linear("quant", "quant_conv", CONV)
    if cfg.post_quant:
        yield from linear("post_quant", "post_quant_conv", CONV)


FAMILY = Family(
    name="AutoencoderKL",
    library="diffusers",
    config=VAE,
    keys=KEYS,
    table=table,
    renamed=(  # in files of 2022
        (r"\.query\.", ".to_q."),
        (r"\.key\.", ".to_k."),
        (r"\.value\.", ".to_v."),
        (r"\.proj_attn\.", ".to_out.0."),
    ),
    free=("sample_size",),
)
