"""`SongUNet` and `DhariwalUNet` of EDM's repository (NVlabs/edm), under the names they have inside
`EDMPrecond`.

EDM publishes pickled Python objects. They are not opened here; `convert` gives the command that
makes a folder of one: `model.safetensors` with the weights, and `config.json` with the class as
`_class_name` and the arguments it was built with, under their names in `training/networks.py`. A
missing argument has its default there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxdistill.interop.keys import (
    OMITTED,
    Config,
    Field,
    Fixed,
    Implied,
    Key,
    listed,
    one_of,
    same,
)
from jaxdistill.interop.tables import (
    CONV,
    POINT,
    Family,
    Row,
    linear,
    literal,
    norm,
    shell,
)
from jaxdistill.models.denoisers.edm import DhariwalUNet, EDMUNet, SongUNet


def _mirrored(filter: list[float], config: Config) -> tuple[float, ...]:
    """The filter of a change of resolution. Raises Refused where it is not symmetric."""
    if filter != filter[::-1] or len(filter) % 2:
        raise config.refusal(
            "resample_filter", "an even number of mirrored weights"
        )
    return tuple(filter)


def _shared(
    width: int, multiples: list[int], blocks: int, attention: list[int]
) -> tuple[Key, ...]:
    """The keys of both classes, with the defaults of one."""
    return (
        same("size", "img_resolution"),
        same("channels", "in_channels"),
        Implied("out_channels", lambda ours: ours.channels),
        same("classes", "label_dim", missing=0),
        same("augment_dim", "augment_dim", missing=0),
        same("width", "model_channels", missing=width),
        listed("multiples", "channel_mult", missing=multiples),
        same("emb_multiple", "channel_mult_emb", missing=4),
        same("blocks", "num_blocks", missing=blocks),
        listed("attention", "attn_resolutions", missing=attention),
    )


WAVES = {"positional": "positional", "fourier": "fourier"}
ENCODERS = {"standard": False, "residual": True}
SONG_KEYS = (
    *_shared(width=128, multiples=[1, 2, 2, 2], blocks=4, attention=[16]),
    one_of("time_embedding", "embedding_type", WAVES, missing="positional"),
    same("noise_multiple", "channel_mult_noise", missing=1),
    one_of("residual", "encoder_type", ENCODERS, missing="standard"),
    Fixed("decoder_type", "standard"),
    Field(
        field="filter",
        key="resample_filter",
        read=_mirrored,
        write=lambda ours: list(ours.filter),
        missing=[1, 1],
    ),
)
DHARIWAL_KEYS = (
    *_shared(width=192, multiples=[1, 2, 3, 4], blocks=3, attention=[32, 16, 8]),
    Field(  # written where it is not 64 alone, since PyTorch's class has no such argument
        field="head_dim",
        key="channels_per_head",
        write=lambda ours: OMITTED if ours.head_dim == 64 else ours.head_dim,
        missing=64,
    ),
    Fixed("decoder_type", "standard", is_written=False),
)
LOADS = """import json
from pathlib import Path
from safetensors.torch import load_file
from training.networks import {0}  # of github.com/NVlabs/edm
folder = Path(".")
settings = json.loads((folder / "config.json").read_text())
model = {0}(**{{key: value for key, value in settings.items() if key != "_class_name"}}).eval()
weights = load_file(folder / "model.safetensors")
model.load_state_dict({{name.removeprefix("model."): w for name, w in weights.items()}})"""


def convert(pickled: Path) -> str:
    """The command that turns a pickle of EDM into a folder that is read here; it runs in a clone of
    EDM's repository, with torch.
    """
    folder = pickled.with_suffix("")
    source = literal(pickled)
    out = literal(folder)
    weights = literal(folder / "model.safetensors")
    config = literal(folder / "config.json")
    return shell(
        "import json, os, pickle; from safetensors.torch import save_file; "
        f'net = pickle.load(open({source}, "rb"))["ema"]; os.makedirs({out}, exist_ok=True); '
        f"save_file({{k: v.contiguous() for k, v in net.state_dict().items()}}, {weights}); "
        'settings = {"_class_name": type(net.model).__name__, **net.model.init_kwargs}; '
        f'json.dump(settings, open({config}, "w"))'
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
    yield from linear("layer0", "model.map_layer0")
    yield from linear("layer1", "model.map_layer1")

    def at(half: str, level: int) -> str:
        side = cfg.size >> level
        return f"model.{half}.{side}x{side}_"

    yield from linear("conv_in", at("enc", 0) + "conv", CONV)
    now = cfg.width if song else cfg.widths[0]
    for i, width in enumerate(cfg.widths):
        if i:
            yield from _block(
                f"down/{i}/move", at("enc", i) + "down", skip=cfg.project
            )
            if song and cfg.residual:
                yield from linear(
                    f"down/{i}/image", at("enc", i) + "aux_residual", CONV
                )
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
            yield from _block(
                f"up/{place}/move", at("dec", i) + "up", skip=cfg.project
            )
        for j in range(cfg.blocks + 1):
            attend = cfg.attends(i) and (cfg.all_up or j == cfg.blocks)
            yield from _block(
                f"up/{place}/blocks/{j}",
                at("dec", i) + f"block{j}",
                skip=True,
                attend=attend,
            )
    out = at("dec", 0) + "aux_" if song else "model.out_"
    yield from norm("norm_out", out + "norm")
    yield from linear("conv_out", out + "conv", CONV)


def _block(
    path: str, name: str, *, skip: bool = False, attend: bool = False
) -> Iterator[Row]:
    for i in (0, 1):
        yield from norm(f"{path}/norm{i}", f"{name}.norm{i}")
        yield from linear(f"{path}/conv{i}", f"{name}.conv{i}", CONV)
    yield from linear(f"{path}/affine", f"{name}.affine")
    if skip:
        yield from linear(f"{path}/skip", f"{name}.skip", CONV)
    if attend:
        yield from norm(f"{path}/norm2", f"{name}.norm2")
        yield from linear(f"{path}/qkv", f"{name}.qkv", POINT)
        yield from linear(f"{path}/proj", f"{name}.proj", POINT)


def constants(cfg: EDMUNet) -> dict[str, np.ndarray]:
    """The filters that PyTorch's classes keep beside the weights of every change of resolution."""
    kernel = np.outer(cfg.filter, cfg.filter) / sum(cfg.filter) ** 2
    kernel = kernel.astype(np.float32)[None, None]
    found = {}
    for row in _rows(cfg):
        head, _, end = row.name.rpartition(".")
        move = head.rpartition(".")[0]
        if (
            end == "weight"
            and head.endswith(".conv0")
            and move.endswith(("_down", "_up"))
        ):
            found[f"{move}.conv0.resample_filter"] = kernel
            found[f"{move}.skip.resample_filter"] = kernel
        elif end == "weight" and head.endswith("_aux_residual"):
            found[f"{head}.resample_filter"] = kernel
    return found


def _family(config: type[EDMUNet], keys: tuple[Key, ...]) -> Family:
    return Family(
        name=config.__name__,
        library="edm",
        config=config,
        keys=keys,
        table=table,
        ignored=(r".*\.resample_filter",),
        call="model({x}, {t}, cond)",
        given="cond = torch.eye(4, {classes})  # labels, each a row with a single 1",
        loads=LOADS.format(config.__name__),
        adapters=False,
        constants=constants,
        convert=convert,
    )


SONG = _family(SongUNet, SONG_KEYS)
DHARIWAL = _family(DhariwalUNet, DHARIWAL_KEYS)
