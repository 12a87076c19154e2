"""Dicts of arrays in ArrayRecord files: stored trajectories, teacher logits, latents.

A file is written completely or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)
from flax.serialization import msgpack_restore, msgpack_serialize

from jaxdistill.core.types import Refused, one_line
from jaxdistill.data.base import (
    Dataset,
    InMemory,
    Joined,
    Records,
    Subset,
    held_out,
    regular,
)

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecords(Records):
    """Stored samples, with the keys, shapes and dtypes that `write` was given.

    `path` is a file, or a folder of *.arrayrecord, of which those called test* are held out. Raises
    Refused on a damaged file or record, and on a record whose layout is not that of the first; the
    message names the record.
    """

    # share kept for evaluation where there are no test* files
    heldout: float = 0.02

    def source(self, split):
        path = self.existing()
        files = [path] if path.is_file() else sorted(path.glob("*.arrayrecord"))
        test = (
            [file for file in files if file.name.startswith("test")]
            if path.is_dir()
            else []
        )
        train = [file for file in files if file not in test]
        if not train:
            raise Refused(f"data.path={self.path}: no *.arrayrecord to train on")
        if test:
            return Joined(
                [RecordFile(file) for file in (train if split == "train" else test)]
            )
        records = Joined([RecordFile(file) for file in train])
        return Subset(records, held_out(len(records), self.heldout, split))

    def example(self, record):
        name, data = record
        arrays, found = restored(name, data)
        where, expected = self.first
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                this = _shown(found.get(key))
                that = _shown(expected.get(key))
                raise Refused(
                    f"{name}: {one_line(key)!r} is {this}, and {that} in {where}"
                )
        return arrays

    @functools.cached_property
    def first(self) -> tuple[str, Layout]:
        """(name, layout) of the first training record; all records must have its layout."""
        records = ArrayRecords.source(self, "train")
        if not len(records):
            raise self.lacking("train")
        name, data = records[0]
        return name, restored(name, data)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedRecords(ArrayRecords):
    """Records with a number `worth`, which weights their losses.

    Training records of worth 0 or less are left out. The others are drawn evenly, and have
    `weight`: their worth over the mean worth of those that are kept. Where no record is worth more
    than 0, all are kept with weight 1.
    """

    @functools.cached_property
    def worth(self) -> np.ndarray:
        """The worth of all training records, from one pass over them: float64 [records]."""
        source = super().source("train")
        return np.array([self._worth(source[i]) for i in range(len(source))])

    def _worth(self, record: tuple[str, bytes]) -> float:
        value = super().example(record).get("worth")
        if value is None or np.size(value) != 1 or not np.isfinite(value).all():
            raise Refused(
                f"{record[0]}: 'worth' is {str(value)[:40]}, expected a finite number"
            )
        return float(np.reshape(value, ()))

    @functools.cached_property
    def mean(self) -> float:
        """The mean worth of the records above 0; 0 where there are none."""
        if not (self.worth > 0).any():
            logging.warning(
                "%s: no record is worth anything; all are used, with equal weights",
                self.path,
            )
            return 0.0
        return float(self.worth[self.worth > 0].mean())

    def source(self, split):
        records = super().source(split)
        if split != "train" or not self.mean:
            return records
        return Subset(records, np.flatnonzero(self.worth > 0))

    def example(self, record):
        example = super().example(record)
        weight = example["worth"] / self.mean if self.mean else 1.0
        return {**example, "weight": np.float32(weight)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedRecords(ArrayRecords):
    """Records with groups of arrays: "cond/text" is the key "text" of "cond".

    Arrays of uint8 are pixels, and become float32 in [-1, 1].
    """

    def example(self, record):
        out: dict = {}
        for name, array in super().example(record).items():
            *groups, last = name.split("/")
            inner = out
            for group in groups:
                inner = inner.setdefault(group, {})
                if not isinstance(inner, dict):
                    raise Refused(
                        f"{record[0]}: {group!r} is an array, and a group in {name!r}"
                    )
            inner[last] = (
                np.float32(array) / 127.5 - 1 if array.dtype == np.uint8 else array
            )
        return out

    def evaluation(self, n):
        source = self._opened("test")
        examples = [
            self.example(source[int(i)]) for i in self.chosen(len(source), n)
        ]
        return jax.tree.map(lambda *v: np.stack(v), *examples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRecords(InMemory):
    """`ArrayRecords` read into memory at the start, for small files that are read many times."""

    heldout: float = 0.02
    weighted: bool = False  # whether to read them as WeightedRecords

    def arrays(self, split):
        kind = WeightedRecords if self.weighted else ArrayRecords
        records = kind(path=self.path, heldout=self.heldout)
        examples = records.examples(split)
        return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def stored(
    folder: Path, *, batch_size: int, seed: int, memory: int = 1 << 30
) -> Dataset:
    """All records in a folder as training data.

    Records with a number `worth` are weighted by it (`WeightedRecords`).

    Args:
        memory: bytes below which the records are read into memory.
    """
    common = dict(path=str(folder), batch_size=batch_size, seed=seed, heldout=0.0)
    every = ArrayRecords(**common)
    weighted = "worth" in every.example(every.source("train")[0])
    if sum(file.stat().st_size for file in folder.iterdir()) < memory:
        return LoadedRecords(**common, weighted=weighted)
    return WeightedRecords(**common) if weighted else every


def restored(name: str, data: bytes) -> tuple[dict[str, Any], Layout]:
    """The arrays of a record that `write` stored, and their layout.

    Raises:
        Refused: on anything else; the message begins with `name`.
    """
    try:
        arrays = msgpack_restore(data)
        return arrays, {
            key: _described(key, array) for key, array in arrays.items()
        }
    except MemoryError:
        raise
    except Exception as error:  # msgpack, flax and numpy each raise their own
        raise Refused(
            f"{name}: expected what jaxdistill.data.arrayrecord.write stores ({one_line(error)})"
        ) from error


def _described(key: Any, array: Any) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape). Raises TypeError on anything but an array of numbers under a name."""
    named_array = isinstance(key, str) and isinstance(
        array, (np.ndarray, np.generic)
    )
    if not named_array or array.dtype.kind in "OSUMm" or array.dtype.char == "V":
        raise TypeError(
            f"{str(key)[:40]!r} is {type(array).__name__}, no array of numbers"
        )
    return array.dtype.name, array.shape


def _shown(described: tuple[str, tuple[int, ...]] | None) -> str:
    """A dtype and shape in words."""
    if described is None:
        return "missing"
    dtype, shape = described
    return f"{dtype} {list(shape)}"


class RecordFile(Sequence):
    """One ArrayRecord file as a sequence of (name, bytes)."""

    def __init__(self, file: Path):
        size = regular(file)
        self.file = file
        self.reader = ArrayRecordReader(str(file))
        if not self.reader.ok():
            raise Refused(f"{file}: damaged or no ArrayRecord file ({size} bytes)")
        self.size = self.reader.num_records()

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        name = f"{self.file} record {i}"
        try:
            return name, self.reader.read([i])[0]
        except RuntimeError as error:
            raise Refused(f"{name}: damaged ({one_line(error)})") from error


def write(path: str | Path, examples: Iterable[Mapping[str, Any]]) -> int:
    """Stores dicts of arrays with equal keys, shapes and dtypes, one record each.

    An existing file is replaced at the end, in one move, so that no reader sees half of a file.

    Returns:
        The number of records.

    Raises:
        Refused: on an example whose layout is not that of the first, on arrays of objects or
            strings, and where there are no examples.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    layout = None
    count = 0
    # Groups of one, so that a record is read without its neighbours.
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    try:
        for example in examples:
            arrays = {k: np.asarray(v) for k, v in example.items()}
            found = {k: (v.dtype.name, v.shape) for k, v in arrays.items()}
            layout = layout or found
            if found != layout:
                raise Refused(
                    f"{path}: example {count} is {found}, the first one {layout}"
                )
            if any(v.dtype.kind in "OSUMm" for v in arrays.values()):
                raise Refused(
                    f"{path}: example {count} is {found}, expected arrays of numbers"
                )
            writer.write(msgpack_serialize(arrays))
            count += 1
        if not count:
            raise Refused(f"{path}: no examples to write")
        writer.close()
        temporary.replace(path)
    finally:
        if writer.is_open():
            writer.close()
        temporary.unlink(missing_ok=True)
    return count
