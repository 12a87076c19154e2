"""`AutoencoderKLWan` and `AutoencoderKLQwenImage` of diffusers: the autoencoders of Wan 2.1 (also
2.2 A14B) and Qwen-Image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused
from jaxdistill.interop.tables import CONV, POINT, Family, Layout, Row, fixed, linear, setting
from jaxdistill.models.autoencoders.vae_wan import QwenImageVAE, WanVAE

FIXED = {"attn_scales": [], "dropout": 0.0}
WAN = {
    "is_residual": False,
    "patch_size": None,
}  # what the autoencoder of Wan 2.2 TI2V 5B has, and ours not
GAINS = {
    n: Layout(lambda w: w.reshape(-1), lambda w, n=n: w.reshape(-1, *[1] * n)) for n in (2, 3)
}  # [C 1 ...] <-> [C]


def table(cfg: WanVAE) -> tuple[Row, ...]:
    return tuple(_rows(cfg))


def _rows(cfg: WanVAE) -> Iterator[Row]:
    last = len(cfg.multiples) - 1
    now = 1
    yield from linear("encoder/conv_in", "encoder.conv_in", CONV)
    # in PyTorch's encoder, the blocks and changes of resolution of all levels stand in one list
    place = 0
    for i, m in enumerate(cfg.multiples):
        for j in range(cfg.blocks):
            yield from _block(
                f"encoder/levels/{i}/blocks/{j}", f"encoder.down_blocks.{place}", shortcut=now != m
            )
            now = m
            place = place + 1
        if i < last:
            yield from _move(f"encoder/levels/{i}", f"encoder.down_blocks.{place}", cfg.temporal[i])
            place += 1
    yield from _ends("encoder")
    yield from linear("decoder/conv_in", "decoder.conv_in", CONV)
    now = 2 * cfg.multiples[-1]
    for i, m in enumerate(cfg.multiples[::-1]):
        for j in range(cfg.blocks + 1):
            name = f"decoder.up_blocks.{i}.resnets.{j}"
            yield from _block(
                f"decoder/levels/{i}/blocks/{j}", name, shortcut=now != 2 * m if j == 0 else False
            )
        now = m
        if i < last:
            yield from _move(
                f"decoder/levels/{i}", f"decoder.up_blocks.{i}.upsamplers.0", cfg.temporal[::-1][i]
            )
    yield from _ends("decoder")
    yield from linear("quant", "quant_conv", CONV)
    yield from linear("post_quant", "post_quant_conv", CONV)


def _block(path: str, name: str, shortcut: bool = False) -> Iterator[Row]:
    for i in (1, 2):
        yield Row(f"{path}/norm{i}/scale", f"{name}.norm{i}.gamma", GAINS[3])
        yield from linear(f"{path}/conv{i}", f"{name}.conv{i}", CONV)
    if shortcut:
        yield from linear(f"{path}/shortcut", f"{name}.conv_shortcut", CONV)


def _move(path: str, name: str, temporal: bool) -> Iterator[Row]:
    yield from linear(f"{path}/resample/conv", f"{name}.resample.1", CONV)
    if temporal:
        yield from linear(f"{path}/time", f"{name}.time_conv", CONV)


def _ends(half: str) -> Iterator[Row]:
    """The middle, and what follows the last level or leads to the latents."""
    for i, ours in enumerate(("before", "after")):
        yield from _block(f"{half}/mid/{ours}", f"{half}.mid_block.resnets.{i}")
    yield Row(
        f"{half}/mid/attention/norm/scale", f"{half}.mid_block.attentions.0.norm.gamma", GAINS[2]
    )
    yield from linear(f"{half}/mid/attention/qkv", f"{half}.mid_block.attentions.0.to_qkv", POINT)
    yield from linear(f"{half}/mid/attention/proj", f"{half}.mid_block.attentions.0.proj", POINT)
    yield Row(f"{half}/norm_out/scale", f"{half}.norm_out.gamma", GAINS[3])
    yield from linear(f"{half}/conv_out", f"{half}.conv_out", CONV)


def _sizes(config: dict[str, Any], where: Path) -> dict[str, Any]:
    get = lambda key: setting(config, key, where)
    fixed(config, FIXED, where)
    return dict(
        latents=get("z_dim"),
        width=get("base_dim"),
        multiples=tuple(get("dim_mult")),
        blocks=get("num_res_blocks"),
        temporal=tuple(get("temperal_downsample")),
        mean=tuple(get("latents_mean")),
        std=tuple(get("latents_std")),
    )


def read(config: dict[str, Any], folder: Path) -> WanVAE:
    where = folder / "config.json"
    channels = config.get("in_channels", 3)
    fixed(config, WAN | {"out_channels": channels}, where)
    return WanVAE(
        **_sizes(config, where),
        channels=channels,
        decoder_width=config.get("decoder_base_dim") or 0,
    )


def read_qwen(config: dict[str, Any], folder: Path) -> QwenImageVAE:
    return QwenImageVAE(
        **_sizes(config, folder / "config.json"), channels=config.get("input_channels", 3)
    )


def write(cfg: WanVAE) -> dict[str, dict[str, Any]]:
    config = {
        "base_dim": cfg.width,
        "z_dim": cfg.latents,
        "dim_mult": list(cfg.multiples),
        "num_res_blocks": cfg.blocks,
        "temperal_downsample": list(cfg.temporal),  # diffusers' spelling
        "latents_mean": list(cfg.mean),
        "latents_std": list(cfg.std),
        **FIXED,
    }
    if isinstance(cfg, QwenImageVAE):
        if cfg.decoder_width:
            raise Refused(
                f"{QWEN.name} has one width for both halves, not decoder_width={cfg.decoder_width}"
            )
        return {"config.json": {"_class_name": QWEN.name, **config, "input_channels": cfg.channels}}
    own = {
        "decoder_base_dim": cfg.decoder_width or None,
        "in_channels": cfg.channels,
        "out_channels": cfg.channels,
        "scale_factor_temporal": 2 ** sum(cfg.temporal),
        "scale_factor_spatial": 2 ** len(cfg.temporal),
        **WAN,
    }
    return {"config.json": {"_class_name": FAMILY.name, **config, **own}}


FAMILY = Family(
    name="AutoencoderKLWan", library="diffusers", config=WanVAE, read=read, write=write, table=table
)
QWEN = Family(
    name="AutoencoderKLQwenImage",
    library="diffusers",
    config=QwenImageVAE,
    read=read_qwen,
    write=write,
    table=table,
)
