"""Dicts of arrays in ArrayRecord files: stored trajectories, teacher logits, latents. Written whole
or not at all.
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
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from flax.serialization import msgpack_restore, msgpack_serialize

from jaxdistill.core.types import Refused, one_line
from jaxdistill.data.base import Dataset, InMemory, Joined, Records, Subset, held_out, regular

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecords(Records):
    """The keys, shapes and dtypes that `write` was given.

    `path` is a file, or a folder of *.arrayrecord of which those called test* are for evaluation.
    Raises Refused, naming it, on a damaged file or record, and on a record unlike the first.
    """

    heldout: float = 0.02  # share kept for evaluation where there are no test* files

    def source(self, split):
        path = self.existing()
        files = [path] if path.is_file() else sorted(path.glob("*.arrayrecord"))
        test = [file for file in files if file.name.startswith("test")] if path.is_dir() else []
        train = [file for file in files if file not in test]
        if not train:
            raise Refused(f"data.path={self.path}: no *.arrayrecord to train on")
        if test:
            return Joined([RecordFile(file) for file in (train if split == "train" else test)])
        rows = Joined([RecordFile(file) for file in train])
        return Subset(rows, held_out(len(rows), self.heldout, split))

    def example(self, record):
        name, data = record
        arrays, found = restored(name, data)
        where, expected = self.first
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                this, that = (
                    f"{k[key][0]} {list(k[key][1])}" if key in k else "missing"
                    for k in (found, expected)
                )
                raise Refused(f"{name}: {one_line(key)!r} is {this}, and {that} in {where}")
        return arrays

    @functools.cached_property
    def first(self) -> tuple[str, Layout]:
        """(name, layout) of the first record to train on; all others have the same layout."""
        records = ArrayRecords.source(self, "train")
        if not len(records):
            raise self.lacking("train")
        name, data = records[0]
        return name, restored(name, data)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedRecords(ArrayRecords):
    """Records with a number `worth`, drawn evenly: those that are worth nothing are left out, and
    the others come with `weight`, their worth over the mean of those that are kept. Where none is
    worth anything all have weight 1.
    """

    @functools.cached_property
    def worth(self) -> np.ndarray:
        """float64 [N] of all training records, from one pass over them."""
        source = super().source("train")
        return np.array([self._worth(source[i]) for i in range(len(source))])

    def _worth(self, record: tuple[str, bytes]) -> float:
        value = super().example(record).get("worth")
        if value is None or np.size(value) != 1 or not np.isfinite(value).all():
            raise Refused(f"{record[0]}: 'worth' is {str(value)[:40]}, expected a finite number")
        return float(np.reshape(value, ()))

    @functools.cached_property
    def mean(self) -> float:
        """Of those above 0; 0 where there are none."""
        if not (self.worth > 0).any():
            logging.warning(
                "%s: no record is worth anything; all are used, with equal weights", self.path
            )
            return 0.0
        return float(self.worth[self.worth > 0].mean())

    def source(self, split):
        rows = super().source(split)
        return (
            Subset(rows, np.flatnonzero(self.worth > 0)) if split == "train" and self.mean else rows
        )

    def example(self, record):
        example = super().example(record)
        return {**example, "weight": np.float32(example["worth"] / self.mean if self.mean else 1.0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedRecords(ArrayRecords):
    """Records with groups of arrays: "cond/text" is the key "text" of "cond", as in
    `data.synthetic`. Arrays of uint8 are
    pixels, and come as float32 in [-1, 1].
    """

    def example(self, record):
        out: dict = {}
        for name, array in super().example(record).items():
            *groups, last = name.split("/")
            place = out
            for group in groups:
                place = place.setdefault(group, {})
                if not isinstance(place, dict):
                    raise Refused(f"{record[0]}: {group!r} is an array, and a group in {name!r}")
            place[last] = np.float32(array) / 127.5 - 1 if array.dtype == np.uint8 else array
        return out

    def evaluation(self, n):
        source = self._opened("test")
        return jax.tree.map(
            lambda *v: np.stack(v),
            *(self.example(source[int(i)]) for i in self.chosen(len(source), n)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRecords(InMemory):
    """`ArrayRecords`, read into memory at the start: for what is small and read many times."""

    heldout: float = 0.02
    weighted: bool = False  # as WeightedRecords

    def arrays(self, split):
        records = (WeightedRecords if self.weighted else ArrayRecords)(
            path=self.path, heldout=self.heldout
        )
        examples = records.examples(split)
        return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def stored(folder: Path, *, batch_size: int, seed: int, memory: int = 1 << 30) -> Dataset:
    """All records below `folder` as training data, in memory where they take less than `memory`
    bytes.

    Records that say what they are `worth` are weighted by it (`WeightedRecords`).
    """
    common = dict(path=str(folder), batch_size=batch_size, seed=seed, heldout=0.0)
    every = ArrayRecords(**common)
    weighted = "worth" in every.example(every.source("train")[0])
    if sum(file.stat().st_size for file in folder.iterdir()) < memory:
        return LoadedRecords(**common, weighted=weighted)
    return WeightedRecords(**common) if weighted else every


def restored(name: str, data: bytes) -> tuple[dict[str, Any], Layout]:
    """(arrays, their layout) of a record that `write` stored. Raises Refused, with `name`, on
    anything else.
    """
    try:
        arrays = msgpack_restore(data)
        return arrays, {key: _described(key, array) for key, array in arrays.items()}
    except MemoryError:
        raise
    except Exception as error:  # msgpack, flax and numpy each raise their own
        raise Refused(
            f"{name}: expected what jaxdistill.data.arrayrecord.write stores ({one_line(error)})"
        ) from error


def _described(key: Any, array: Any) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape). Raises TypeError on anything but an array of numbers under a name."""
    if (
        not isinstance(key, str)
        or not isinstance(array, (np.ndarray, np.generic))
        or array.dtype.kind in "OSUMm"
        or array.dtype.char == "V"
    ):
        raise TypeError(f"{str(key)[:40]!r} is {type(array).__name__}, no array of numbers")
    return array.dtype.name, array.shape


class RecordFile(Sequence):
    """One ArrayRecord file: (name, bytes) by record."""

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
    """Stores `examples`, dicts of arrays with equal keys, shapes and dtypes, one record each;
    returns their number.

    An existing file is replaced at the end, in one move: a reader never sees half of one. Raises
    Refused on an example unlike the first, on arrays of objects or strings, and where there are
    none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    layout = None
    count = 0
    writer = ArrayRecordWriter(
        str(temporary), "group_size:1"
    )  # a record is read without its neighbours
    try:
        for example in examples:
            arrays = {k: np.asarray(v) for k, v in example.items()}
            found = {k: (v.dtype.name, v.shape) for k, v in arrays.items()}
            layout = layout or found
            if found != layout:
                raise Refused(f"{path}: example {count} is {found}, the first one {layout}")
            if any(v.dtype.kind in "OSUMm" for v in arrays.values()):
                raise Refused(f"{path}: example {count} is {found}, expected arrays of numbers")
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
