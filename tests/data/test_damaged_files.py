"""Data files damaged at random, over every reader: each is read, or refused in one line that names
it.

`python tests/data/test_damaged_files.py 2000` damages as many and prints what came of them, by
reader.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxdistill.core.types import Refused
from jaxdistill.data import arrayrecord, ner
from jaxdistill.data.arrayrecord import (
    ArrayRecords,
    GroupedRecords,
    LoadedRecords,
    WeightedRecords,
)
from jaxdistill.data.base import Dataset
from jaxdistill.data.domains import Folders
from jaxdistill.data.idx import IDX
from jaxdistill.data.images import ImageFolder, ParquetImages
from jaxdistill.data.logits import ABOUT, StoredLogits, store_file
from jaxdistill.data.rationales import SVAMP, Rationales
from jaxdistill.data.text import PackedJson, PaddedJson, Text
from jaxdistill.data.two_tokenizers import AlignedJson
from tests import damage

SIZES = dict(batch_size=2)
# (files to damage, the data set that reads them, by its seed)
Made = tuple[list[Path], Callable[[int], Dataset]]


def image(kind: str, i: int = 0) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (12, 9, 4), np.uint8)
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(pixels, "RGBA").convert(
        "RGBA" if kind in ("PNG", "WEBP", "TIFF") else "RGB"
    )
    picture.save(
        out,
        kind,
        **({"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}),
    )
    return out.getvalue()


def folder_of_images(folder: Path) -> Made:
    kinds = {
        "png": "PNG",
        "jpg": "JPEG",
        "webp": "WEBP",
        "gif": "GIF",
        "tif": "TIFF",
        "bmp": "BMP",
        "ppm": "PPM",
        "avif": "AVIF",
    }
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i, (suffix, kind) in enumerate(kinds.items()):
                (folder / split / name / f"{i}.{suffix}").write_bytes(
                    image(kind, i)
                )
    return sorted(folder.rglob("*.*")), lambda seed: ImageFolder(
        path=str(folder), size=8, seed=seed, shuffle=False, batch_size=16
    )


def parquet(folder: Path) -> Made:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split in ("train", "test"):
        rows = pa.array(
            [{"bytes": image("PNG", i), "path": None} for i in range(4)], kind
        )
        pq.write_table(
            pa.table({"img": rows, "label": [0, 1, 0, 1]}),
            folder / f"{split}-0.parquet",
        )
    return sorted(folder.iterdir()), lambda seed: ParquetImages(
        path=str(folder), size=8, seed=seed, batch_size=4
    )


def records(kind: type[ArrayRecords | LoadedRecords]) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        examples = [
            {
                "x": np.full(3, i, np.float32),
                "cond/text": np.full((2, 2), i, np.uint8),
                "worth": np.float32(i),
            }
            for i in range(6)
        ]
        for split in ("train", "test"):
            arrayrecord.write(folder / f"{split}.arrayrecord", examples)
        return sorted(folder.iterdir()), lambda seed: kind(
            path=str(folder), seed=seed, batch_size=5
        )

    return make


def store(folder: Path) -> Made:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, (4, 3), np.int32)
    law = -rng.random((4, 3), np.float32)
    row = {
        "tokens": ids[:, 0],
        "mask": law[:, 0],
        "teacher_ids": ids,
        "teacher_log_probs": law,
        "teacher_log_tail": law[:, 0],
    }
    for split in ("train", "test"):
        arrayrecord.write(store_file(folder, split, 0), [row] * 4)
    about = {"data": {"name": "data.language:Carry"}, "top_k": 3, "vocab": 9}
    about |= {"rows": {"train": 4, "test": 4}, "files": {"train": 1, "test": 1}}
    (folder / "store.json").write_text(json.dumps(about))
    return [
        folder / ABOUT,
        folder / ABOUT,
        *folder.glob("*.arrayrecord"),
    ], lambda seed: StoredLogits(path=str(folder), seed=seed, **SIZES)


def idx(folder: Path) -> Made:
    header = lambda *shape: (
        bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    )
    for name in ("train", "t10k"):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(
            header(6, 3, 3) + bytes(range(54))
        )
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            header(6) + bytes([0, 1, 2, 0, 1, 2])
        )
    return sorted(folder.iterdir()), lambda seed: IDX(
        path=str(folder), seed=seed, **SIZES
    )


def zipped(folder: Path) -> Made:
    import gzip

    files, data = idx(folder)
    for file in files:
        file.with_name(f"{file.name}.gz").write_bytes(
            gzip.compress(file.read_bytes(), mtime=0)
        )
        file.unlink()
    return sorted(folder.iterdir()), data


def text(folder: Path) -> Made:
    (folder / "a.txt").write_text("to be, or not to bé 東京\n" * 40)
    return [folder / "a.txt"], lambda seed: Text(
        path=str(folder / "a.txt"), length=16, seed=seed, **SIZES
    )


def samples(
    name: str, rows: list[dict], make: Callable[..., Dataset]
) -> Callable[[Path], Made]:
    """JSON lines in train.jsonl, a JSON list in test.json."""

    def made(folder: Path) -> Made:
        (folder / "train.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
        (folder / "test.json").write_text(json.dumps(rows))
        return sorted(folder.iterdir()), lambda seed: make(
            path=str(folder), seed=seed, **SIZES
        )

    return made


def domains(folder: Path) -> Made:
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in PAIRS)
        )
    each = PackedJson(length=24, heldout=0.4)
    return sorted(folder.iterdir()), lambda seed: Folders(
        path=str(folder), each=each, interval=2, seed=seed, **SIZES
    )


def svamp(folder: Path) -> Made:
    rows = [{"input": f"{i} and 2", "label": f"({i} + 2)"} for i in range(4)]
    told = [f"Sum. The answer is {row['label']}." for row in rows]
    files = {
        "svamp_train": rows,
        "svamp_test": rows,
        "palm_train_CoT_0": told[:2],
        "palm_train_CoT_1": told[2:],
        "palm_test_CoT_0": told,
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    sizes = dict(prompt_length=40, label_length=12, rationale_length=12)
    return sorted(folder.iterdir()), lambda seed: SVAMP(
        path=str(folder), seed=seed, **sizes, **SIZES
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tagged(Dataset):
    """The passages of a conll file, through the protocol of data sets."""

    def batch(self, index, rows):
        return {
            "pairs": np.int32([len(pairs) for _, pairs in ner.conll(self.path)])
        }

    def evaluation(self, n):
        return self.batch(0, slice(n))


def conll(folder: Path) -> Made:
    (folder / "a.conll").write_text(
        "New\tB-place\nYork\tI-place\nis\tO\n\nit\tO\n" * 4
    )
    return [folder / "a.conll"], lambda seed: Tagged(
        path=str(folder / "a.conll"), seed=seed, **SIZES
    )


PAIRS = [{"prompt": f"p{i}é", "response": f"r{i}\u2028"} for i in range(8)]
TOLD = [
    {"input": f"i{i}", "label": f"l{i}", "rationale": f"r{i}"} for i in range(5)
]
NAMED = [
    {"text": f"a{i} b", "entities": [[f"a{i}", "x"], ["b", "y"]]} for i in range(5)
]
PADDED = dict(prompt_length=16, response_length=16)
READERS: dict[str, Callable[[Path], Made]] = {
    "images": folder_of_images,
    "parquet": parquet,
    "records": records(ArrayRecords),
    "grouped": records(GroupedRecords),
    "weighted": records(WeightedRecords),
    "loaded": records(LoadedRecords),
    "store": store,
    "idx": idx,
    "idx.gz": zipped,
    "text": text,
    "packed": samples("packed", PAIRS, lambda **how: PackedJson(length=24, **how)),
    "padded": samples("padded", PAIRS, lambda **how: PaddedJson(**PADDED, **how)),
    "aligned": samples(
        "aligned", PAIRS, lambda **how: AlignedJson(**PADDED, **how)
    ),
    "rationales": samples(
        "rationales",
        TOLD,
        lambda **how: Rationales(
            prompt_length=20, label_length=8, rationale_length=8, **how
        ),
    ),
    "conversations": samples(
        "conversations", NAMED, lambda **how: ner.Conversations(length=512, **how)
    ),
    "domains": domains,
    "svamp": svamp,
    "conll": conll,
}


def read(data: Dataset) -> None:
    """Everything that a run asks of a data set, once."""
    data.check()
    data.spec()
    next(data.loader())
    data.evaluation(2)


def damaged(folder: Path, reader: str, seed: int) -> tuple[str, str | None]:
    """(what was done, the refusal or None) of one damaged set. AssertionError where it is not
    refused in one line that names the file or its folder; every other exception passes through.
    """
    rng = np.random.default_rng([seed, *reader.encode()])
    files, data = READERS[reader](folder)
    file = files[int(rng.integers(len(files)))]
    how = (
        damage.remove(file, rng)
        if rng.random() < 0.03
        else damage.damage(file, rng)
    )
    with damage.quiet(folder):
        return how, damage.outcome(lambda: read(data(seed)), str(folder))


@pytest.mark.parametrize("reader", READERS)
def test_sound_files_are_read(tmp_path, reader):
    """Else the damage is not what is tested."""
    read(READERS[reader](tmp_path)[1](0))


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_read_or_refused(tmp_path, reader):
    said = []
    for seed in range(6):
        (tmp_path / str(seed)).mkdir()
        try:
            said.append(damaged(tmp_path / str(seed), reader, seed)[1])
        except Refused as error:
            pytest.fail(f"{reader}, seed {seed}: {error}")
    assert any(said), "of six damaged sets none was refused"


def main(count: int, first: int = 0) -> None:
    """Damages `count` sets, and prints how many of each reader were read and refused."""
    found: Counter[tuple[str, str]] = Counter()
    for i in range(count):
        reader = list(READERS)[i % len(READERS)]
        with tempfile.TemporaryDirectory() as folder:
            try:
                refusal = damaged(Path(folder), reader, first + i)[1]
                found[reader, "refused" if refusal else "read"] += 1
            except Exception as error:
                found[reader, "failed"] += 1
                print(
                    f"{reader} {first + i}: {type(error).__name__}: {str(error)[:300]}",
                    file=sys.stderr,
                )
    for reader in READERS:
        print(
            reader,
            {kind: found[reader, kind] for kind in ("read", "refused", "failed")},
        )
    print(
        {
            kind: sum(n for (_, k), n in found.items() if k == kind)
            for kind in ("read", "refused", "failed")
        }
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
