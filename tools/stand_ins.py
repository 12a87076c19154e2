"""Small files in place of the data sets of configs, with the same shapes, for compilation."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxdistill.core import build
from jaxdistill.data.synthetic import Synthetic


def write(folder: Path) -> dict[str, Path]:
    """Writes small files of every kind that the library's data sets read.

    Returns:
        Name of the data set's class in a config -> path.
    """
    lines = folder / "train.jsonl"
    pairs = [{"prompt": "ab" * i, "response": "cd" * i} for i in range(1, 300)]
    _write_lines(lines, pairs)
    (folder / "text.txt").write_text("To be, or not to be. " * 500)
    named = {
        "text": "Ada saw Rome",
        "entities": [["Ada", "person"], ["Rome", "place"]],
    }
    _write_lines(folder / "named.jsonl", [named] * 40)
    _write_records(folder)
    _write_domains(folder, lines.read_text())
    _write_rationales(folder)
    _write_pictures(folder / "pictures")
    return {
        "data.arrayrecord:ArrayRecords": folder / "latents",
        "data.arrayrecord:GroupedRecords": folder / "captioned",
        "data.domains:Folders": folder / "domains",
        "data.rationales:Rationales": folder / "told.jsonl",
        "data.rationales:SVAMP": folder / "svamp",
        "data.ner:Conversations": folder / "named.jsonl",
        "data.images:ParquetImages": folder / "pictures",
        "data.text:PackedJson": lines,
        "data.text:PaddedJson": lines,
        "data.two_tokenizers:AlignedJson": lines,
        "data.text:Text": folder / "text.txt",
    }


def _write_lines(file: Path, values: list) -> None:
    """Writes values of JSON, one a line."""
    file.write_text("".join(json.dumps(value) + "\n" for value in values))


def _write_records(folder: Path) -> None:
    """Records of latents with labels, and of captioned images."""
    from jaxdistill.data import arrayrecord

    rng = np.random.default_rng(0)
    latents = []
    for _ in range(4):
        x = rng.standard_normal((32, 32, 4)).astype("f4")
        latents.append({"x": x, "cond": np.int32(3), "null_cond": np.int32(1000)})
    arrayrecord.write(folder / "latents" / "train.arrayrecord", latents)
    image = {
        "x": np.zeros((128, 128, 4), "f4"),
        "image": np.zeros((1024, 1024, 3), "u1"),
    }
    for group in ("cond", "null_cond"):
        image[f"{group}/text"] = np.zeros((77, 2048), "f2")
        image[f"{group}/pooled"] = np.zeros(1280, "f2")
        image[f"{group}/size"] = np.zeros(6, "f4")
    arrayrecord.write(folder / "captioned" / "train.arrayrecord", [image] * 2)


def _write_domains(folder: Path, text: str) -> None:
    """Folders of text by domain; a number of domains that is not 2 ends the folder's name."""
    for name, count in (("domains", 2), ("domains10", 10)):
        for i in range(count):
            domain = folder / name / f"domain{i}"
            domain.mkdir(parents=True)
            for split in ("train", "test"):
                (domain / f"{split}.jsonl").write_text(text)


def _write_rationales(folder: Path) -> None:
    """Problems with rationales, and the files of SVAMP with those of a large model."""
    problem = {"input": "1 + 1", "label": "2", "rationale": "one and one"}
    _write_lines(folder / "told.jsonl", [problem] * 40)
    svamp = folder / "svamp"
    svamp.mkdir()
    rationales = json.dumps(["One and one. The answer is (1 + 1)."] * 20)
    splits = {
        "train": ("palm_train_CoT_0", "palm_train_CoT_1"),
        "test": ("palm_test_CoT_0",),
    }
    for split, names in splits.items():
        _write_lines(svamp / f"svamp_{split}.json", [problem] * (20 * len(names)))
        for name in names:
            (svamp / f"{name}.json").write_text(rationales)


def _write_pictures(folder: Path) -> None:
    """A parquet file of 40 pictures with labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    png = io.BytesIO()
    Image.new("RGB", (32, 32)).save(png, format="PNG")
    pictures = [{"bytes": png.getvalue(), "path": None}] * 40
    labels = [i % 10 for i in range(40)]
    folder.mkdir()
    pq.write_table(
        pa.table({"img": pictures, "label": labels}), folder / "train-0.parquet"
    )


def at_hand(config: ConfigDict, files: dict[str, Path]) -> ConfigDict:
    """`config` with the path of the file in place of its data set, where there is one."""
    if config.data.name in files:
        path = files[config.data.name]
        with_count = path.with_name(
            f"{path.name}{config.method.get('domains', '')}"
        )
        config.data.path = str(with_count if with_count.exists() else path)
    return config


def config_of(name: str) -> ConfigDict:
    """The config of configs/<name>; names are as "recipes.dmd2" or "recipes.dmd2:variant"."""
    name, _, variant = name.partition(":")
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(variant) if variant else module.get_config()


def load(name: str, files: dict[str, Path]) -> ConfigDict:
    """`config_of(name)` with stand-ins for its data.

    Where a sample is too large to be written, the module of the config has a RECORD, the arrays of
    a sample for `Synthetic`.
    """
    config = config_of(name)
    module = importlib.import_module(f"configs.{name.partition(':')[0]}")
    if not hasattr(module, "RECORD"):
        return at_hand(config, files)
    data = Synthetic(batch_size=config.data.batch_size, arrays=module.RECORD)
    with config.unlocked():
        config.data = build.plain(data)
    return config


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from launch._command import main, no_command

    main(no_command, __doc__)
