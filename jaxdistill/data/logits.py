"""A teacher's log-probabilities on a data set, stored once by tools/store_logits.py."""

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
    """The samples of another data set with its teacher's distribution of the next token.

    teacher_ids int32 [B T K] are the likeliest tokens after each position, the likeliest first;
    teacher_log_probs [B T K] are their log-probabilities, and teacher_log_tail [B T] is the
    log-probability of all other tokens together. The other keys are those of the data set that was
    read.

    `path` is the store's folder. Raises Refused where it is no store, or is not complete.
    """

    @functools.cached_property
    def store(self) -> dict[str, Any]:
        """The store's description.

        It holds teacher, data, top_k, temperature, dtype and vocab, and the number of samples and
        of files of each split.
        """
        folder = self.existing()
        about = read_about(folder)
        if about is None:
            raise Refused(
                f"data.path={self.path}: no {ABOUT}, expected a folder that "
                "tools/store_logits.py made"
            )
        _check_about(about, folder / ABOUT)
        there = {file.name for file in folder.iterdir()}
        for split, files in about["files"].items():
            expected = [
                store_file(folder, split, i) for i in range(min(files, len(there)))
            ]
            made = sum(file.name in there for file in expected)
            if made < files:
                raise Refused(
                    f"data.path={self.path}: {made} of {files} {split} files; "
                    "tools/store_logits.py goes on where it stopped"
                )
        return about

    @property
    def vocab_size(self):
        """That of the data that was read, or the teacher's where its tokenizer is missing."""
        try:
            return self.texts.vocab_size or self.store["vocab"]
        except Refused:
            return self.store["vocab"]

    @functools.cached_property
    def texts(self):
        """The data set that was read."""
        return build(ConfigDict(self.store["data"]))

    def source(self, split):
        counts = self.store["rows"]
        records = super().source(split)
        # Without test samples a share of the training samples is held out.
        stored = counts.get(split) if counts.get("test") else None
        if stored is not None and len(records) != stored:
            raise Refused(
                f"data.path={self.path}: {len(records)} {split} rows, {ABOUT} says {stored}"
            )
        return records

    def example(self, record):
        """Raises Refused on a record that is not of this store's sizes."""
        example = super().example(record)
        top_k = self.store["top_k"]
        vocab = self.store["vocab"]
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
                    f"{record[0]}: {key} is {found}, expected {list(shape) or '[length]'} in a "
                    f"store of {top_k} tokens a place"
                )
        ids = example["teacher_ids"]
        if ids.dtype.kind not in "iu" or (
            ids.size and not 0 <= ids.min() <= ids.max() < vocab
        ):
            raise Refused(
                f"{record[0]}: teacher_ids are not 0 to {vocab - 1}, the teacher's vocabulary"
            )
        return example


def store_file(folder: Path, split: str, index: int) -> Path:
    """The path of file number `index` of a split."""
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
    tests = {
        "data": lambda value: isinstance(value, dict),
        "top_k": _is_count,
        "vocab": _is_count,
        "rows": _are_counts,
        "files": _are_counts,
    }
    for key, fits in tests.items():
        if not fits(about.get(key)):
            raise Refused(
                f"{file}: {key!r} is {str(about.get(key))[:40]!r}, expected what "
                "tools/store_logits.py writes"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_counts(value: Any) -> bool:
    """Whether a value is a count for "train", and perhaps one for "test"."""
    if (
        not isinstance(value, dict)
        or "train" not in value
        or value.keys() - {"train", "test"}
    ):
        return False
    return all(map(_is_count, value.values()))
