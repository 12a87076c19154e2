"""Photographs from files: Hugging Face parquet shards, or one folder per class. Decoded when read,
never all at once.
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

from jaxdistill.core.types import Refused, lookup, one_line, printable
from jaxdistill.data.base import Joined, Records, Subset, check_share, contents, held_out, regular

COLUMNS = ("image", "img")  # what Hugging Face sets call their pictures
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "AVIF",
    "PPM",
)  # as PIL names them (JPEG: MPO too); no other decoder is asked
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
        ".gif",
        ".tif",
        ".tiff",
    ),
    *(".avif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
UNREAD = (
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
    ".exr",
    ".hdr",
)  # nor by PIL
DOCUMENTS = (
    ".pdf",
    ".ps",
    ".h5",
    ".hdf",
)  # PIL's too, but about a data set where they lie beside its class folders
SPLITS = (
    "test",
    "testing",
    "val",
    "valid",
    "validation",
    "dev",
    "eval",
)  # what held-out folders are called elsewhere
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
ADAM7 = (  # first column and row, and the steps between them, of each pass of an interlaced PNG
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
BYTES = 1 << 28  # of an encoded image
PIXELS = 1 << 27  # of an image; three copies of four bytes each while it is decoded
LABELS = (1 << 31) - 2  # the last label, so that the number of classes is an int32
TURNS = {  # EXIF orientation -> what makes the picture upright
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
    """x float32 [size, size, 3] in [-1, 1]; cond int32 label; null_cond the number of classes.

    Records are (name, encoded image, label). The middle square is cut out and resized. Raises
    Refused, naming the file or row, where an image cannot be decoded.
    """

    size: int = 32  # pixels a side
    flip: bool = False  # mirror every other training image, drawn anew in each epoch
    heldout: float = 0.05  # share kept for evaluation where the set has no test files of its own

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "size", "threads")

    @property
    def classes(self) -> int:
        """Number of classes in the training set."""
        raise NotImplementedError

    def known(self, label: int, name: str) -> int:
        """The label itself. Raises Refused, with `name`, where the training set has no such class."""
        if not 0 <= label < self.classes:
            raise Refused(f"{name}: label {label}, the training set has 0 to {self.classes - 1}")
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
        return (
            {**example, "x": example["x"][:, ::-1]} if self.flip and rng.random() < 0.5 else example
        )


def decode(data: bytes, size: int, name: str) -> np.ndarray:
    """The middle square of an encoded image, resized (bicubic, antialiased): float32 [size, size,
    3] in [-1, 1].

    It stands upright, as EXIF says; what is transparent lies on white; of several pictures (an
    animation) it is the first.
    Raises Refused, with `name`, where the image is damaged, is none of FORMATS, has more than 8
    bits a channel, or more than BYTES or PIXELS.
    """
    if len(data) > BYTES:
        raise Refused(f"{name}: {len(data):,} bytes, expected at most {BYTES:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_pixels(image, data, name)
        image.load()
        if image.format == "PNG":
            check_rows(data, name)
        turn = TURNS.get(orientation(image))  # after loading: PIL turns TIFF itself
        image = flat(image)
    except (Refused, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise Refused(f"{name}: damaged image, or none of {', '.join(FORMATS)}") from error
    except Exception as error:  # each of PIL's decoders has exceptions of its own
        raise Refused(f"{name}: damaged image ({one_line(error)})") from error
    image = image if turn is None else image.transpose(turn)
    side, left, top = min(image.size), *((s - min(image.size)) // 2 for s in image.size)
    image = image.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    return np.asarray(image, np.float32) / 127.5 - 1.0


def check_pixels(image: Image.Image, data: bytes, name: str) -> None:
    """Raises Refused where an opened image has more than PIXELS, or more than 8 bits a channel."""
    width, height = image.size
    if not 0 < width * height <= PIXELS:
        raise Refused(f"{name}: {width} x {height} pixels, expected at most {PIXELS:,} in all")
    depth = bits(image, data)
    if (
        image.mode.startswith(("I", "F")) or depth > 8
    ):  # of 16 bits of colour PIL drops 8 without a word
        raise Refused(
            f"{name}: pixels of mode {image.mode}, expected 8 bits a channel, found {depth}"
        )


def check_rows(data: bytes, name: str) -> None:
    """Raises Refused where a PNG that PIL has read holds less than the rows of its header: PIL
    leaves the rest black.
    """
    width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    expected = 0
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns = -(-(width - left) // across)
        rows = -(-(height - top) // down)
        if columns > 0 and rows > 0:
            expected += rows * (
                1 + -(-columns * depth * CHANNELS[colours] // 8)
            )  # a byte names each row's filter
    found = 0
    stream = zlib.decompressobj()
    for piece in _png_data(data):
        try:
            found += len(stream.decompress(piece))
        except zlib.error:  # past what PIL needed
            break
        if found >= expected:
            return
    found += len(stream.flush())
    if found < expected:
        raise Refused(f"{name}: truncated image, {found:,} bytes of pixels, expected {expected:,}")


def _png_data(data: bytes, size: int = 1 << 16) -> Iterator[bytes]:
    """What the IDAT chunks of a PNG hold, in pieces of up to `size` bytes, so that each inflates to
    little.
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
        how = image.tile[0].args  # a raw mode, or that and the greatest value
        return how[1].bit_length() if isinstance(how, tuple) else 16 if "16" in how else 8
    if image.format == "AVIF":
        at = data.find(b"av1C") + 6
        return (
            10 if data[at] & 0x40 else 8
        )  # high_bitdepth of AV1CodecConfigurationBox; 12 bits have it too
    return 8


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 (upright) where there is none or none that can be read, as viewers have it."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # PIL has many for damaged EXIF, and the picture is sound without it
        return 1


def flat(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetImages(Images):
    """Folder `path` of train-*.parquet and test-*.parquet: a struct column "image" or "img" with
    `bytes`, and labels.

    The encoded images stay in memory; larger sets belong into ArrayRecord files.
    """

    label: str = "label"  # column of integer labels

    def source(self, split):
        rows = self._shards("train")
        if self._files("test"):
            return rows if split == "train" else self._shards("test")
        return Subset(rows, held_out(len(rows), self.heldout, split))

    def check(self, test=True):
        """As every data set's; all labels are looked at."""
        for split in ("train", "test") if self._files("test") else ("train",):
            for shard in self._shards(split).parts:
                for row in np.flatnonzero((shard.labels < 0) | (shard.labels >= self.classes))[:1]:
                    self.known(int(shard.labels[row]), f"{shard.file} row {row}")
        super().check(test)

    @functools.cached_property
    def classes(self):
        return 1 + int(
            np.concatenate([shard.labels for shard in self._shards("train").parts]).max(initial=-1)
        )

    def _files(self, split: str) -> list[Path]:
        return sorted(self.existing().glob(f"{split}-*.parquet"))

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the instances are frozen and few
    def _shards(self, split: str) -> Joined:
        files = self._files(split)
        if not files:
            raise Refused(f"data.path={self.path}: no {split}-*.parquet")
        return Joined([Shard(file, self.label) for file in files])


class Shard(Sequence):
    """One parquet file: (name, encoded image, label) by row. Raises Refused on other columns or a
    damaged file.
    """

    def __init__(self, file: Path, label: str):
        self.file = file
        regular(file)
        try:
            with pq.ParquetFile(file, memory_map=True) as parquet:
                names = parquet.schema_arrow.names
                image = next((name for name in COLUMNS if name in names), None)
                if image is None:
                    raise Refused(
                        f"{file}: no column {' or '.join(COLUMNS)}, found {one_line(', '.join(names))}"
                    )
                lookup(
                    {name: None for name in names if name.isprintable()}, label, f"{file}: column"
                )
                kind, number = (parquet.schema_arrow.field(name).type for name in (image, label))
                if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                    raise Refused(
                        f"{file}: column {image!r} is {kind}, expected a struct with bytes"
                    )
                if not (
                    pa.types.is_binary(kind.field("bytes").type)
                    or pa.types.is_large_binary(kind.field("bytes").type)
                ):
                    raise Refused(
                        f"{file}: column {image!r} is {kind}, expected bytes of the type binary"
                    )
                batches = list(parquet.iter_batches(1024, columns=[f"{image}.bytes", label]))
        except Refused:
            raise
        except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
            raise Refused(f"{file}: damaged parquet file ({one_line(error)})") from error
        self.images = pa.chunked_array(
            [batch.column(image).field("bytes") for batch in batches], kind.field("bytes").type
        )
        labels = pa.chunked_array([batch.column(label) for batch in batches], number)
        if labels.null_count or not pa.types.is_integer(labels.type):
            raise Refused(
                f"{file}: column {label!r} is {labels.type} with {labels.null_count} empty rows, expected integers"
            )
        self.labels = labels.to_numpy()
        if len(self.labels) and int(self.labels.max()) > LABELS:
            raise Refused(
                f"{file} row {self.labels.argmax()}: label {self.labels.max()}, expected at most {LABELS}"
            )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        name = f"{self.file} row {i}"
        data = self.images[i].as_py()
        if data is None:
            raise Refused(f"{name}: no image")
        return name, data, int(self.labels[i])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolder(Images):
    """Images in path/train/CLASS/ and path/test/CLASS/, or in path/CLASS/ alone; classes in the
    order of their names. Every image is read, or one that cannot be is refused: see `_listed` and
    `_check_beside`.

    Without a test folder a share is held out by a hash of each image's name, so that new images
    move no old ones.
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
        root = self._roots[0]
        names = _folders(root)
        if not names:
            raise Refused(f"{root}: expected one folder per class")
        return tuple(names)

    @functools.cached_property
    def _roots(self) -> tuple[Path, Path | None]:
        path = self.existing()
        train = path / "train"
        test = path / "test"
        if test.is_dir() and not train.is_dir():
            raise Refused(f"data.path={self.path}: a test folder, but no train folder")
        held = test if test.is_dir() else None
        if not train.is_dir():
            return path, held
        _check_beside(path, held)
        return train, held

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the instances are frozen and few
    def _listed(self, root: Path) -> list[tuple[Path, int]]:
        """(file, label) of every picture. Raises Refused where one would be left out: beside the
        class folders, deeper in them, or of a format that is not read; and where a class has none.
        Other files are counted in the log.
        """
        labels = {name: label for label, name in enumerate(self.names)}
        folders = [(root / name, lookup(labels, name, f"{root}: class")) for name in _folders(root)]
        others: Counter[str] = Counter()
        found = [(_pictures(folder, others), label) for folder, label in folders]
        if not any(pictures for pictures, _ in found):
            raise Refused(f"{root}: no images in its class folders, expected {' '.join(SUFFIXES)}")
        for (folder, _), (pictures, _) in zip(folders, found):
            if not pictures:
                raise Refused(f"{folder}: no images of this class, expected {' '.join(SUFFIXES)}")
        _check_loose(root)
        if others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
            logging.warning(
                "%s: %d files are no images and are not read (%s)", root, others.total(), kinds
            )
        return [(file, label) for pictures, label in found for file in pictures]


class Files(Sequence):
    """Image files with their labels: (name, encoded image, label), read on access."""

    def __init__(self, listed: Sequence[tuple[Path, int]]):
        self.listed = listed

    def __len__(self):
        return len(self.listed)

    def __getitem__(self, i):
        file, label = self.listed[i]
        return str(file), contents(file, BYTES), label


def _pictures(folder: Path, others: Counter[str]) -> list[Path]:
    """The images of one class, by name. Hidden files are passed over, what is no image is counted
    in `others`, by suffix;
    raises Refused on an image that would not be read, or whose name is not UTF-8.
    """
    out = []
    for file in sorted(_seen(folder)):
        if file.suffix.lower() in SUFFIXES:
            _check_name(file)
            out.append(file)
        elif file.is_dir():
            for deep in _deep(file):
                if _pictured(deep):
                    raise Refused(
                        f"{deep}: an image in a folder inside the class folder {folder.name!r}, expected it in that itself"
                    )
                others[_sort(deep)] += 1
        elif _pictured(file):
            raise Refused(
                f"{file}: an image of a kind that is not read, expected {' '.join(SUFFIXES)}"
            )
        else:
            others[_sort(file)] += 1
    return out


def _pictured(file: Path) -> bool:
    """Whether a file is an image, of a kind that is read or not."""
    suffix = file.suffix.lower()
    if not suffix:
        return _opens(file)
    return suffix in SUFFIXES or suffix in UNREAD or suffix in Image.registered_extensions()


def _sort(file: Path) -> str:
    """Under what a file that is no image is counted."""
    return printable(file.suffix.lower() or file.name)


def _seen(folder: Path) -> list[Path]:
    """What a folder holds, hidden things apart."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _deep(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those inside it, hidden ones apart."""
    for file in folder.rglob("*"):
        if not file.is_dir() and not any(
            part.startswith(".") for part in file.relative_to(folder).parts
        ):
            yield file


def _loose(file: Path) -> bool:
    """Whether a file outside of the class folders is an image."""
    return file.suffix.lower() not in DOCUMENTS and _pictured(file)


def _check_loose(root: Path) -> None:
    """Raises Refused on an image that lies beside folders, and on a link to a folder that is not
    there.
    """
    for file in _seen(root):
        if file.is_symlink() and not file.exists():
            raise Refused(f"{file}: a link to nothing, expected a folder")
        if not file.is_dir() and _loose(file):
            raise Refused(f"{file}: an image in no class folder")


def _check_beside(path: Path, test: Path | None) -> None:
    """Raises Refused on images beside the folders "train" and "test" of `path`, and where held-out
    ones are in a folder of another name than "test". With a test folder, further held-out ones are
    named in the log.
    """
    _check_loose(path)
    for folder in _seen(path):
        if not folder.is_dir() or folder.name in ("train", "test"):
            continue
        first = next(filter(_loose, _deep(folder)), None)
        if first is None:
            continue
        if folder.name.lower() not in SPLITS:
            raise Refused(
                f"{first}: an image beside the train folder, expected it in {path / 'train'}"
            )
        if test is None:
            raise Refused(
                f"{folder}: images beside the train folder that would not be read, expected the name 'test'"
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
    folders = [entry for entry in _seen(root) if entry.is_dir()]
    for folder in folders:
        _check_name(folder)
    return sorted(folder.name for folder in folders)


def _unit_hash(file: Path) -> float:
    """A number in [0, 1) that depends on class and file name only."""
    digest = hashlib.blake2b(f"{file.parent.name}/{file.name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32
