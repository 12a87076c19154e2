"""Weights in and out of the folders that PyTorch's `transformers` and `diffusers` read; torch itself is not needed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdistill.core.net import Net, make_net, paths
from jaxdistill.core.types import Array, Params, Refused
from jaxdistill.interop import dit, llama
from jaxdistill.interop.safetensors import Tensor, read_folder, read_json, whole_folder, write_folder, write_json
from jaxdistill.interop.tables import STEMS, Family, Row

FAMILIES: dict[str, Family] = {family.name: family for family in (dit.FAMILY, llama.FAMILY)}
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

Read = Callable[[tuple[slice, ...]], np.ndarray]
Place = Callable[[str, tuple[int, ...], Read], Array]


def here(path: str, shape: tuple[int, ...], read: Read) -> Array:
    """The whole leaf on the default device."""
    return jnp.asarray(read((slice(None),) * len(shape)))


def load(folder: str | Path, dtype: str = "float32", *, place: Place = here) -> tuple[Net, Params]:
    """The network that a PyTorch folder describes, and its weights in `dtype`.

    `place(path, shape, read)` makes one leaf: `read(index)` returns the part of it that a tuple of slices names, and
    reads only that from the disk, so that `lambda path, shape, read: jax.make_array_from_callback(shape,
    shardings[path], read)` fills sharded arrays, each process its own part. Raises Refused on an unsupported class or
    setting, a missing or unexpected key, another shape, and files that are truncated or pickled.
    """
    folder = Path(folder)
    family, config = _describe(folder)
    tensors = _tensors(folder, family)
    net = make_net(config, config=config)
    shapes = paths(net.shapes)
    rows = family.table(config)
    expected = {name: row.torch_shape(shapes[row.path].shape) for row in rows for name in row.names(shapes[row.path].shape)}
    _check(folder, tensors, expected, family.ignored)
    params: Params = {}
    for row in rows:
        shape = shapes[row.path].shape
        read = _reader(row, [tensors[name] for name in row.names(shape)], jnp.dtype(dtype))
        *parents, leaf = row.path.split("/")
        tree = params
        for key in parents:
            tree = tree.setdefault(key, {})
        tree[leaf] = place(row.path, shape, read)
    return net, params


def save(folder: str | Path, net: Net, params: Params, *, card: str = "", max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes a folder that PyTorch loads: configuration, weights in their own dtype, and `card` as its README.md.

    The folder appears when it is complete, and replaces an earlier model as a whole. Every leaf must be addressable
    from this process. Raises Refused where the family has no place for a weight of this net.
    """
    folder = Path(folder)
    family = next((f for f in FAMILIES.values() if isinstance(net.config, f.config)), None)
    if family is None:
        raise Refused(f"{folder}: no PyTorch class for {type(net.config).__name__}; supported: {', '.join(FAMILIES)}")
    rows, leaves = family.table(net.config), paths(params)
    known = {row.path for row in rows}
    if known != leaves.keys():
        missing, extra = sorted(known - leaves.keys()), sorted(leaves.keys() - known)
        raise Refused(f"{folder}: {family.name} needs {missing[0]}" if missing else f"{folder}: {family.name} has no place for {extra[0]}")
    for path, shape in paths(net.shapes).items():
        if leaves[path].shape != shape.shape:
            raise Refused(f"{folder}: {path} has shape {leaves[path].shape}, expected {shape.shape}")
    sources = {name: (row, i) for row in rows for i, name in enumerate(row.names(leaves[row.path].shape))}

    def read(name: str) -> np.ndarray:
        row, i = sources[name]
        leaf = leaves[row.path]
        return row.layout.to_torch(np.asarray(leaf[i] if row.stacked else leaf))

    size = lambda leaf, row: leaf.nbytes // (leaf.shape[0] if row.stacked else 1)
    sizes = {name: size(leaves[row.path], row) for name, (row, _) in sources.items()}
    with whole_folder(folder) as fresh:
        for file, value in family.write(net.config).items():
            write_json(fresh / file, value)
        write_folder(fresh, STEMS[family.library], sizes, read, max_shard_bytes)
        if card:
            (fresh / "README.md").write_text(card, encoding="utf-8")


def _describe(folder: Path) -> tuple[Family, Any]:
    """The family and our configuration of the model in `folder`."""
    if (folder / "model_index.json").exists():
        raise Refused(f"{folder}: a diffusers pipeline; give the folder of its model, such as {folder / 'transformer'}")
    config = read_json(folder / "config.json")
    name = config.get("_class_name") or (config.get("architectures") or [""])[0]
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise Refused(f"{folder / 'config.json'}: class {name!r} is not supported, only {', '.join(FAMILIES)}{hint}")
    return FAMILIES[name], FAMILIES[name].read(config, folder)


def _tensors(folder: Path, family: Family) -> dict[str, Tensor]:
    stem = STEMS[family.library]
    try:
        return read_folder(folder, stem)
    except KeyError:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if not pickled:
        raise Refused(f"{folder}: no {stem}.safetensors and no {stem}.safetensors.index.json")
    convert = f"from {family.library} import {family.name} as M; M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')"
    raise Refused(f'{folder}: {pickled[0]} is pickled and is not opened; convert it with: python -c "{convert}"')


def _check(folder: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], ignored: tuple[str, ...]) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            near = difflib.get_close_matches(name, tensors.keys() - expected.keys(), 1)
            raise Refused(f"{folder}: {name} {list(shape)} is missing" + (f"; nearest: {near[0]}" if near else ""))
        found = tensors[name].data.shape
        if found != shape:
            raise Refused(f"{tensors[name].file}: {name} has shape {list(found)}, expected {list(shape)}")
    for name in tensors.keys() - expected.keys():
        if not any(re.fullmatch(pattern, name) for pattern in ignored):
            raise Refused(f"{tensors[name].file}: {name} is unexpected")


def _reader(row: Row, tensors: list[Tensor], dtype) -> Read:
    """Reads parts of one leaf. Raises Refused where the copies of a weight differ."""
    views = [row.layout.to_jax(tensor.data) for tensor in tensors]
    for tensor, view in zip(tensors[1:], views[1:] if row.copies else ()):
        if not np.array_equal(view, views[0]):
            raise Refused(f"{tensor.file}: the copies of {row.name} differ, expected one weight repeated")

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if row.stacked:
            return np.stack([np.array(view[index[1:]], dtype) for view in views[index[0]]])
        return np.array(views[0][index], dtype)

    return read
