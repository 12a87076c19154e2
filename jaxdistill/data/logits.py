"""What a teacher said of a data set, stored once (tools/store_logits.py) and read many times."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from jaxdistill.core.build import build
from jaxdistill.core.types import Refused
from jaxdistill.data.arrayrecord import ArrayRecords

ABOUT = "store.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredLogits(ArrayRecords):
    """The keys of the data set that was read, and the teacher's law of the token after each position: teacher_ids int32
    [T k], the likeliest tokens first, teacher_log_probs [T k], and teacher_log_tail [T], the log mass of all others.

    `path` is the store's folder. Raises Refused where it is no store, or one that is not complete.
    """

    @functools.cached_property
    def store(self) -> dict[str, Any]:
        """What the store was made with: teacher, data, top_k, temperature, dtype, vocab, and its splits' numbers of files."""
        folder = self.existing()
        about = read_about(folder)
        if about is None:
            raise Refused(f"data.path={self.path}: no {ABOUT}, expected a folder that tools/store_logits.py made")
        for split, files in about["files"].items():
            made = sum(store_file(folder, split, i).exists() for i in range(files))
            if made < files:
                raise Refused(f"data.path={self.path}: {made} of {files} {split} files; tools/store_logits.py goes on where it stopped")
        return about

    @functools.cached_property
    def texts(self):
        return build(self.store["data"])

    def source(self, split):
        _ = self.store
        return super().source(split)


def store_file(folder: Path, split: str, index: int) -> Path:
    """Where the store's file number `index` of a split is."""
    return folder / f"{split}-{index:05d}.arrayrecord"


def read_about(folder: Path) -> dict[str, Any] | None:
    """The store's description; None where there is none. Raises Refused where it cannot be read."""
    try:
        return json.loads((folder / ABOUT).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise Refused(f"{folder / ABOUT}: not JSON ({error})") from error
