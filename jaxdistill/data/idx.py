"""MNIST and similar data sets in their own format, IDX files, plain or gzipped.

Source: yann.lecun.com/exdb/mnist.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from pathlib import Path

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.data.base import InMemory, contents

PREFIX = {"train": "train", "test": "t10k"}
DENSEST = 1032  # the most bytes that deflate can pack into one
UNSIGNED_BYTES = 0x08  # the header's code for the element type


@dataclasses.dataclass(frozen=True, kw_only=True)
class IDX(InMemory):
    """x float32 [B H W 1] in [-1, 1]; cond int32 [B], the label; null_cond the number of classes.

    The folder `path` holds train-images-idx3-ubyte and train-labels-idx1-ubyte, and the held-out
    t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each plain or with ".gz". Raises Refused
    where a file is missing, truncated or of another format.
    """

    size: int = 0  # pixels a side after padding with black (-1); 0: as stored

    @functools.cached_property
    def classes(self) -> int:
        """Number of classes in the training set."""
        return int(self._read("train", "labels", 1).max()) + 1

    def arrays(self, split):
        classes = self.classes
        images = self._read(split, "images", 3)
        labels = self._read(split, "labels", 1)
        if len(images) != len(labels):
            raise Refused(
                f"data.path={self.path}: {PREFIX[split]} has {len(images)} images and "
                f"{len(labels)} labels"
            )
        if labels.max() >= classes:
            raise Refused(
                f"data.path={self.path}: {PREFIX[split]} has label {labels.max()}, "
                f"the training set 0 to {classes - 1}"
            )
        if self.size:
            images = np.pad(images, [(0, 0), *map(self._margins, images.shape[1:])])
        x = images.astype(np.float32)
        x /= 127.5  # in place, since several copies may not fit in memory
        x -= 1.0
        label = labels.astype(np.int32)
        return {
            "x": x[..., None],
            "cond": label,
            "null_cond": np.full_like(label, classes),
        }

    def _margins(self, side: int) -> tuple[int, int]:
        """Pixels of padding before and after a side."""
        room = self.size - side
        if room < 0:
            raise Refused(
                f"data.size={self.size}: the images have {side} pixels a side, and are padded only"
            )
        return room // 2, room - room // 2

    def _read(self, split: str, kind: str, axes: int) -> np.ndarray:
        folder = self.existing()
        name = f"{PREFIX[split]}-{kind}-idx{axes}-ubyte"
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return read(file, axes)
        raise Refused(f"data.path={self.path}: no file {name} or {name}.gz")


def read(file: Path, axes: int) -> np.ndarray:
    """The uint8 array with `axes` axes in an IDX file, gzipped where its name ends in ".gz".

    Raises:
        Refused: where header or length say something else.
    """
    raw = contents(file)
    start = 4 + 4 * axes
    head = _gunzip(file, raw, start) if file.suffix == ".gz" else raw
    if len(head) < start:
        raise Refused(
            f"{file}: expected a header of {start} bytes, found {len(head)} in all"
        )
    expected = bytes([0, 0, UNSIGNED_BYTES, axes])
    if head[:4] != expected:
        raise Refused(
            f"{file}: begins with 0x{head[:4].hex()}, expected 0x{expected.hex()} "
            f"(unsigned bytes, {axes} axes)"
        )
    shape = np.frombuffer(head, ">u4", axes, 4).tolist()
    size = start + math.prod(shape)
    if not math.prod(shape):
        raise Refused(f"{file}: holds no samples, its shape is {tuple(shape)}")
    if size > len(raw) * (DENSEST if file.suffix == ".gz" else 1):
        raise Refused(
            f"{file}: expected {size} bytes for shape {tuple(shape)}, found {len(raw)} in the file"
        )
    data = _gunzip(file, raw, size + 1) if file.suffix == ".gz" else raw
    if len(data) != size:
        more = "more" if len(data) > size else f"{len(data)}"
        raise Refused(
            f"{file}: expected {size} bytes for shape {tuple(shape)}, found {more}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _gunzip(file: Path, raw: bytes, most: int) -> bytes:
    """The first `most` bytes that a gzip file holds; fewer where it is truncated.

    Raises:
        Refused: where it is no gzip file, or its checksum is wrong.
    """
    data = b""
    try:
        while raw and len(data) < most:
            member = zlib.decompressobj(wbits=31)
            data += member.decompress(raw, most - len(data))
            raw = member.unused_data
    except zlib.error as error:
        raise Refused(f"{file}: expected a gzip file ({error})") from error
    return data
