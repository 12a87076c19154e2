"""What a teacher said of a data set, stored once (tools/store_logits.py) and read many times."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxdistill.core.build import build
from jaxdistill.core.types import Refused, one_line
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.data.base import contents

ABOUT = "store.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredLogits(ArrayRecords):
    """The keys of the data set that was read, and the teacher's law of the token after each
    position: teacher_ids int32 [T k], the likeliest tokens first, teacher_log_probs [T k], and
    teacher_log_tail [T], the log mass of all others.

    `path` is the store's folder. Raises Refused where it is no store, or one that is not complete.
    """

    @functools.cached_property
    def store(self) -> dict[str, Any]:
        """What the store was made with: teacher, data, top_k, temperature, dtype, vocab, and its
        splits' numbers of files.
        """
        folder = self.existing()
        about = read_about(folder)
        if about is None:
            raise Refused(
                f"data.path={self.path}: no {ABOUT}, expected a folder that tools/store_logits.py made"
            )
        _check_about(about, folder / ABOUT)
        there = {file.name for file in folder.iterdir()}
        for split, files in about["files"].items():
            made = sum(
                store_file(folder, split, i).name in there for i in range(min(files, len(there)))
            )
            if made < files:
                raise Refused(
                    f"data.path={self.path}: {made} of {files} {split} files; tools/store_logits.py goes on where it stopped"
                )
        return about

    @property
    def vocab_size(self):
        """Of the data that was read, where its tokenizer is still there, else of the teacher's
        table.
        """
        try:
            return self.texts.vocab_size or self.store["vocab"]
        except Refused:
            return self.store["vocab"]

    @functools.cached_property
    def texts(self):
        return build(ConfigDict(self.store["data"]))

    def source(self, split):
        rows = self.store["rows"]
        records = super().source(split)
        stored = (
            rows.get(split) if rows.get("test") else None
        )  # else a share of the training rows is held out
        if stored is not None and len(records) != stored:
            raise Refused(
                f"data.path={self.path}: {len(records)} {split} rows, {ABOUT} says {stored}"
            )
        return records

    def example(self, record):
        """Raises Refused on a record that is not of this store's sizes."""
        example, (top_k, vocab) = (
            super().example(record),
            (self.store["top_k"], self.store["vocab"]),
        )
        length = np.shape(example.get("tokens"))
        expected = {
            "tokens": length[:1],
            "teacher_ids": (*length, top_k),
            "teacher_log_probs": (*length, top_k),
            "teacher_log_tail": length,
        }
        for key, shape in expected.items():
            if key not in example or example[key].shape != shape:
                found = list(example[key].shape) if key in example else "missing"
                raise Refused(
                    f"{record[0]}: {key} is {found}, expected {list(shape) or '[length]'} in a store of {top_k} tokens a place"
                )
        ids = example["teacher_ids"]
        if ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() < vocab):
            raise Refused(
                f"{record[0]}: teacher_ids are not 0 to {vocab - 1}, the teacher's vocabulary"
            )
        return example


def store_file(folder: Path, split: str, index: int) -> Path:
    """Where the store's file number `index` of a split is."""
    return folder / f"{split}-{index:05d}.arrayrecord"


def read_about(folder: Path) -> dict[str, Any] | None:
    """The store's description; None where there is none. Raises Refused where it cannot be read."""
    if not (folder / ABOUT).exists():
        return None
    try:
        return json.loads(contents(folder / ABOUT))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{folder / ABOUT}: not JSON ({one_line(error)})") from error


def _check_about(about: Any, file: Path) -> None:
    """Raises Refused where the description lacks what reading needs."""
    if not isinstance(about, dict):
        raise Refused(f"{file}: expected a JSON object, found {str(about)[:40]!r}")
    count = lambda n: isinstance(n, int) and not isinstance(n, bool) and n >= 0
    counts = lambda d: (
        isinstance(d, dict)
        and "train" in d
        and d.keys() <= {"train", "test"}
        and all(map(count, d.values()))
    )
    tests = {
        "data": lambda d: isinstance(d, dict),
        "top_k": count,
        "vocab": count,
        "rows": counts,
        "files": counts,
    }
    for key, fits in tests.items():
        if not fits(about.get(key)):
            raise Refused(
                f"{file}: {key!r} is {str(about.get(key))[:40]!r}, expected what tools/store_logits.py writes"
            )
