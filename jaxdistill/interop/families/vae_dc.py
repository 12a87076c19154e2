"""`AutoencoderDC` of diffusers: the deep-compression autoencoder of SANA (dc-ae-f32c32-sana-1.0).

The autoencoders that the paper itself released (-in-1.0, -mix-1.0) have batch norms in their
decoders, which ours lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxdistill.core.types import lookup
from jaxdistill.interop.keys import (
    Config,
    Field,
    Key,
    Read,
    Written,
    check_value,
    listed,
    named,
    same,
)
from jaxdistill.interop.tables import CONV, POINT, Family, Layout, Row, linear, norm
from jaxdistill.models.autoencoders.vae_dc import (
    ACTS,
    DCAE,
    GROWS,
    SHRINKS,
    LevelSizes,
)


def _names(
    field: str, key: str, names: Mapping[str, Any], missing: str, widths: str
) -> Field:
    """A name for each level, or one for all; {name: what it means to us}.

    `widths` is the key whose list has an element for each level.
    """
    own = {meaning: name for name, meaning in names.items()}

    def read(value: str | list[str], config: Config) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = [value] * len(config[widths])
        return tuple(lookup(names, name, f"{config.file}: {key}") for name in value)

    def write(ours: DCAE) -> list[str]:
        return [own[meaning] for meaning in getattr(ours, field)]

    return Field(field=field, key=key, read=read, write=write, missing=missing)


def _half(half: str) -> tuple[Key, ...]:
    """The keys of encoder or decoder."""
    widths = f"{half}_block_out_channels"
    attends = {"ResBlock": False, "EfficientViTBlock": True}
    return (
        listed(f"{half}_widths", widths),
        listed(f"{half}_layers", f"{half}_layers_per_block"),
        _names(
            f"{half}_attention", f"{half}_block_types", attends, "ResBlock", widths
        ),
        Field(
            field=f"{half}_scales",
            key=f"{half}_qkv_multiscales",
            write=lambda ours: [
                list(sizes) for sizes in getattr(ours, f"{half}_scales")
            ],
        ),
    )


def _check_norms(config: Config) -> None:
    """Raises Refused on norms of the decoder other than RMS norms, of all levels or of each."""
    expected: Any = "rms_norm"
    if isinstance(config.get("decoder_norm_types"), list):
        expected = ["rms_norm"] * len(config["decoder_block_out_channels"])
    check_value(config.values, "decoder_norm_types", expected, config.file)


OWN_ACTS = {name: name for name in ACTS}
OWN_GROWS = {name: name for name in GROWS}
# "Conv" stands in SANA's pipelines; the class takes every other name for "conv" too
OWN_SHRINKS = {name: name for name in SHRINKS} | {"Conv": "conv"}
KEYS = (
    same("channels", "in_channels", missing=3),
    same("latents", "latent_channels"),
    same("head_dim", "attention_head_dim", missing=32),
    *_half("encoder"),
    *_half("decoder"),
    Read("", _check_norms),
    Written("decoder_norm_types", "rms_norm"),
    _names(
        "decoder_acts",
        "decoder_act_fns",
        OWN_ACTS,
        "silu",
        "decoder_block_out_channels",
    ),
    named(
        "shrink", "downsample_block_type", OWN_SHRINKS, missing="pixel_unshuffle"
    ),
    named("grow", "upsample_block_type", OWN_GROWS, missing="pixel_shuffle"),
    same("shortcut_out", "encoder_out_shortcut", missing=True),
    same("shortcut_in", "decoder_in_shortcut", missing=True),
    named("act_out", "decoder_conv_act_fn", OWN_ACTS, missing="relu"),
    same("scale", "scaling_factor", missing=1.0),
)
# A 1x1 convolution of groups of equal size, a matrix of ours for each:
# [groups*out in 1 1] <-> [groups in out]
GROUPS = Layout(
    lambda w: w.reshape(-1, w.shape[1], w.shape[1]).transpose(0, 2, 1),
    lambda w: w.transpose(0, 2, 1).reshape(-1, w.shape[1], 1, 1),
)


def table(cfg: DCAE) -> tuple[Row, ...]:
    return tuple(_rows(cfg))


def _rows(cfg: DCAE) -> Iterator[Row]:
    for half, way, pixels in (
        ("encoder", "down", "conv_in"),
        ("decoder", "up", "conv_out"),
    ):
        levels = cfg.levels(half)
        for end in ("conv_in", "conv_out"):
            if (
                end == pixels and not levels[0].layers
            ):  # it changes the resolution too
                yield from linear(f"{half}/{end}/conv", f"{half}.{end}.conv", CONV)
            else:
                yield from linear(f"{half}/{end}", f"{half}.{end}", CONV)
        for i, level in enumerate(levels):
            is_last = i == len(levels) - 1
            yield from _level(
                f"{half}/levels/{i}", f"{half}.{way}_blocks.{i}", level, is_last
            )
    yield from norm("decoder/norm_out", "decoder.norm_out")


def _level(path: str, name: str, level: LevelSizes, is_last: bool) -> Iterator[Row]:
    """The blocks of a level, and the change of resolution in the same list of PyTorch: behind the
    encoder's blocks, before the decoder's.
    """
    moves = level.layers > 0 and not is_last
    first = 1 if moves and name.startswith("decoder") else 0
    block = tuple(_attends(len(level.scales))) if level.attention else RESIDUAL
    for j in range(level.layers):
        for row in block:
            ours = f"{path}/blocks/{j}/{row.path}"
            yield Row(ours, f"{name}.{first + j}.{row.name}", row.layout)
    if moves:
        place = 0 if first else level.layers
        yield from linear(f"{path}/resample/conv", f"{name}.{place}.conv", CONV)


RESIDUAL = (
    *linear("conv1", "conv1", CONV),
    *linear("conv2", "conv2", CONV, bias=False),
    *norm("norm", "norm"),
)


def _attends(scales: int) -> Iterator[Row]:
    """A block of attention, with the paths and names inside it."""
    for part in ("to_q", "to_k", "to_v", "to_out"):
        yield from linear(f"attention/{part}", f"attn.{part}", bias=False)
    for s in range(scales):
        ours = f"attention/scales/{s}"
        theirs = f"attn.to_qkv_multiscale.{s}"
        yield from linear(f"{ours}/depth", f"{theirs}.proj_in", CONV, bias=False)
        yield Row(f"{ours}/point", f"{theirs}.proj_out.weight", GROUPS)
    yield from norm("attention/norm_out", "attn.norm_out")
    yield from linear("gated/up", "conv_out.conv_inverted", POINT)
    yield from linear("gated/depth", "conv_out.conv_depth", CONV)
    yield from linear("gated/down", "conv_out.conv_point", POINT, bias=False)
    yield from norm("gated/norm", "conv_out.norm")


FAMILY = Family(
    name="AutoencoderDC",
    library="diffusers",
    config=DCAE,
    keys=KEYS,
    table=table,
)
