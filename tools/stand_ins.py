"""Configs whose data is not at hand, with data of the same shapes in its place, to be compiled and
not trained on.
"""

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
    """Small files of every kind that a data set of the library reads: data's name in a config ->
    their path.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from jaxdistill.data import arrayrecord

    rng = np.random.default_rng(0)
    latent = lambda: {
        "x": rng.standard_normal((32, 32, 4)).astype("f4"),
        "cond": np.int32(3),
        "null_cond": np.int32(1000),
    }
    arrayrecord.write(folder / "latents" / "train.arrayrecord", [latent() for _ in range(4)])
    text = lambda: {
        "text": np.zeros((77, 2048), "f2"),
        "pooled": np.zeros(1280, "f2"),
        "size": np.zeros(6, "f4"),
    }
    captions = {f"{group}/{k}": v for group in ("cond", "null_cond") for k, v in text().items()}
    image = {
        "x": np.zeros((128, 128, 4), "f4"),
        "image": np.zeros((1024, 1024, 3), "u1"),
        **captions,
    }
    arrayrecord.write(folder / "captioned" / "train.arrayrecord", [image] * 2)
    (folder / "train.jsonl").write_text(
        "".join(
            json.dumps({"prompt": "ab" * i, "response": "cd" * i}) + "\n" for i in range(1, 300)
        )
    )
    (folder / "text.txt").write_text("To be, or not to be. " * 500)
    for name, count in (
        ("domains", 2),
        ("domains10", 10),
    ):  # what a method asks for stands in the name
        for domain in (folder / name / f"domain{i}" for i in range(count)):
            domain.mkdir(parents=True)
            for split in ("train", "test"):
                (domain / f"{split}.jsonl").write_text((folder / "train.jsonl").read_text())
    told = {"input": "1 + 1", "label": "2", "rationale": "one and one"}
    (folder / "told.jsonl").write_text("".join(json.dumps(told) + "\n" for _ in range(40)))
    (folder / "svamp").mkdir()
    cot = json.dumps(["One and one. The answer is (1 + 1)."] * 20)
    for split, files in (
        ("train", ("palm_train_CoT_0", "palm_train_CoT_1")),
        ("test", ("palm_test_CoT_0",)),
    ):
        (folder / f"svamp/svamp_{split}.json").write_text(
            f"{json.dumps(told)}\n" * (20 * len(files))
        )
        for file in files:
            (folder / f"svamp/{file}.json").write_text(cot)
    named = {"text": "Ada saw Rome", "entities": [["Ada", "person"], ["Rome", "place"]]}
    (folder / "named.jsonl").write_text("".join(json.dumps(named) + "\n" for _ in range(40)))
    png = io.BytesIO()
    Image.new("RGB", (32, 32)).save(png, format="PNG")
    pictures = [{"bytes": png.getvalue(), "path": None}] * 40
    (folder / "pictures").mkdir()
    pq.write_table(
        pa.table({"img": pictures, "label": [i % 10 for i in range(40)]}),
        folder / "pictures" / "train-0.parquet",
    )
    lines = folder / "train.jsonl"
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


def at_hand(config: ConfigDict, files: dict[str, Path]) -> ConfigDict:
    """`config`, reading the file that stands in for its data, where it reads one."""
    if config.data.name in files:
        path = files[config.data.name]
        asked = path.with_name(f"{path.name}{config.method.get('domains', '')}")
        config.data.path = str(asked if asked.exists() else path)
    return config


def config_of(name: str) -> ConfigDict:
    """configs/<name>, as in recipes.dmd2 or recipes.dmd2:variant."""
    name, _, variant = name.partition(":")
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(variant) if variant else module.get_config()


def load(name: str, files: dict[str, Path]) -> ConfigDict:
    """`config_of(name)` without its data.

    A module's RECORD says what a sample holds where it is too large to be written.
    """
    config = config_of(name)
    module = importlib.import_module(f"configs.{name.partition(':')[0]}")
    if not hasattr(module, "RECORD"):
        return at_hand(config, files)
    with config.unlocked():
        config.data = build.plain(
            Synthetic(batch_size=config.data.batch_size, arrays=module.RECORD)
        )
    return config


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from launch._command import main, no_command

    main(no_command, __doc__)
