"""Photographs from files: Hugging Face parquet shards, or one folder per class. Decoded when read, never all at once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jaxdistill.core.types import Refused, lookup
from jaxdistill.data.base import Joined, Records, Subset, check_share, held_out

COLUMNS = ("image", "img")  # what Hugging Face sets call their pictures
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images(Records):
    """x float32 [size, size, 3] in [-1, 1]; cond int32 label; null_cond the number of classes.

    Records are (name, encoded image, label). The middle square is cut out and resized. Raises Refused, naming the file
    or row, where an image cannot be decoded.
    """

    size: int = 32  # pixels a side
    flip: bool = False  # mirror every other training image, drawn anew in each epoch
    heldout: float = 0.05  # share kept for evaluation where the set has no test files of its own

    @property
    def classes(self) -> int:
        """Number of classes in the training set."""
        raise NotImplementedError

    def example(self, record):
        name, data, label = record
        if not 0 <= label < self.classes:
            raise Refused(f"{name}: label {label}, the training set has 0 to {self.classes - 1}")
        return {"x": decode(data, self.size, name), "cond": np.int32(label), "null_cond": np.int32(self.classes)}

    def augment(self, example, rng):
        return {**example, "x": example["x"][:, ::-1]} if self.flip and rng.random() < 0.5 else example


def decode(data: bytes, size: int, name: str) -> np.ndarray:
    """The middle square of an encoded image, resized (bicubic, antialiased): float32 [size, size, 3] in [-1, 1].

    Raises Refused, with `name`, where the image is damaged or has more than 8 bits a channel.
    """
    try:
        image = Image.open(io.BytesIO(data))
        mode = image.mode
        image = image.convert("RGB")
    except Exception as error:  # each of PIL's decoders has exceptions of its own
        raise Refused(f"{name}: damaged image ({error})") from error
    if mode.startswith(("I", "F")):
        raise Refused(f"{name}: pixels of mode {mode}, expected 8 bits a channel")
    side, left, top = min(image.size), *((s - min(image.size)) // 2 for s in image.size)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image, np.float32) / 127.5 - 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetImages(Images):
    """Folder `path` of train-*.parquet and test-*.parquet: a struct column "image" or "img" with `bytes`, and labels.

    The encoded images stay in memory; larger sets belong into ArrayRecord files.
    """

    label: str = "label"  # column of integer labels

    def source(self, split):
        rows = self._shards("train")
        if self._files("test"):
            return rows if split == "train" else self._shards("test")
        return Subset(rows, held_out(len(rows), self.heldout, split))

    @functools.cached_property
    def classes(self):
        return 1 + int(np.concatenate([shard.labels for shard in self._shards("train").parts]).max(initial=-1))

    def _files(self, split: str) -> list[Path]:
        return sorted(self.existing().glob(f"{split}-*.parquet"))

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the instances are frozen and few
    def _shards(self, split: str) -> Joined:
        files = self._files(split)
        if not files:
            raise Refused(f"data.path={self.path}: no {split}-*.parquet")
        return Joined([Shard(file, self.label) for file in files])


class Shard(Sequence):
    """One parquet file: (name, encoded image, label) by row. Raises Refused on other columns or a damaged file."""

    def __init__(self, file: Path, label: str):
        self.file = file
        try:
            with pq.ParquetFile(file, memory_map=True) as parquet:
                names = parquet.schema_arrow.names
                image = next((name for name in COLUMNS if name in names), None)
                if image is None:
                    raise Refused(f"{file}: no column {' or '.join(COLUMNS)}, found {', '.join(names)}")
                lookup(dict.fromkeys(names), label, f"{file}: column")
                kind, number = (parquet.schema_arrow.field(name).type for name in (image, label))
                if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                    raise Refused(f"{file}: column {image!r} is {kind}, expected a struct with bytes")
                batches = list(parquet.iter_batches(1024, columns=[f"{image}.bytes", label]))
        except (pa.ArrowException, OSError) as error:
            raise Refused(f"{file}: damaged parquet file ({str(error).splitlines()[0]})") from error
        self.images = pa.chunked_array([batch.column(image).field("bytes") for batch in batches], kind.field("bytes").type)
        labels = pa.chunked_array([batch.column(label) for batch in batches], number)
        if labels.null_count or not pa.types.is_integer(labels.type):
            raise Refused(f"{file}: column {label!r} is {labels.type} with {labels.null_count} empty rows, expected integers")
        self.labels = labels.to_numpy()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        name, data = f"{self.file} row {i}", self.images[i].as_py()
        if data is None:
            raise Refused(f"{name}: no image")
        return name, data, int(self.labels[i])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolder(Images):
    """Images in path/train/CLASS/ and path/test/CLASS/, or in path/CLASS/ alone; classes in the order of their names.

    Without a test folder a share is held out by a hash of each image's name, so that new images move no old ones.
    """

    def source(self, split):
        root, test = self._roots
        if test:
            return Files(self._listed(root if split == "train" else test))
        mine = lambda file: (_unit_hash(file) < check_share(self.heldout)) == (split == "test")
        return Files([(file, label) for file, label in self._listed(root) if mine(file)])

    @property
    def classes(self):
        return len(self.names)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The classes, by label."""
        names = _folders(self._roots[0])
        if not names:
            raise Refused(f"{self._roots[0]}: expected one folder per class")
        return tuple(names)

    @functools.cached_property
    def _roots(self) -> tuple[Path, Path | None]:
        path = self.existing()
        train, test = path / "train", path / "test"
        if test.is_dir() and not train.is_dir():
            raise Refused(f"data.path={self.path}: a test folder, but no train folder")
        return (train if train.is_dir() else path), (test if test.is_dir() else None)

    def _listed(self, root: Path) -> list[tuple[Path, int]]:
        labels = {name: label for label, name in enumerate(self.names)}
        folders = [(root / name, lookup(labels, name, f"{root}: class")) for name in _folders(root)]
        files = [(f, label) for folder, label in folders for f in sorted(folder.iterdir()) if f.suffix.lower() in SUFFIXES]
        if not files:
            raise Refused(f"{root}: no images in its class folders, expected {' '.join(SUFFIXES)}")
        return files


class Files(Sequence):
    """Image files with their labels: (name, encoded image, label), read on access."""

    def __init__(self, listed: Sequence[tuple[Path, int]]):
        self.listed = listed

    def __len__(self):
        return len(self.listed)

    def __getitem__(self, i):
        file, label = self.listed[i]
        try:
            return str(file), file.read_bytes(), label
        except OSError as error:
            raise Refused(f"{file}: cannot be read ({error.strerror})") from error


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _unit_hash(file: Path) -> float:
    """A number in [0, 1) that depends on class and file name only."""
    digest = hashlib.blake2b(f"{file.parent.name}/{file.name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32
