"""Photographs from files: Hugging Face parquet shards, or one folder per class.

They are decoded when they are read, never all at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from PIL import ExifTags, Image, UnidentifiedImageError

from jaxdistill.core.fields import Count
from jaxdistill.core.types import Refused, lookup, one_line, printable
from jaxdistill.data.base import (
    Joined,
    Records,
    Subset,
    check_share,
    contents,
    held_out,
    regular,
)

COLUMNS = ("image", "img")  # names of the picture column in Hugging Face data sets
# PIL's names of the formats that are read (JPEG includes MPO); no other decoder is called.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
# Suffixes of these formats.
SUFFIXES = (
    *(
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".webp",
        ".bmp",
        ".dib",
    ),
    *(".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Suffixes of images that PIL does not read either.
UNREAD = (
    *(
        ".heic",
        ".heif",
        ".jxl",
        ".svg",
        ".raw",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
    ),
    *(".exr", ".hdr"),
)
# Suffixes that PIL knows, but that are documents where they lie beside class folders.
DOCUMENTS = (".pdf", ".ps", ".h5", ".hdf")
# Common names of folders of held-out images.
SPLITS = ("test", "testing", "val", "valid", "validation", "dev", "eval")
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
# Of each pass of an interlaced PNG: first column and row, and the steps between columns and rows.
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
BYTES = 1 << 28  # the largest encoded image
# the largest image; decoding needs three copies of four bytes a pixel
PIXELS = 1 << 27
LABELS = (1 << 31) - 2  # the last label, so that the number of classes is an int32
TURNS = {  # EXIF orientation -> the operation that makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images(Records):
    """Base of data sets of photographs, whose middle square is cut out and resized.

    x float32 [B size size 3] in [-1, 1]; cond int32 [B], the label; null_cond the number of
    classes. Records are (name, encoded image, label). Raises Refused where an image cannot be
    decoded; the message names it.
    """

    threads: Count = 4
    size: int = 32  # pixels a side
    # mirror every other training image, drawn anew in each epoch
    flip: bool = False
    heldout: float = 0.05  # share that is held out where there are no test files

    @property
    def classes(self) -> int:
        """Number of classes in the training set."""
        raise NotImplementedError

    def known(self, label: int, name: str) -> int:
        """The label itself. Raises Refused where the training set has no such class."""
        if not 0 <= label < self.classes:
            raise Refused(
                f"{name}: label {label}, the training set has 0 to {self.classes - 1}"
            )
        return label

    def example(self, record):
        name, data, label = record
        label = self.known(label, name)
        return {
            "x": decode(data, self.size, name),
            "cond": np.int32(label),
            "null_cond": np.int32(self.classes),
        }

    def augment(self, example, rng):
        if self.flip and rng.random() < 0.5:
            return {**example, "x": example["x"][:, ::-1]}
        return example


def decode(data: bytes, size: int, name: str) -> np.ndarray:
    """The middle square of an encoded image, resized (bicubic, antialiased).

    The picture is turned upright by its EXIF orientation. Transparent pixels are put on white. Of
    an animation it is the first picture.

    Returns:
        float32 [size size 3] in [-1, 1].

    Raises:
        Refused: where the image is damaged, has none of FORMATS, more than 8 bits a channel, or
            more than BYTES or PIXELS. The message begins with `name`.
    """
    if len(data) > BYTES:
        raise Refused(f"{name}: {len(data):,} bytes, expected at most {BYTES:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_pixels(image, data, name)
        image.load()
        if image.format == "PNG":
            check_rows(data, name)
        # after loading, since PIL turns TIFF itself
        turn = TURNS.get(orientation(image))
        image = flat(image)
    except (Refused, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise Refused(
            f"{name}: damaged image, or none of {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # each of PIL's decoders has exceptions of its own
        raise Refused(f"{name}: damaged image ({one_line(error)})") from error
    image = image if turn is None else image.transpose(turn)
    width, height = image.size
    side = min(width, height)
    left = (width - side) // 2
    top = (height - side) // 2
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image, np.float32) / 127.5 - 1.0


def check_pixels(image: Image.Image, data: bytes, name: str) -> None:
    """Raises Refused where an opened image has more than PIXELS, or more than 8 bits a channel."""
    width, height = image.size
    if not 0 < width * height <= PIXELS:
        raise Refused(
            f"{name}: {width} x {height} pixels, expected at most {PIXELS:,} in all"
        )
    depth = bits(image, data)
    # PIL reads 16 bits of colour as 8 without a warning.
    if image.mode.startswith(("I", "F")) or depth > 8:
        raise Refused(
            f"{name}: pixels of mode {image.mode}, expected 8 bits a channel, found {depth}"
        )


def check_rows(data: bytes, name: str) -> None:
    """Raises Refused where a PNG holds fewer rows of pixels than its header says.

    PIL reads such a file without an error, and leaves the rest black.
    """
    width, height, depth, colours, _, _, interlaced = struct.unpack(
        ">IIBBBBB", data[16:29]
    )
    expected = 0
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns = -(-(width - left) // across)
        rows = -(-(height - top) // down)
        if columns > 0 and rows > 0:
            row_bytes = -(-columns * depth * CHANNELS[colours] // 8)
            # the first byte names the row's filter
            expected += rows * (1 + row_bytes)
    found = 0
    stream = zlib.decompressobj()
    for piece in _png_data(data):
        try:
            found += len(stream.decompress(piece))
        except zlib.error:  # beyond the data that PIL needed
            break
        if found >= expected:
            return
    found += len(stream.flush())
    if found < expected:
        raise Refused(
            f"{name}: truncated image, {found:,} bytes of pixels, expected {expected:,}"
        )


def _png_data(data: bytes, size: int = 1 << 16) -> Iterator[bytes]:
    """The content of a PNG's IDAT chunks, in pieces of up to `size` bytes.

    The pieces are small, so that each needs little memory when it is decompressed.
    """
    at = 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            for start in range(at + 8, at + 8 + length, size):
                yield data[start : min(start + size, at + 8 + length)]
        at += 12 + length


def bits(image: Image.Image, data: bytes) -> int:
    """Bits a channel of an opened image, as its format stores them."""
    if image.format == "PNG":
        return data[24]  # IHDR is the first chunk
    if image.format == "TIFF":
        return max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,)))
    if image.format == "PPM":
        coding = image.tile[0].args  # a raw mode, or that and the greatest value
        if isinstance(coding, tuple):
            return coding[1].bit_length()
        return 16 if "16" in coding else 8
    if image.format == "AVIF":
        # high_bitdepth of AV1CodecConfigurationBox, which is also set for 12 bits
        flags = data[data.find(b"av1C") + 6]
        return 10 if flags & 0x40 else 8
    return 8


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except (
        Exception
    ):  # PIL raises many kinds on damaged EXIF; the picture does not need it
        return 1


def flat(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(
        Image.new("RGBA", image.size, "white"), image
    ).convert("RGB")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetImages(Images):
    """Photographs in train-*.parquet and test-*.parquet of the folder `path`.

    The files have a struct column "image" or "img" with `bytes`, and a column of labels. The
    encoded images stay in memory; larger data sets belong in ArrayRecord files.
    """

    label: str = "label"  # column of integer labels

    def source(self, split):
        records = self._shards("train")
        if self._files("test"):
            return records if split == "train" else self._shards("test")
        return Subset(records, held_out(len(records), self.heldout, split))

    def check(self, test=True):
        """As for every data set; all labels are looked at."""
        splits = ("train", "test") if self._files("test") else ("train",)
        for split in splits:
            for shard in self._shards(split).parts:
                unknown = (shard.labels < 0) | (shard.labels >= self.classes)
                for row in np.flatnonzero(unknown)[:1]:
                    self.known(int(shard.labels[row]), f"{shard.file} row {row}")
        super().check(test)

    @functools.cached_property
    def classes(self):
        labels = np.concatenate(
            [shard.labels for shard in self._shards("train").parts]
        )
        return 1 + int(labels.max(initial=-1))

    def _files(self, split: str) -> list[Path]:
        return sorted(self.existing().glob(f"{split}-*.parquet"))

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the instances are frozen and few
    def _shards(self, split: str) -> Joined:
        files = self._files(split)
        if not files:
            raise Refused(f"data.path={self.path}: no {split}-*.parquet")
        return Joined([Shard(file, self.label) for file in files])


class Shard(Sequence):
    """One parquet file as a sequence of (name, encoded image, label).

    Raises:
        Refused: on other columns, and on a damaged file.
    """

    def __init__(self, file: Path, label: str):
        self.file = file
        regular(file)
        try:
            with pq.ParquetFile(file, memory_map=True) as parquet:
                image = _image_column(parquet.schema_arrow, label, file)
                content = parquet.schema_arrow.field(image).type.field("bytes").type
                number = parquet.schema_arrow.field(label).type
                batches = list(
                    parquet.iter_batches(1024, columns=[f"{image}.bytes", label])
                )
        except Refused:
            raise
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            LookupError,
            OverflowError,
        ) as error:
            raise Refused(
                f"{file}: damaged parquet file ({one_line(error)})"
            ) from error
        images = [batch.column(image).field("bytes") for batch in batches]
        self.images = pa.chunked_array(images, content)
        labels = pa.chunked_array(
            [batch.column(label) for batch in batches], number
        )
        if labels.null_count or not pa.types.is_integer(labels.type):
            raise Refused(
                f"{file}: column {label!r} is {labels.type} with {labels.null_count} empty rows, "
                "expected integers"
            )
        self.labels = labels.to_numpy()
        if len(self.labels) and int(self.labels.max()) > LABELS:
            raise Refused(
                f"{file} row {self.labels.argmax()}: label {self.labels.max()}, "
                f"expected at most {LABELS}"
            )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        name = f"{self.file} row {i}"
        data = self.images[i].as_py()
        if data is None:
            raise Refused(f"{name}: no image")
        return name, data, int(self.labels[i])


def _image_column(schema: pa.Schema, label: str, file: Path) -> str:
    """The name of the picture column. Raises Refused where one is missing or has another type."""
    names = schema.names
    image = next((name for name in COLUMNS if name in names), None)
    if image is None:
        raise Refused(
            f"{file}: no column {' or '.join(COLUMNS)}, found {one_line(', '.join(names))}"
        )
    lookup(
        {name: None for name in names if name.isprintable()},
        label,
        f"{file}: column",
    )
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise Refused(
            f"{file}: column {image!r} is {kind}, expected a struct with bytes"
        )
    content = kind.field("bytes").type
    if not pa.types.is_binary(content) and not pa.types.is_large_binary(content):
        raise Refused(
            f"{file}: column {image!r} is {kind}, expected bytes of the type binary"
        )
    return image


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolder(Images):
    """Images in path/train/CLASS/ and path/test/CLASS/, or in path/CLASS/ alone.

    Classes are numbered in the order of their names. No image is left out: one that would not be
    read is refused (see `_listed` and `_check_beside`). Without a test folder a share is held out
    by a hash of each image's name, so that new images do not move old ones to the other split.
    """

    def source(self, split):
        root, test = self._roots
        if test:
            return Files(self._listed(root if split == "train" else test))
        found = []
        for file, label in self._listed(root):
            is_heldout = _unit_hash(file) < check_share(self.heldout)
            if is_heldout == (split == "test"):
                found.append((file, label))
        return Files(found)

    @property
    def classes(self):
        return len(self.names)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The classes, by label."""
        root = self._roots[0]
        names = _folders(root)
        if not names:
            raise Refused(f"{root}: expected one folder per class")
        return tuple(names)

    @functools.cached_property
    def _roots(self) -> tuple[Path, Path | None]:
        """The folders of training and of held-out images; None where there is no test folder."""
        path = self.existing()
        train = path / "train"
        test = path / "test"
        if test.is_dir() and not train.is_dir():
            raise Refused(
                f"data.path={self.path}: a test folder, but no train folder"
            )
        heldout = test if test.is_dir() else None
        if not train.is_dir():
            return path, heldout
        _check_beside(path, heldout)
        return train, heldout

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the instances are frozen and few
    def _listed(self, root: Path) -> list[tuple[Path, int]]:
        """(file, label) of every image below a folder of class folders.

        Files that are no images are counted in the log.

        Raises:
            Refused: where an image would be left out, since it lies beside the class folders, in a
                folder inside them, or has a format that is not read; and where a class has none.
        """
        labels = {name: label for label, name in enumerate(self.names)}
        folders = [
            (root / name, lookup(labels, name, f"{root}: class"))
            for name in _folders(root)
        ]
        others: Counter[str] = Counter()
        found = [(_pictures(folder, others), label) for folder, label in folders]
        if not any(pictures for pictures, _ in found):
            raise Refused(
                f"{root}: no images in its class folders, expected {' '.join(SUFFIXES)}"
            )
        for (folder, _), (pictures, _) in zip(folders, found):
            if not pictures:
                raise Refused(
                    f"{folder}: no images of this class, expected {' '.join(SUFFIXES)}"
                )
        _check_no_strays(root)
        if others:
            kinds = ", ".join(
                f"{count} {kind}" for kind, count in others.most_common(8)
            )
            logging.warning(
                "%s: %d files are no images and are not read (%s)",
                root,
                others.total(),
                kinds,
            )
        return [(file, label) for pictures, label in found for file in pictures]


class Files(Sequence):
    """Image files as a sequence of (name, encoded image, label), read on access."""

    def __init__(self, listed: Sequence[tuple[Path, int]]):
        self.listed = listed

    def __len__(self):
        return len(self.listed)

    def __getitem__(self, i):
        file, label = self.listed[i]
        return str(file), contents(file, BYTES), label


def _pictures(folder: Path, others: Counter[str]) -> list[Path]:
    """The images of one class, by name.

    Hidden files are ignored. Files that are no images are counted in `others`, by suffix.

    Raises:
        Refused: on an image that would not be read, or whose name is not UTF-8.
    """
    out = []
    for file in sorted(_visible(folder)):
        if file.suffix.lower() in SUFFIXES:
            _check_name(file)
            out.append(file)
        elif file.is_dir():
            for inner in _files_below(file):
                if _is_image(inner):
                    raise Refused(
                        f"{inner}: an image in a folder inside the class folder {folder.name!r}, "
                        "expected it in that itself"
                    )
                others[_kind(inner)] += 1
        elif _is_image(file):
            raise Refused(
                f"{file}: an image of a kind that is not read, expected {' '.join(SUFFIXES)}"
            )
        else:
            others[_kind(file)] += 1
    return out


def _is_image(file: Path) -> bool:
    """Whether a file is an image, of a kind that is read or not."""
    suffix = file.suffix.lower()
    if not suffix:
        return _opens(file)
    return (
        suffix in SUFFIXES
        or suffix in UNREAD
        or suffix in Image.registered_extensions()
    )


def _kind(file: Path) -> str:
    """The name under which a file that is no image is counted: its suffix, or else its name."""
    return printable(file.suffix.lower() or file.name)


def _visible(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in the folders inside it that are not hidden."""
    for file in folder.rglob("*"):
        hidden = any(
            part.startswith(".") for part in file.relative_to(folder).parts
        )
        if not hidden and not file.is_dir():
            yield file


def _is_stray(file: Path) -> bool:
    """Whether a file outside of the class folders is an image."""
    return file.suffix.lower() not in DOCUMENTS and _is_image(file)


def _check_no_strays(root: Path) -> None:
    """Raises Refused on an image beside the folders in `root`, and on a link to nothing."""
    for file in _visible(root):
        if file.is_symlink() and not file.exists():
            raise Refused(f"{file}: a link to nothing, expected a folder")
        if not file.is_dir() and _is_stray(file):
            raise Refused(f"{file}: an image in no class folder")


def _check_beside(path: Path, test: Path | None) -> None:
    """Raises Refused on images beside the folders "train" and "test" of `path`.

    Images in a folder with another common name of held-out images are refused where there is no
    test folder; else the log names the folder.
    """
    _check_no_strays(path)
    for folder in _visible(path):
        if not folder.is_dir() or folder.name in ("train", "test"):
            continue
        first = next(filter(_is_stray, _files_below(folder)), None)
        if first is None:
            continue
        if folder.name.lower() not in SPLITS:
            raise Refused(
                f"{first}: an image beside the train folder, expected it in {path / 'train'}"
            )
        if test is None:
            raise Refused(
                f"{folder}: images beside the train folder that would not be read, "
                "expected the name 'test'"
            )
        logging.warning(
            "%s: its images are not read, those of %s are held out",
            printable(str(folder)),
            printable(str(test)),
        )


def _check_name(entry: Path) -> None:
    """Raises Refused where the name of a class or file is not UTF-8."""
    try:
        entry.name.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"{entry.parent}: the name {entry.name!r} is not UTF-8, expected one that is"
        ) from error


def _opens(file: Path) -> bool:
    """Whether a file without a suffix is an image."""
    if not file.is_file():
        return False
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except OSError:
        return False


def _folders(root: Path) -> list[str]:
    """Names of the class folders. Raises Refused on one that is not UTF-8."""
    folders = [entry for entry in _visible(root) if entry.is_dir()]
    for folder in folders:
        _check_name(folder)
    return sorted(folder.name for folder in folders)


def _unit_hash(file: Path) -> float:
    """A number in [0, 1) that depends on class and file name only."""
    digest = hashlib.blake2b(
        f"{file.parent.name}/{file.name}".encode(), digest_size=4
    ).digest()
    return int.from_bytes(digest) / 2**32
