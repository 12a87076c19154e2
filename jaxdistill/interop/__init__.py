"""Weights in and out of the folders that PyTorch's `transformers` and `diffusers` read; torch
itself is not needed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.net import Net, make_net, paths
from jaxdistill.core.types import Array, Params, Refused, lookup
from jaxdistill.interop import settings
from jaxdistill.interop.families import (
    bert,
    clip,
    dit,
    edm,
    gemma,
    llama,
    lpips,
    neox,
    qwen_image,
    sam,
    sana,
    t5,
    unet,
    vae,
    vae_dc,
    vae_wan,
    vit,
    wan,
)
from jaxdistill.interop.folder import put, whole_folder
from jaxdistill.interop.safetensors import (
    Tensor,
    add,
    read_folder,
    read_json,
    same,
    shown,
    write_folder,
)
from jaxdistill.interop.tables import STEMS, Family, Row, fixed, literal, shell

FAMILIES: tuple[
    Family, ...
] = (  # of two with a name, parts of a common folder, the first is taken where no net says which
    bert.CLASSIFIER,
    bert.FAMILY,
    bert.MASKED,
    clip.JOINT_VISION,
    clip.JOINT_TEXT,
    clip.TEXT_PROJECTED,
    clip.TEXT_TOWER,
    clip.VISION_PROJECTED,
    clip.VISION_TOWER,
    dit.FAMILY,
    edm.DHARIWAL,
    edm.SONG,
    gemma.FAMILY,
    gemma.TEXT,
    llama.FAMILY,
    llama.QWEN2,
    llama.QWEN3,
    llama.QWEN_VL,
    lpips.FAMILY,
    neox.FAMILY,
    qwen_image.FAMILY,
    sam.FAMILY,
    sam.WHOLE,
    sana.FAMILY,
    t5.ENCODER,
    t5.FAMILY,
    t5.UMT5_ENCODER,
    unet.FAMILY,
    vae.FAMILY,
    vae_dc.FAMILY,
    vae_wan.FAMILY,
    vae_wan.QWEN,
    vit.CLASSIFIER,
    vit.FAMILY,
    wan.FAMILY,
)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
STORED = {
    "quantization_config": None,
    "compression_config": None,
    "transformers_weights": None,
}  # how and where weights are stored
# what FP8, GPTQ, AWQ, bitsandbytes, HQQ and compressed-tensors keep beside weights that are no
# plain floats
QUANTISED = re.compile(
    r"(.*\.)?((weight|input|output|k|v)_scale(_inv|_2)?|scale_(weight|input)|scaled_fp8|scales|weight_(packed|shape|zero_point|g_idx)|"
    r"qweight|qzeros|zeros|g_idx|W_q|SCB|weight_format|(nested_)?(absmax|quant_map)|quant_state\..*)"
)


def describe(folder: str | Path) -> Any:
    """Our configuration of the model in `folder`: a dataclass that `make_net` builds. Reads no
    weights.

    Raises Refused on an unsupported class or setting, and on sizes that make no network.
    """
    return _network(Path(folder)).config


def load(folder: str | Path, dtype: str = "float32") -> tuple[Net, Params]:
    """The network that a folder describes, and its weights in `dtype` on the default device.

    Raises Refused as `load_into` does.
    """
    net = _network(Path(folder))
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype)), net.shapes)
    return net, load_into(folder, net, abstract)


def load_into(folder: str | Path, net: Net, abstract: Params) -> Params:
    """The folder's weights for a net of ours, in the dtypes and shardings of `abstract`
    (ShapeDtypeStructs).

    Leaf by leaf and shard by shard: each process reads the bytes of its own shards only. Raises
    Refused on an unsupported class or setting, a network other than `net`, a missing or unexpected
    key, another shape, and on files that are truncated or pickled.
    """
    folder = Path(folder)
    family, config = _describe(folder, net)
    _same_network(folder, family, config, net)
    tensors = _tensors(folder, family)
    leaves = paths(abstract)
    rows = family.table(config)
    _check_paths(folder, family, rows, leaves)
    expected = {name: row.torch_shape(leaves[row.path].shape) for row, name in _names(rows, leaves)}
    tensors = _untied(tensors, {copy: name for copy, name in family.tied if copy not in expected})
    _check_keys(folder, tensors, expected, family.ignored)
    filled = {
        row.path: _place(
            leaves[row.path], _reader(row, [tensors[n] for n in row.names(leaves[row.path].shape)])
        )
        for row in rows
    }
    return jax.tree.unflatten(jax.tree.structure(abstract), [filled[path] for path in leaves])


def save(
    folder: str | Path,
    net: Net,
    params: Params,
    *,
    card: str = "",
    beside: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that PyTorch loads: configuration, weights in their own dtypes, `card` as its
    README.md, and files of other things by name: JSON objects, or paths of what is copied.

    The folder appears when it is complete, and replaces an earlier export as a whole. Every leaf
    must be addressable from this process. Raises Refused where no family has this net, or not all
    of its weights, and where something else than an export is at `folder` (`folder.replaceable`).
    """
    folder = Path(folder)
    family = family_of(net)
    rows = family.table(net.config)
    leaves = paths(params)
    _check_paths(folder, family, rows, leaves)
    for path, expected in paths(net.shapes).items():
        if leaves[path].shape != expected.shape:
            raise Refused(
                f"{folder}: {path} has shape {list(leaves[path].shape)}, expected {list(expected.shape)}"
            )
    sources = {
        name: (row, i) for row in rows for i, name in enumerate(row.names(leaves[row.path].shape))
    }
    constants = family.constants(net.config)

    def read(name: str) -> np.ndarray:
        if name in constants:
            return constants[name]
        row, i = sources[name]
        leaf = leaves[row.path]
        return row.layout.to_torch(np.asarray(leaf[i] if row.stacked else leaf))

    size = lambda row, leaf: leaf.nbytes // (leaf.shape[0] if row.stacked else 1)
    with whole_folder(folder) as fresh:
        for file, value in {**family.write(net.config), **(beside or {})}.items():
            put(fresh / file, value)
        sizes = {name: size(row, leaves[row.path]) for name, (row, _) in sources.items()}
        sizes |= {name: array.nbytes for name, array in constants.items()}
        write_folder(fresh, STEMS[family.library], sizes, read, max_shard_bytes)
        if card:
            (fresh / "README.md").write_text(card, encoding="utf-8")


def family_of(net: Net) -> Family:
    """The family of a net. Raises Refused where no PyTorch class has its weights."""
    found = sorted(
        (f for f in FAMILIES if type(net.config) is f.config), key=lambda f: bool(f.part)
    )
    if found and found[0].part:
        name = type(net.config).__name__
        family = found[0]
        raise Refused(
            f"export: {name} is {family.part} of {family.name}, which cannot be saved without the rest"
        )
    if found:
        return found[0]
    supported = dict.fromkeys(f.name for f in FAMILIES)
    raise Refused(
        f"export: no PyTorch class for {type(net.config).__name__}; supported: {', '.join(supported)}"
    )


def _describe(folder: Path, net: Net | None = None) -> tuple[Family, Any]:
    """The family and configuration of a folder; where it holds several networks of ours, of `net`'s
    kind, else of the first.
    """
    if (folder / "model_index.json").exists():
        raise Refused(
            f"{folder}: a diffusers pipeline; give the folder of its model, such as {folder / 'transformer'}"
        )
    if not (folder / "config.json").exists():
        objects = (
            [folder] if folder.suffix == ".pkl" else sorted(folder.glob("*.pkl"))
        )  # EDM's, which come alone
        if objects:
            raise Refused(_pickled(objects[0], edm.SONG))
    config = read_json(folder / "config.json")
    where = folder / "config.json"
    named = {family.name: [f for f in FAMILIES if f.name == family.name] for family in FAMILIES}
    found = lookup(named, _class(config, where), f"{where}: class")
    family = next((f for f in found if net is not None and type(net.config) is f.config), found[0])
    fixed(config, STORED, where)
    settings.check(config, where, family.kinds)
    sizes = family.read(config, folder)
    settings.check_fields(sizes, where)
    return family, sizes


def _network(folder: Path) -> Net:
    """The network that a folder describes."""
    family, config = _describe(folder)
    try:
        return make_net(config, config=config)
    except Refused as error:
        raise Refused(f"{folder / 'config.json'}: {error}") from error
    except (
        ArithmeticError,
        AssertionError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # of flax's layers, or of shapes
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(
            f"{folder / 'config.json'}: no {family.name} has these sizes ({shown(said)})"
        ) from error


def _class(config: Mapping[str, Any], where: Path) -> str:
    """The name of PyTorch's class, "" where config.json has none."""
    name = config.get("_class_name")
    several = config.get("architectures") or [""]
    if (
        not isinstance(name, str | None)
        or not isinstance(several, list)
        or not isinstance(several[0], str)
    ):
        key = "architectures" if isinstance(name, str | None) else "_class_name"
        raise Refused(
            f"{where}: {key} is {shown(config[key])}, expected the name of a class, of architectures in a list"
        )
    return name or several[0]


def _same_network(folder: Path, family: Family, config: Any, net: Net) -> None:
    if type(net.config) is not family.config:
        raise Refused(f"{folder}: holds a {family.name}, expected a {type(net.config).__name__}")
    stored, ours = (family.write(c)["config.json"] for c in (config, net.config))
    for key in stored:
        if stored[key] != ours.get(key) and key not in family.free:
            raise Refused(
                f"{folder / 'config.json'}: {key} is {shown(repr(stored[key]))}, expected {shown(repr(ours.get(key)))}"
            )


def _tensors(folder: Path, family: Family) -> dict[str, Tensor]:
    stem = STEMS[family.library]
    found = {}
    try:
        stored = read_folder(folder, stem, index_first=family.library == "diffusers")
    except KeyError:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        if not pickled:
            raise Refused(
                f"{folder}: no {stem}.safetensors and no {stem}.safetensors.index.json"
            ) from None
        raise Refused(_pickled(folder / pickled[0], family)) from None
    for name, tensor in stored.items():
        add(found, family.current(name), tensor)
    return found


def _untied(tensors: dict[str, Tensor], copies: Mapping[str, str]) -> dict[str, Tensor]:
    """`tensors` without second names of one weight, which stands under the table's name even where
    only another is stored.

    Raises Refused where they differ: of transformers 4 and 5 one computes with the one, one with
    the other.
    """
    found = dict(tensors)
    for copy, name in copies.items():
        tensor = found.pop(copy, None)
        if tensor is not None and not same(found.setdefault(name, tensor), tensor):
            raise Refused(
                f"{tensor.file}: {copy} differs from {name}, to which config.json ties it (tie_word_embeddings); "
                "expected one of them, or equal ones"
            )
    return found


def _pickled(file: Path, family: Family) -> str:
    """Why a file of the family is refused, and what to do."""
    folder = file.parent
    source = literal(folder)
    out = literal(f"{folder}-safetensors")
    load = f"from {family.library} import {family.name} as M; M.from_pretrained({source}).save_pretrained({out})"
    command = family.convert(file) if family.convert else shell(load)
    return f"{file.parent}: {file.name} is pickled and is not opened; convert it with: {command}"


def _names(rows: tuple[Row, ...], leaves: dict[str, Any]):
    """(row, PyTorch's name) of every stored tensor."""
    return ((row, name) for row in rows for name in row.names(leaves[row.path].shape))


def _check_paths(
    folder: Path, family: Family, rows: tuple[Row, ...], leaves: dict[str, Any]
) -> None:
    known = {row.path for row in rows}
    stray = sorted(known ^ leaves.keys())
    if stray:
        raise Refused(
            f"{folder}: {family.name} {'needs' if stray[0] in known else 'has no place for'} {stray[0]}"
        )


def _check_keys(
    folder: Path,
    tensors: dict[str, Tensor],
    expected: dict[str, tuple[int, ...]],
    ignored: tuple[str, ...],
) -> None:
    extra = sorted(
        name
        for name in tensors.keys() - expected.keys()
        if not any(re.fullmatch(p, name) for p in ignored)
    )
    if scales := [name for name in extra if QUANTISED.fullmatch(name)]:
        raise Refused(
            f"{tensors[scales[0]].file}: {shown(scales[0])} says that the weights are quantised, expected plain floats"
        )
    for name, shape in expected.items():
        if name not in tensors:
            near = difflib.get_close_matches(name, extra, 1)
            raise Refused(
                f"{folder}: {name} {list(shape)} is missing"
                + (f"; did you mean {shown(near[0])!r}?" if near else "")
            )
        data = tensors[name].data
        if data.shape != shape:
            raise Refused(
                f"{tensors[name].file}: {name} has shape {list(data.shape)}, expected {list(shape)}"
            )
        if not jnp.issubdtype(data.dtype, jnp.floating):
            raise Refused(
                f"{tensors[name].file}: {name} has numbers of type {data.dtype.name}, expected plain floats"
            )
    if extra:
        raise Refused(
            f"{tensors[extra[0]].file}: unexpected key {shown(extra[0])}"
            + (f" (and {len(extra) - 1} more)" if extra[1:] else "")
        )


def _reader(row: Row, tensors: list[Tensor]) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Reads the part of a leaf that a tuple of slices names. Raises Refused where the copies of a
    weight differ.
    """
    views = [row.layout.to_jax(tensor.data) for tensor in tensors]
    if not row.stacked:
        for tensor, view in zip(tensors[1:], views[1:]):
            if not np.array_equal(view, views[0]):
                raise Refused(
                    f"{tensor.file}: the copies of {row.name} differ, expected one weight repeated"
                )
        return lambda index: views[0][index]
    return lambda index: np.stack([view[index[1:]] for view in views[index[0]]])


def _place(leaf: jax.ShapeDtypeStruct, read: Callable[[tuple[slice, ...]], np.ndarray]) -> Array:
    part = lambda index: np.array(read(index), leaf.dtype)  # a copy: the file may go away
    if leaf.sharding is None:
        return jnp.asarray(part((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
