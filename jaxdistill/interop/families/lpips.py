"""`LPIPS` of the package `lpips` (arXiv:1801.03924), net "vgg".

The package keeps its weights in two files, the heads' beside torchvision's VGG-16; `convert` gives
the command that writes both into a folder, `print(convert(Path("LPIPS/vgg.pth")))` that for LPIPS:
`model.safetensors` under the names that they have inside the class, and `config.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxdistill.interop.tables import CONV, Family, Layout, Row, fixed, linear, literal, shell
from jaxdistill.models.vision.lpips import LPIPS

HEAD = Layout(
    lambda w: w.reshape(-1), lambda w: w.reshape(1, -1, 1, 1)
)  # a 1x1 convolution to one channel
NET = {"_class_name": "LPIPS", "pnet_type": "vgg", "lpips": True}


def convert(pickled: Path) -> str:
    """The command that makes a folder of the installed package's weights; it needs `pip install
    lpips`.
    """
    folder = pickled.parent
    out, weights, config = map(
        literal, (folder, folder / "model.safetensors", folder / "config.json")
    )
    return shell(
        "import json, os, lpips; from safetensors.torch import save_file; "
        f"os.makedirs({out}, exist_ok=True); "
        'weights = lpips.LPIPS(net="vgg").state_dict(); '
        f'save_file({{k: v.contiguous() for k, v in weights.items() if not k.startswith("lins.")}}, {weights}); '
        f'json.dump({{"_class_name": "LPIPS", "pnet_type": "vgg"}}, open({config}, "w"))'
    )


def table(cfg: LPIPS) -> tuple[Row, ...]:
    # of the layer in torchvision's list, where activations and pools count
    rows = []
    number = 0
    for i, layers in enumerate(cfg.layers):
        for j in range(layers):
            rows += linear(f"levels/{i}/{j}", f"net.slice{i + 1}.{number}", CONV)
            number += 2
        number += 1
        rows.append(Row(f"heads/{i}", f"lin{i}.model.1.weight", HEAD))
    return tuple(rows)


def read(config: dict[str, Any], folder: Path) -> LPIPS:
    fixed(config, NET, folder / "config.json")
    return LPIPS(**{key: tuple(config[key]) for key in ("widths", "layers") if key in config})


def write(cfg: LPIPS) -> dict[str, dict[str, Any]]:
    return {"config.json": {**NET, "widths": list(cfg.widths), "layers": list(cfg.layers)}}


FAMILY = Family(
    name="LPIPS",
    library="lpips",
    config=LPIPS,
    read=read,
    write=write,
    table=table,
    ignored=(r"scaling_layer\..*", r"lins\..*"),  # constants, and the heads a second time
    convert=convert,
)
