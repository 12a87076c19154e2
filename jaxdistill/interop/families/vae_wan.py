"""`AutoencoderKLWan` and `AutoencoderKLQwenImage` of diffusers: the autoencoders of Wan 2.1 (also
2.2 A14B) and Qwen-Image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxdistill.core.types import Refused
from jaxdistill.interop.keys import Fixed, Implied, Written, listed, optional, same
from jaxdistill.interop.tables import CONV, POINT, Family, Layout, Row, linear
from jaxdistill.models.autoencoders.vae_wan import QwenImageVAE, WanVAE

SHARED = (
    same("width", "base_dim"),
    same("latents", "z_dim"),
    listed("multiples", "dim_mult"),
    same("blocks", "num_res_blocks"),
    listed("temporal", "temperal_downsample"),  # diffusers' spelling
    listed("mean", "latents_mean"),
    listed("std", "latents_std"),
    Fixed("attn_scales", []),
    Fixed("dropout", 0.0),
)
WAN_KEYS = (
    *SHARED,
    optional("decoder_width", "decoder_base_dim"),
    same("channels", "in_channels", missing=3),
    Implied("out_channels", lambda ours: ours.channels),
    Written("scale_factor_temporal", lambda ours: 2 ** sum(ours.temporal)),
    Written("scale_factor_spatial", lambda ours: 2 ** len(ours.temporal)),
    # parts of the autoencoder of Wan 2.2 TI2V 5B, which ours lacks
    Fixed("is_residual", False),
    Fixed("patch_size", None),
)
QWEN_KEYS = (*SHARED, same("channels", "input_channels", missing=3))


def _gain(axes: int) -> Layout:
    """The gain of a norm, [C 1 ...] <-> [C], with as many axes of length 1."""
    return Layout(lambda w: w.reshape(-1), lambda w: w.reshape(-1, *[1] * axes))


GAINS = {2: _gain(2), 3: _gain(3)}


def table(cfg: WanVAE) -> tuple[Row, ...]:
    return tuple(_rows(cfg))


def _rows(cfg: WanVAE) -> Iterator[Row]:
    yield from _encoder(cfg)
    yield from _decoder(cfg)
    yield from linear("quant", "quant_conv", CONV)
    yield from linear("post_quant", "post_quant_conv", CONV)


def _encoder(cfg: WanVAE) -> Iterator[Row]:
    last = len(cfg.multiples) - 1
    yield from linear("encoder/conv_in", "encoder.conv_in", CONV)
    place = 0  # PyTorch has the blocks and changes of resolution of all levels in one list
    before = 1
    for i, multiple in enumerate(cfg.multiples):
        ours = f"encoder/levels/{i}"
        for j in range(cfg.blocks):
            name = f"encoder.down_blocks.{place}"
            yield from _block(
                f"{ours}/blocks/{j}", name, shortcut=before != multiple
            )
            before = multiple
            place += 1
        if i < last:
            yield from _move(ours, f"encoder.down_blocks.{place}", cfg.temporal[i])
            place += 1
    yield from _ends("encoder")


def _decoder(cfg: WanVAE) -> Iterator[Row]:
    last = len(cfg.multiples) - 1
    temporal = cfg.temporal[::-1]
    yield from linear("decoder/conv_in", "decoder.conv_in", CONV)
    inputs = 2 * cfg.multiples[-1]
    for i, multiple in enumerate(cfg.multiples[::-1]):
        ours = f"decoder/levels/{i}"
        theirs = f"decoder.up_blocks.{i}"
        for j in range(cfg.blocks + 1):
            shortcut = j == 0 and inputs != 2 * multiple
            yield from _block(
                f"{ours}/blocks/{j}", f"{theirs}.resnets.{j}", shortcut
            )
        inputs = multiple
        if i < last:
            yield from _move(ours, f"{theirs}.upsamplers.0", temporal[i])
    yield from _ends("decoder")


def _block(path: str, name: str, shortcut: bool = False) -> Iterator[Row]:
    """A residual block."""
    for i in (1, 2):
        yield Row(f"{path}/norm{i}/scale", f"{name}.norm{i}.gamma", GAINS[3])
        yield from linear(f"{path}/conv{i}", f"{name}.conv{i}", CONV)
    if shortcut:
        yield from linear(f"{path}/shortcut", f"{name}.conv_shortcut", CONV)


def _move(path: str, name: str, temporal: bool) -> Iterator[Row]:
    """A change of resolution, with `temporal` of the number of frames too."""
    yield from linear(f"{path}/resample/conv", f"{name}.resample.1", CONV)
    if temporal:
        yield from linear(f"{path}/time", f"{name}.time_conv", CONV)


def _ends(half: str) -> Iterator[Row]:
    """The middle of a half, and its last norm and convolution."""
    yield from _block(f"{half}/mid/before", f"{half}.mid_block.resnets.0")
    yield from _block(f"{half}/mid/after", f"{half}.mid_block.resnets.1")
    ours = f"{half}/mid/attention"
    theirs = f"{half}.mid_block.attentions.0"
    yield Row(f"{ours}/norm/scale", f"{theirs}.norm.gamma", GAINS[2])
    yield from linear(f"{ours}/qkv", f"{theirs}.to_qkv", POINT)
    yield from linear(f"{ours}/proj", f"{theirs}.proj", POINT)
    yield Row(f"{half}/norm_out/scale", f"{half}.norm_out.gamma", GAINS[3])
    yield from linear(f"{half}/conv_out", f"{half}.conv_out", CONV)


def _one_width(ours: QwenImageVAE) -> dict[str, Any]:
    """No further files. Raises Refused where the decoder has a width of its own."""
    if ours.decoder_width:
        raise Refused(
            f"{QWEN.name} has one width for both halves, not decoder_width={ours.decoder_width}"
        )
    return {}


FAMILY = Family(
    name="AutoencoderKLWan",
    library="diffusers",
    config=WanVAE,
    keys=WAN_KEYS,
    table=table,
)
QWEN = Family(
    name="AutoencoderKLQwenImage",
    library="diffusers",
    config=QwenImageVAE,
    keys=QWEN_KEYS,
    more_files=_one_width,
    table=table,
)
