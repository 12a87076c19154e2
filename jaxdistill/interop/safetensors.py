"""The safetensors format: reading through memory maps, writing in shards.

A file is the header's length (8 bytes), the header (JSON: name -> dtype, shape, byte range) and the raw tensors. Large
models are several files and an index, `<stem>.safetensors.index.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxdistill.core.types import Refused

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


class Tensor(NamedTuple):
    """A stored tensor; only the parts of `data` that are indexed get read from the disk."""

    file: Path
    data: np.ndarray


def read_folder(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of `<stem>.safetensors`, or of the files that its index lists, by name.

    Raises Refused on a missing, truncated or malformed file, and KeyError where the folder holds neither.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise Refused(f"{index}: no weight_map (tensor name -> file)")
        files = sorted(set(weight_map.values()))
    elif (folder / f"{stem}.safetensors").exists():
        files = [f"{stem}.safetensors"]
    else:
        raise KeyError(stem)
    return {name: tensor for file in files for name, tensor in read_file(folder / file).items()}


def read_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, by name. Raises Refused where it is missing, truncated or malformed."""
    if not file.exists():
        raise Refused(f"{file}: no such file, though the index lists it")
    size = file.stat().st_size
    if size < 8:
        raise Refused(f"{file}: truncated, {size} bytes where the header's length takes 8")
    raw = np.memmap(file, mode="r")
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    if size < start:
        raise Refused(f"{file}: truncated or not safetensors, {size} bytes where the header ends at {start}")
    try:
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise Refused(f"{file}: not a safetensors header ({error})") from error
    if size != end:
        raise Refused(f"{file}: {'truncated' if size < end else 'too long'}, {size} bytes where the header says {end}")
    return {name: Tensor(file, _view(file, name, entry, raw[start:])) for name, entry in header.items()}


def _view(file: Path, name: str, entry: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise Refused(f"{file}: {name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    (low, high), dtype, shape = entry["data_offsets"], np.dtype(DTYPES[entry["dtype"]]), entry["shape"]
    if high - low != math.prod(shape) * dtype.itemsize:
        raise Refused(f"{file}: {name} takes {high - low} bytes, expected {math.prod(shape) * dtype.itemsize} for {entry['dtype']} {shape}")
    return data[low:high].view(dtype).reshape(shape)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises Refused where the file is missing or malformed."""
    if not file.exists():
        raise Refused(f"{file}: no such file")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise Refused(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Indented, keys in the given order; makes the file's folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_folder(folder: Path, stem: str, sizes: Mapping[str, int], read: Callable[[str], np.ndarray], max_shard_bytes: int) -> None:
    """Writes tensors of `sizes` (name -> bytes) into files of at most `max_shard_bytes`, one shard in memory at a time.

    A tensor larger than that has a file to itself. More than one file gets an index.
    """
    shards, room = [[]], max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    several = len(shards) > 1
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" if several else f"{stem}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards):
        save_file({name: np.ascontiguousarray(read(name)) for name in names}, folder / file, metadata={"format": "pt"})
    if several:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
