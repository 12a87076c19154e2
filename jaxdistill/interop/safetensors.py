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

from jaxdistill.core.types import Refused

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


class Tensor(NamedTuple):
    """A stored tensor; only the parts of `data` that are indexed get read from the disk."""

    file: Path
    data: np.ndarray


def shown(value: Any, most: int = 120) -> str:
    """A name or value out of a file as a part of one line: text as it is where it is printable,
    else as Python writes it, cut.
    """
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def read_folder(folder: Path, stem: str, *, index_first: bool = False) -> dict[str, Tensor]:
    """All tensors of `<stem>.safetensors`, or of the files that its index lists, by name.

    Where a folder holds both, the file counts, as in transformers; with `index_first` the index, as
    in diffusers.
    Raises Refused on a missing, truncated or malformed file, an index that is malformed, leads out
    of the folder or names a tensor where it is not, and a tensor that two files hold with different
    values; KeyError where the folder holds neither.
    """
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    weight_map = _weight_map(index) if index.exists() else {}
    if single.exists() and not (index_first and weight_map):
        return read_file(single)
    if not weight_map:
        raise KeyError(stem)
    files = {file: read_file(_inside(folder, file)) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise Refused(
                f"{index}: weight_map puts {shown(name)} into {file}, which does not hold it"
            )
    found = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            add(found, name, tensor, over=weight_map.get(name) == file)
    return found


def add(found: dict[str, Tensor], name: str, tensor: Tensor, *, over: bool = False) -> None:
    """Adds a tensor, or takes its place with `over`. Raises Refused where one of that name but of
    other values is there.
    """
    first = found.setdefault(name, tensor)
    if first is not tensor and not same(first, tensor):
        files = " and ".join(dict.fromkeys(str(t.file) for t in (first, tensor)))
        raise Refused(
            f"{files}: {shown(name)} is stored twice with different values, expected it once"
        )
    if over:
        found[name] = tensor


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two stored tensors are equal bit for bit; read in pieces of 64 MiB."""
    if a.data.dtype != b.data.dtype or a.data.shape != b.data.shape:
        return False
    one, two = (tensor.data.reshape(-1).view(np.uint8) for tensor in (a, b))
    return all(
        np.array_equal(one[i : i + 2**26], two[i : i + 2**26]) for i in range(0, len(one), 2**26)
    )


def _weight_map(index: Path) -> dict[str, str]:
    """An index's tensor name -> file name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused(f"{index}: no weight_map (tensor name -> file)")
    for name, file in weight_map.items():
        plain = (
            isinstance(file, str)
            and file.isprintable()
            and not set(file) & set("/\\")
            and len(file.encode()) <= 255
        )
        if not plain or not file.endswith(".safetensors"):
            raise Refused(
                f"{index}: weight_map puts {shown(name)} into {shown(file)}, expected the name of a .safetensors file beside it"
            )
    return weight_map


def _inside(folder: Path, file: str) -> Path:
    """A file that an index lists, which links may not lead out of the folder; but those of a hub's
    cache lead to its blobs.
    """
    found = folder / file
    real = (folder / file).resolve()
    home = folder.resolve()
    blobs = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if home not in real.parents and real.parent not in blobs:
        raise Refused(
            f"{found}: is a link to {real}, expected a file inside the folder, since the index lists it"
        )
    return found


def read_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, by name. Raises Refused where it is missing, truncated or malformed."""
    if not file.exists():
        raise Refused(f"{file}: no such file, though the index lists it")
    with _readable(file):
        size = file.stat().st_size
        if size < 8:
            raise Refused(f"{file}: truncated, {size} bytes where the header's length takes 8")
        raw = np.memmap(file, mode="r")
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    if size < start:
        raise Refused(
            f"{file}: truncated or not safetensors, {size} bytes where the header ends at {start}"
        )
    if start > LARGEST_HEADER:
        raise Refused(
            f"{file}: not a safetensors header ({start - 8} bytes long, expected at most {LARGEST_HEADER})"
        )
    try:
        header = json.loads(
            raw[8:start].tobytes().decode(), object_pairs_hook=_once, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        raise Refused(f"{file}: not a safetensors header ({shown(str(error))})") from error
    if not isinstance(header, dict):
        raise Refused(
            f"{file}: not a safetensors header ({type(header).__name__}, expected an object)"
        )
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _check_entry(file, name, entry)
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise Refused(
            f"{file}: {'truncated' if size < end else 'too long'}, {size} bytes where the header says {end}"
        )
    _check_order(file, header)
    return {
        name: Tensor(file, _view(file, name, entry, raw[start:])) for name, entry in header.items()
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} stands twice")
        found[key] = value
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _check_entry(file: Path, name: str, entry: Any) -> None:
    """Raises Refused where a tensor's entry in the header is no dtype, shape and byte range that
    agree.
    """
    where = f"{file}: {shown(name)}"
    if not isinstance(entry, dict):
        raise Refused(
            f"{where} is {shown(entry)} in the safetensors header, expected dtype, shape and data_offsets"
        )
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise Refused(f"{where} has no {key} in the safetensors header")
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused(f"{where} has dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if (
        not isinstance(shape, list)
        or len(shape) > 32
        or not all(type(n) is int and 0 <= n < 2**48 for n in shape)
    ):
        raise Refused(f"{where} has shape {shown(shape)}, expected at most 32 whole numbers")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and 0 <= n < 2**63 for n in offsets)
    ):
        raise Refused(f"{where} has data_offsets {shown(offsets)}, expected two whole numbers")
    low, high = offsets
    taken = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if high - low != taken:
        raise Refused(
            f"{where} takes {high - low} bytes, expected {shown(taken)} for {dtype} {shown(shape)}"
        )


def _check_order(file: Path, header: Mapping[str, Any]) -> None:
    """Raises Refused where the tensors do not follow each other without gap and overlap."""
    end = 0
    for (low, high), name in sorted(
        (tuple(entry["data_offsets"]), name) for name, entry in header.items()
    ):
        if low != end:
            fault = "overlaps the tensor before it" if low < end else "leaves a gap before it"
            raise Refused(f"{file}: {shown(name)} begins at byte {low}, expected {end}: {fault}")
        end = high


def _view(file: Path, name: str, entry: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    (low, high), dtype, shape = (
        entry["data_offsets"],
        np.dtype(DTYPES[entry["dtype"]]),
        entry["shape"],
    )
    try:
        return data[low:high].view(dtype).reshape(shape)
    except ValueError as error:  # of no elements, and too large all the same
        raise Refused(f"{file}: {shown(name)} has shape {shown(shape)} ({error})") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, in UTF-8 with or without a byte order mark.

    Raises Refused where the file is missing, malformed or longer than 100 MB, or an object has two
    values for one key.
    """
    if not file.exists():
        raise Refused(f"{file}: no such file")
    with _readable(file):
        if file.stat().st_size > LARGEST_HEADER:
            raise Refused(
                f"{file}: {file.stat().st_size} bytes of JSON, expected at most {LARGEST_HEADER}"
            )
        raw = file.read_bytes()
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_one_value)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{file}: not JSON ({shown(str(error))})") from error
    if not isinstance(value, dict):
        raise Refused(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _one_value(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"{shown(key)} stands twice with different values")
    return found


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Raises Refused where the system does not let us read the file."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{file}: cannot be read ({error.strerror or error})") from error


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Indented, keys in the given order; makes the file's folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_folder(
    folder: Path,
    stem: str,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes tensors of `sizes` (name -> bytes) into files of at most `max_shard_bytes`, one shard
    in memory at a time.

    A tensor larger than that has a file to itself. More than one file gets an index.
    """
    shards = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    several = len(shards) > 1
    files = [
        f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" if several else f"{stem}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    for file, names in zip(files, shards):
        save_file(
            {name: np.ascontiguousarray(read(name)) for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
    if several:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        write_json(
            folder / f"{stem}.safetensors.index.json",
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
        )
