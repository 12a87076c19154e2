"""`LPIPS` of the package `lpips` (arXiv:1801.03924), net "vgg".

The package keeps its weights in two files: the heads, and torchvision's VGG-16. `convert` gives the
command that writes both into a folder, `model.safetensors` under the names inside the class and
`config.json`; `print(convert(Path("LPIPS/vgg.pth")))` is that for the folder LPIPS.
"""

from __future__ import annotations

from pathlib import Path

from jaxdistill.interop.keys import Fixed, listed
from jaxdistill.interop.tables import (
    CONV,
    Family,
    Layout,
    Row,
    linear,
    literal,
    shell,
)
from jaxdistill.models.vision.lpips import LPIPS

# A 1x1 convolution to one channel, which is a vector of ours
HEAD = Layout(lambda w: w.reshape(-1), lambda w: w.reshape(1, -1, 1, 1))
KEYS = (
    Fixed("pnet_type", "vgg"),
    Fixed("lpips", True),
    listed("widths", "widths", missing=LPIPS.widths),
    listed("layers", "layers", missing=LPIPS.layers),
)


def convert(pickled: Path) -> str:
    """The command that makes a folder of the installed package's weights; it needs `pip install
    lpips`.
    """
    folder = pickled.parent
    out = literal(folder)
    weights = literal(folder / "model.safetensors")
    config = literal(folder / "config.json")
    return shell(
        "import json, os, lpips; from safetensors.torch import save_file; "
        f"os.makedirs({out}, exist_ok=True); "
        'weights = lpips.LPIPS(net="vgg").state_dict(); '
        'weights = {k: v.contiguous() for k, v in weights.items() if not k.startswith("lins.")}; '
        f"save_file(weights, {weights}); "
        f'json.dump({{"_class_name": "LPIPS", "pnet_type": "vgg"}}, open({config}, "w"))'
    )


def table(cfg: LPIPS) -> tuple[Row, ...]:
    rows = []
    # of the layer in torchvision's list, where activations and pools count
    number = 0
    for i, layers in enumerate(cfg.layers):
        for j in range(layers):
            rows += linear(f"levels/{i}/{j}", f"net.slice{i + 1}.{number}", CONV)
            number += 2
        number += 1
        rows.append(Row(f"heads/{i}", f"lin{i}.model.1.weight", HEAD))
    return tuple(rows)


FAMILY = Family(
    name="LPIPS",
    library="lpips",
    config=LPIPS,
    keys=KEYS,
    table=table,
    ignored=(
        r"scaling_layer\..*",
        r"lins\..*",
    ),  # constants, and the heads a second time
    convert=convert,
)
