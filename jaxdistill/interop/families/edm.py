"""`SongUNet` and `DhariwalUNet` of EDM's repository (NVlabs/edm), under the names they have inside
`EDMPrecond`.

EDM publishes pickles of whole Python objects. They are not opened here; `convert` gives the command
that makes a folder of one: `model.safetensors` with the weights, and `config.json` with the class
as `_class_name` and the arguments it was built with, each under the name that
`training/networks.py` has for it. A missing argument has its default there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.interop.tables import (
    CONV,
    POINT,
    Family,
    Row,
    fixed,
    linear,
    literal,
    norm,
    setting,
    shell,
)
from jaxdistill.models.denoisers.edm import DhariwalUNet, EDMUNet, SongUNet

DEFAULTS = {
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "resample_filter": [1, 1],
    },
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}
SHARED = {"label_dim": 0, "augment_dim": 0, "channel_mult_emb": 4}
LOADS = """import json
from pathlib import Path
from safetensors.torch import load_file
from training.networks import {0}  # of github.com/NVlabs/edm
folder = Path(".")
settings = json.loads((folder / "config.json").read_text())
model = {0}(**{{key: value for key, value in settings.items() if key != "_class_name"}}).eval()
model.load_state_dict({{name.removeprefix("model."): w for name, w in load_file(folder / "model.safetensors").items()}})"""
ENCODERS = ("standard", "residual")
WAVES = ("positional", "fourier")


def convert(pickled: Path) -> str:
    """The command that turns a pickle of EDM into a folder that we read; it runs in a clone of its
    repository, with torch.
    """
    folder = pickled.with_suffix("")
    source, out, weights, config = map(
        literal, (pickled, folder, folder / "model.safetensors", folder / "config.json")
    )
    return shell(
        "import json, os, pickle; from safetensors.torch import save_file; "
        f'net = pickle.load(open({source}, "rb"))["ema"]; os.makedirs({out}, exist_ok=True); '
        f"save_file({{k: v.contiguous() for k, v in net.state_dict().items()}}, {weights}); "
        f'json.dump({{"_class_name": type(net.model).__name__, **net.model.init_kwargs}}, open({config}, "w"))'
    )


def table(cfg: EDMUNet) -> tuple[Row, ...]:
    return tuple(_rows(cfg))


def _rows(cfg: EDMUNet) -> Iterator[Row]:
    song = isinstance(cfg, SongUNet)
    top = len(cfg.multiples) - 1
    if song and cfg.time_embedding == "fourier":
        yield Row("frequencies", "model.map_noise.freqs")
    if cfg.classes:
        yield from linear("label", "model.map_label", bias=song)
    if cfg.augment_dim:
        yield from linear("augment", "model.map_augment", bias=False)
    yield from (row for i in (0, 1) for row in linear(f"layer{i}", f"model.map_layer{i}"))
    at = lambda half, level: f"model.{half}.{cfg.size >> level}x{cfg.size >> level}_"
    yield from linear("conv_in", at("enc", 0) + "conv", CONV)
    now = cfg.width if song else cfg.widths[0]
    for i, width in enumerate(cfg.widths):
        if i:
            yield from _block(f"down/{i}/move", at("enc", i) + "down", skip=cfg.project)
            if song and cfg.residual:
                yield from linear(f"down/{i}/image", at("enc", i) + "aux_residual", CONV)
        for j in range(cfg.blocks):
            yield from _block(
                f"down/{i}/blocks/{j}",
                at("enc", i) + f"block{j}",
                skip=now != width,
                attend=cfg.attends(i),
            )
            now = width
    for j in (0, 1):
        yield from _block(f"mid/{j}", at("dec", top) + f"in{j}", attend=j == 0)
    for place, i in enumerate(reversed(range(top + 1))):
        if place:
            yield from _block(f"up/{place}/move", at("dec", i) + "up", skip=cfg.project)
        for j in range(cfg.blocks + 1):
            attend = cfg.attends(i) and (cfg.all_up or j == cfg.blocks)
            yield from _block(
                f"up/{place}/blocks/{j}", at("dec", i) + f"block{j}", skip=True, attend=attend
            )
    out = at("dec", 0) + "aux_" if song else "model.out_"
    yield from norm("norm_out", out + "norm")
    yield from linear("conv_out", out + "conv", CONV)


def _block(path: str, name: str, *, skip: bool = False, attend: bool = False) -> Iterator[Row]:
    for i in (0, 1):
        yield from norm(f"{path}/norm{i}", f"{name}.norm{i}")
        yield from linear(f"{path}/conv{i}", f"{name}.conv{i}", CONV)
    yield from linear(f"{path}/affine", f"{name}.affine")
    if skip:
        yield from linear(f"{path}/skip", f"{name}.skip", CONV)
    if attend:
        yield from norm(f"{path}/norm2", f"{name}.norm2")
        yield from (
            row
            for part in ("qkv", "proj")
            for row in linear(f"{path}/{part}", f"{name}.{part}", POINT)
        )


def constants(cfg: EDMUNet) -> dict[str, np.ndarray]:
    """The filters that PyTorch's classes keep beside the weights of every change of resolution."""
    kernel = (np.outer(cfg.filter, cfg.filter) / sum(cfg.filter) ** 2).astype(np.float32)[
        None, None
    ]
    found = {}
    for row in _rows(cfg):
        head, _, end = row.name.rpartition(".")
        move = head.rpartition(".")[0]
        if end == "weight" and head.endswith(".conv0") and move.endswith(("_down", "_up")):
            found |= {f"{move}.{part}.resample_filter": kernel for part in ("conv0", "skip")}
        elif end == "weight" and head.endswith("_aux_residual"):
            found[f"{head}.resample_filter"] = kernel
    return found


def read(config: dict[str, Any], folder: Path) -> EDMUNet:
    where = folder / "config.json"
    name = config["_class_name"]
    channels = setting(config, "in_channels", where)
    fixed(config, {"out_channels": channels, "decoder_type": "standard"}, where)
    get = lambda key: config.get(key, (SHARED | DEFAULTS[name])[key])
    sizes = dict(
        size=setting(config, "img_resolution", where),
        channels=channels,
        classes=get("label_dim"),
        augment_dim=get("augment_dim"),
        width=get("model_channels"),
        multiples=tuple(get("channel_mult")),
        emb_multiple=get("channel_mult_emb"),
        blocks=get("num_blocks"),
        attention=tuple(get("attn_resolutions")),
    )
    if name == "DhariwalUNet":
        return DhariwalUNet(**sizes, head_dim=config.get("channels_per_head", 64))
    if get("encoder_type") not in ENCODERS:
        raise Refused(
            f"{where}: encoder_type={get('encoder_type')!r} is not supported, expected {' or '.join(map(repr, ENCODERS))}"
        )
    if get("embedding_type") not in WAVES:
        raise Refused(
            f"{where}: embedding_type={get('embedding_type')!r} is not supported, expected {' or '.join(map(repr, WAVES))}"
        )
    filter = tuple(get("resample_filter"))
    if filter != filter[::-1] or len(filter) % 2:
        raise Refused(
            f"{where}: resample_filter={list(filter)} is not supported, expected an even number of mirrored weights"
        )
    return SongUNet(
        **sizes,
        time_embedding=get("embedding_type"),
        noise_multiple=get("channel_mult_noise"),
        residual=get("encoder_type") == "residual",
        filter=filter,
    )


def write(cfg: EDMUNet) -> dict[str, dict[str, Any]]:
    config = {
        "_class_name": type(cfg).__name__,
        "img_resolution": cfg.size,
        "in_channels": cfg.channels,
        "out_channels": cfg.channels,
        "label_dim": cfg.classes,
        "augment_dim": cfg.augment_dim,
        "model_channels": cfg.width,
        "channel_mult": list(cfg.multiples),
        "channel_mult_emb": cfg.emb_multiple,
        "num_blocks": cfg.blocks,
        "attn_resolutions": list(cfg.attention),
    }
    if isinstance(cfg, SongUNet):
        config |= {
            "embedding_type": cfg.time_embedding,
            "channel_mult_noise": cfg.noise_multiple,
            "encoder_type": "residual" if cfg.residual else "standard",
            "decoder_type": "standard",
            "resample_filter": list(cfg.filter),
        }
    elif cfg.head_dim != 64:  # PyTorch's class has no such argument
        config["channels_per_head"] = cfg.head_dim
    return {"config.json": config}


SONG, DHARIWAL = (
    Family(
        name=config.__name__,
        library="edm",
        config=config,
        read=read,
        write=write,
        table=table,
        ignored=(r".*\.resample_filter",),
        call="model({x}, {t}, cond)",
        given="cond = torch.eye(4, {classes})  # labels, each a row with a single 1",
        loads=LOADS.format(config.__name__),
        adapters=False,
        constants=constants,
        convert=convert,
    )
    for config in (SongUNet, DhariwalUNet)
)
