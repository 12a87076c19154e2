"""The safetensors format: reading through memory maps, writing in shards.

A file is the header's length (8 bytes), the header (JSON: name -> dtype, shape, byte range) and the
raw tensors. Large models are several files and an index, `<stem>.safetensors.index.json`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxdistill.core.types import Refused, one_line, quoted

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
LARGEST_HEADER = 100_000_000  # bytes; the format's own reader takes no more
PIECE = 2**26  # bytes that are compared at once


class Tensor(NamedTuple):
    """A stored tensor. `data` is a memory map: only the parts that are indexed are read."""

    file: Path
    data: np.ndarray


def shown(name: str) -> str:
    """A name out of a file as a part of a message: quoted where it cannot be printed."""
    return quoted(name) if not name.isprintable() or len(name) > 120 else name


def read_folder(
    folder: Path, stem: str, *, index_first: bool = False
) -> dict[str, Tensor]:
    """All tensors of `<stem>.safetensors`, or of the files that its index lists, by name.

    Args:
        folder: The model's folder.
        stem: The name of its files, without number and ending.
        index_first: Whether the index counts where the folder has both, as in diffusers; otherwise
            the single file counts, as in transformers.

    Raises:
        Refused: A file is missing, truncated or malformed; the index is malformed, leads out of the
            folder or names a tensor where it is not; two files hold a tensor with different values.
        KeyError: The folder has neither.
    """
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    weight_map = _weight_map(index) if index.exists() else {}
    if single.exists() and not (index_first and weight_map):
        return read_file(single)
    if not weight_map:
        raise KeyError(stem)
    names = sorted(set(weight_map.values()))
    files = {file: read_file(_inside(folder, file)) for file in names}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise Refused(
                f"{index}: weight_map puts {shown(name)} into {file}, which does not hold it"
            )
    found = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            add(found, name, tensor, replace=weight_map.get(name) == file)
    return found


def add(
    found: dict[str, Tensor], name: str, tensor: Tensor, *, replace: bool = False
) -> None:
    """Puts a tensor into `found`; with `replace` also where there is an equal one of that name.

    Raises Refused where one of that name has other values.
    """
    first = found.setdefault(name, tensor)
    if first is not tensor and not same(first, tensor):
        files = " and ".join(dict.fromkeys(str(t.file) for t in (first, tensor)))
        raise Refused(
            f"{files}: {shown(name)} is stored twice with different values, expected it once"
        )
    if replace:
        found[name] = tensor


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two stored tensors are equal bit for bit; they are read in pieces."""
    if a.data.dtype != b.data.dtype or a.data.shape != b.data.shape:
        return False
    one = a.data.reshape(-1).view(np.uint8)
    two = b.data.reshape(-1).view(np.uint8)
    for low in range(0, len(one), PIECE):
        piece = slice(low, low + PIECE)
        if not np.array_equal(one[piece], two[piece]):
            return False
    return True


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, out of an index. Raises Refused where it has none."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused(f"{index}: no weight_map (tensor name -> file)")
    for name, file in weight_map.items():
        if not _is_file_name(file):
            raise Refused(
                f"{index}: weight_map puts {shown(name)} into {quoted(file)}, expected the name of "
                "a .safetensors file beside it"
            )
    return weight_map


def _is_file_name(file: Any) -> bool:
    """Whether a value is the name of a safetensors file, without a folder."""
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        return False
    return (
        file.isprintable()
        and not set(file) & set("/\\")
        and len(file.encode()) <= 255
    )


def _inside(folder: Path, file: str) -> Path:
    """The path of a file that an index lists.

    Raises Refused where a link leads out of the folder, other than to the blobs of a hub's cache.
    """
    path = folder / file
    real = path.resolve()
    home = folder.resolve()
    blobs = [
        parent.parent / "blobs"
        for parent in home.parents
        if parent.name == "snapshots"
    ]
    if home not in real.parents and real.parent not in blobs:
        raise Refused(
            f"{path}: is a link to {real}, expected a file inside the folder, since the index "
            "lists it"
        )
    return path


def read_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, by name.

    Raises Refused where the file is missing, truncated or malformed.
    """
    if not file.exists():
        raise Refused(f"{file}: no such file, though the index lists it")
    with _readable(file):
        size = file.stat().st_size
        if size < 8:
            raise Refused(
                f"{file}: truncated, {size} bytes where the header's length takes 8"
            )
        raw = np.memmap(file, mode="r")
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    if size < start:
        raise Refused(
            f"{file}: truncated or not safetensors, {size} bytes where the header ends at {start}"
        )
    if start > LARGEST_HEADER:
        raise Refused(
            f"{file}: not a safetensors header ({start - 8} bytes long, expected at most "
            f"{LARGEST_HEADER})"
        )
    header = _header(file, raw[8:start].tobytes())
    end = start + max(
        (entry["data_offsets"][1] for entry in header.values()), default=0
    )
    if size != end:
        fault = "truncated" if size < end else "too long"
        raise Refused(f"{file}: {fault}, {size} bytes where the header says {end}")
    _check_order(file, header)
    data = raw[start:]
    return {
        name: Tensor(file, _view(file, name, entry, data))
        for name, entry in header.items()
    }


def _header(file: Path, text: bytes) -> dict[str, Any]:
    """Tensor name -> dtype, shape and byte range. Raises Refused where the header is malformed."""
    try:
        header = json.loads(
            text.decode(),
            object_pairs_hook=_with_distinct_keys,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"{file}: not a safetensors header ({one_line(error, 120)})"
        ) from error
    if not isinstance(header, dict):
        raise Refused(
            f"{file}: not a safetensors header ({type(header).__name__}, expected an object)"
        )
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _check_entry(file, name, entry)
    return header


def _with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header. Raises ValueError where a key occurs twice."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} stands twice")
        found[key] = value
    return found


def _no_number(text: str) -> None:
    """Raises ValueError for NaN and infinities, which JSON does not have."""
    raise ValueError(f"{text} is not JSON")


def _check_entry(file: Path, name: str, entry: Any) -> None:
    """Raises Refused where a tensor's entry in the header is no dtype, shape and byte range that
    agree.
    """
    where = f"{file}: {shown(name)}"
    if not isinstance(entry, dict):
        raise Refused(
            f"{where} is {quoted(entry)} in the safetensors header, expected dtype, shape and "
            "data_offsets"
        )
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise Refused(f"{where} has no {key} in the safetensors header")
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused(
            f"{where} has dtype {quoted(dtype)}, expected one of {', '.join(DTYPES)}"
        )
    if not _are_numbers(shape, below=2**48) or len(shape) > 32:
        raise Refused(
            f"{where} has shape {quoted(shape)}, expected at most 32 whole numbers"
        )
    if not _are_numbers(offsets, below=2**63) or len(offsets) != 2:
        raise Refused(
            f"{where} has data_offsets {quoted(offsets)}, expected two whole numbers"
        )
    low, high = offsets
    expected = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if high - low != expected:
        raise Refused(
            f"{where} takes {high - low} bytes, expected {quoted(expected)} for {dtype} "
            f"{quoted(shape)}"
        )


def _are_numbers(values: Any, below: int) -> bool:
    """Whether a value is a list of whole numbers of at least 0."""
    if not isinstance(values, list):
        return False
    return all(type(n) is int and 0 <= n < below for n in values)


def _check_order(file: Path, header: Mapping[str, Any]) -> None:
    """Raises Refused where the tensors do not follow each other without gap and overlap."""
    ranges = sorted(
        (tuple(entry["data_offsets"]), name) for name, entry in header.items()
    )
    end = 0
    for (low, high), name in ranges:
        if low != end:
            fault = (
                "overlaps the tensor before it"
                if low < end
                else "leaves a gap before it"
            )
            raise Refused(
                f"{file}: {shown(name)} begins at byte {low}, expected {end}: {fault}"
            )
        end = high


def _view(
    file: Path, name: str, entry: Mapping[str, Any], data: np.ndarray
) -> np.ndarray:
    """A tensor in the bytes behind the header."""
    low, high = entry["data_offsets"]
    shape = entry["shape"]
    try:
        return data[low:high].view(np.dtype(DTYPES[entry["dtype"]])).reshape(shape)
    except (
        ValueError
    ) as error:  # a shape without elements that is too large for numpy
        raise Refused(
            f"{file}: {shown(name)} has shape {quoted(shape)} ({error})"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, in UTF-8 with or without a byte order mark.

    Raises Refused where the file is missing, malformed or longer than 100 MB, or where an object
    has two values for one key.
    """
    if not file.exists():
        raise Refused(f"{file}: no such file")
    with _readable(file):
        size = file.stat().st_size
        if size > LARGEST_HEADER:
            raise Refused(
                f"{file}: {size} bytes of JSON, expected at most {LARGEST_HEADER}"
            )
        raw = file.read_bytes()
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_one_value)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{file}: not JSON ({one_line(error, 120)})") from error
    if not isinstance(value, dict):
        raise Refused(
            f"{file}: expected a JSON object, found {type(value).__name__}"
        )
    return value


def _one_value(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where a key has two values."""
    found = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"{shown(key)} stands twice with different values")
    return found


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Raises Refused where the operating system refuses to read the file."""
    try:
        yield
    except OSError as error:
        raise Refused(
            f"{file}: cannot be read ({error.strerror or error})"
        ) from error


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented, its keys in the given order; makes the file's folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_folder(
    folder: Path,
    stem: str,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes tensors into one or several files, with an index where there are several.

    One file is in memory at a time.

    Args:
        folder: The model's folder.
        stem: The name of its files, without number and ending.
        sizes: Tensor name -> bytes, in the order in which the tensors are written.
        read: Tensor name -> the tensor.
        max_shard_bytes: The most in a file; a tensor larger than that has a file to itself.
    """
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        numbered = f"{stem}-{i:05d}-of-{count:05d}.safetensors"
        file = f"{stem}.safetensors" if count == 1 else numbered
        write_tensors(folder / file, {name: read(name) for name in names})
        weight_map |= dict.fromkeys(names, file)
    if count > 1:
        total = {"total_size": sum(sizes.values())}
        index = folder / f"{stem}.safetensors.index.json"
        write_json(index, {"metadata": total, "weight_map": weight_map})


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file of tensors, which PyTorch's libraries read."""
    contiguous = {
        name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()
    }
    save_file(contiguous, file, metadata={"format": "pt"})
