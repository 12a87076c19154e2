"""`AutoencoderDC` of diffusers: the deep-compression autoencoder of SANA (dc-ae-f32c32-sana-1.0).

The autoencoders that the paper itself released (-in-1.0, -mix-1.0) have batch norms in their
decoders, which ours lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.core.types import lookup
from jaxdistill.interop.tables import CONV, POINT, Family, Layout, Row, fixed, linear, norm, setting
from jaxdistill.models.autoencoders.vae_dc import ACTS, DCAE, GROWS, SHRINKS

BLOCKS = {"ResBlock": False, "EfficientViTBlock": True}  # -> whether they attend
NORM = "rms_norm"
SHRINK = {name: name for name in SHRINKS} | {
    "Conv": "conv"
}  # so in SANA's pipelines; the class takes every other name for "conv" too
# a 1x1 convolution of groups of equal size, here a matrix each: [groups*out in 1 1] <-> [groups in
# out]
GROUPS = Layout(
    lambda w: w.reshape(-1, w.shape[1], w.shape[1]).transpose(0, 2, 1),
    lambda w: w.transpose(0, 2, 1).reshape(-1, w.shape[1], 1, 1),
)


def table(cfg: DCAE) -> tuple[Row, ...]:
    return tuple(_rows(cfg))


def _rows(cfg: DCAE) -> Iterator[Row]:
    for half, way, pixels in (("encoder", "down", "conv_in"), ("decoder", "up", "conv_out")):
        levels = cfg.levels(half)
        for end in ("conv_in", "conv_out"):
            jumps = end == pixels and not levels[0].layers
            yield from linear(
                f"{half}/{end}" + "/conv" * jumps, f"{half}.{end}" + ".conv" * jumps, CONV
            )
        for i, level in enumerate(levels):
            ours = f"{half}/levels/{i}"
            theirs = f"{half}.{way}_blocks.{i}"
            moves = level.layers > 0 and i < len(levels) - 1
            before = (
                moves and half == "decoder"
            )  # the change of resolution stands in one list with the blocks
            for j in range(level.layers):
                for row in _attends(len(level.scales)) if level.attention else RESIDUAL:
                    yield Row(
                        f"{ours}/blocks/{j}/{row.path}",
                        f"{theirs}.{j + before}.{row.name}",
                        row.layout,
                    )
            if moves:
                yield from linear(
                    f"{ours}/resample/conv", f"{theirs}.{0 if before else level.layers}.conv", CONV
                )
    yield from norm("decoder/norm_out", "decoder.norm_out")


RESIDUAL = (
    *linear("conv1", "conv1", CONV),
    *linear("conv2", "conv2", CONV, bias=False),
    *norm("norm", "norm"),
)


def _attends(scales: int) -> Iterator[Row]:
    for part in ("to_q", "to_k", "to_v", "to_out"):
        yield from linear(f"attention/{part}", f"attn.{part}", bias=False)
    for s in range(scales):
        yield from linear(
            f"attention/scales/{s}/depth", f"attn.to_qkv_multiscale.{s}.proj_in", CONV, bias=False
        )
        yield Row(
            f"attention/scales/{s}/point", f"attn.to_qkv_multiscale.{s}.proj_out.weight", GROUPS
        )
    yield from norm("attention/norm_out", "attn.norm_out")
    yield from linear("gated/up", "conv_out.conv_inverted", POINT)
    yield from linear("gated/depth", "conv_out.conv_depth", CONV)
    yield from linear("gated/down", "conv_out.conv_point", POINT, bias=False)
    yield from norm("gated/norm", "conv_out.norm")


def read(config: dict[str, Any], folder: Path) -> DCAE:
    where = folder / "config.json"

    def known(key: str, default: str, names: Mapping[str, Any], count: int = 1) -> tuple[Any, ...]:
        """What the names under `key` mean to us; the class takes one name for all of `count`
        levels. Raises Refused on another.
        """
        given = config.get(key, default)
        given = (given,) * count if isinstance(given, str) else given
        return tuple(lookup(names, name, f"{where}: {key}") for name in given)

    def half(name: str) -> dict[str, Any]:
        widths = tuple(setting(config, f"{name}_block_out_channels", where))
        return {
            f"{name}_widths": widths,
            f"{name}_layers": tuple(setting(config, f"{name}_layers_per_block", where)),
            f"{name}_attention": known(f"{name}_block_types", "ResBlock", BLOCKS, len(widths)),
            f"{name}_scales": setting(config, f"{name}_qkv_multiscales", where),
        }

    halves = half("encoder") | half("decoder")
    count = len(halves["decoder_widths"])
    norms = [NORM] * count if isinstance(config.get("decoder_norm_types"), list) else NORM
    fixed(config, {"decoder_norm_types": norms}, where)
    return DCAE(
        channels=config.get("in_channels", 3),
        latents=setting(config, "latent_channels", where),
        head_dim=config.get("attention_head_dim", 32),
        **halves,
        decoder_acts=known("decoder_act_fns", "silu", {name: name for name in ACTS}, count),
        shrink=known("downsample_block_type", "pixel_unshuffle", SHRINK)[0],
        grow=known("upsample_block_type", "pixel_shuffle", {name: name for name in GROWS})[0],
        shortcut_out=config.get("encoder_out_shortcut", True),
        shortcut_in=config.get("decoder_in_shortcut", True),
        act_out=known("decoder_conv_act_fn", "relu", {name: name for name in ACTS})[0],
        scale=config.get("scaling_factor", 1.0),
    )


def write(cfg: DCAE) -> dict[str, dict[str, Any]]:
    kinds = {attends: kind for kind, attends in BLOCKS.items()}
    half = lambda name, widths, layers, attention, scales: {
        f"{name}_block_out_channels": list(widths),
        f"{name}_layers_per_block": list(layers),
        f"{name}_block_types": [kinds[attends] for attends in attention],
        f"{name}_qkv_multiscales": [list(sizes) for sizes in scales],
    }
    config = {
        "_class_name": FAMILY.name,
        "in_channels": cfg.channels,
        "latent_channels": cfg.latents,
        "attention_head_dim": cfg.head_dim,
        **half(
            "encoder",
            cfg.encoder_widths,
            cfg.encoder_layers,
            cfg.encoder_attention,
            cfg.encoder_scales,
        ),
        **half(
            "decoder",
            cfg.decoder_widths,
            cfg.decoder_layers,
            cfg.decoder_attention,
            cfg.decoder_scales,
        ),
        "decoder_norm_types": NORM,
        "decoder_act_fns": list(cfg.decoder_acts),
        "downsample_block_type": cfg.shrink,
        "upsample_block_type": cfg.grow,
        "encoder_out_shortcut": cfg.shortcut_out,
        "decoder_in_shortcut": cfg.shortcut_in,
        "decoder_conv_act_fn": cfg.act_out,
        "scaling_factor": cfg.scale,
    }
    return {"config.json": config}


FAMILY = Family(
    name="AutoencoderDC", library="diffusers", config=DCAE, read=read, write=write, table=table
)
