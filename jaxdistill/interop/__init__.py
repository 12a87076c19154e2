"""Networks and weights from and to the folders that PyTorch's `transformers` and `diffusers` read.

PyTorch itself is not needed.
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
from jaxdistill.core.types import Array, Params, Refused, lookup, one_line, quoted
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
from jaxdistill.interop.keys import check_value
from jaxdistill.interop.safetensors import (
    Tensor,
    add,
    read_folder,
    read_json,
    same,
    shown,
    write_folder,
)
from jaxdistill.interop.tables import STEMS, Family, Row, literal, shell

# All families. Several with one name are parts of a common folder; the first is taken where no net
# says which
FAMILIES: tuple[Family, ...] = (
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
# Keys of config.json that say how and where weights are stored, in ways that are not read here
STORED = ("quantization_config", "compression_config", "transformers_weights")
# Names of what FP8, GPTQ, AWQ, bitsandbytes, HQQ and compressed-tensors store beside quantised
# weights
QUANTISED = re.compile(
    r"(.*\.)?("
    r"(weight|input|output|k|v)_scale(_inv|_2)?|scale_(weight|input)|scaled_fp8|scales|"
    r"weight_(packed|shape|zero_point|g_idx)|qweight|qzeros|zeros|g_idx|W_q|SCB|weight_format|"
    r"(nested_)?(absmax|quant_map)|quant_state\..*)"
)


def describe(folder: str | Path) -> Any:
    """Our configuration of the model in `folder`, a dataclass that `make_net` builds. Reads no
    weights.

    Raises Refused on a class or setting that is not supported, and on sizes that make no network.
    """
    return _network(Path(folder)).config


def load(folder: str | Path, dtype: str = "float32") -> tuple[Net, Params]:
    """The network that a folder describes, and its weights in `dtype` on the default device.

    Raises Refused as `load_into` does.
    """
    net = _network(Path(folder))
    abstract = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype)), net.shapes
    )
    return net, load_into(folder, net, abstract)


def load_into(folder: str | Path, net: Net, abstract: Params) -> Params:
    """The folder's weights for one of our nets, read leaf by leaf and shard by shard: each process
    reads the bytes of its own shards only.

    Args:
        folder: A model's folder.
        net: The network.
        abstract: Its weights as ShapeDtypeStructs, with the dtypes and shardings to load them in.

    Raises:
        Refused: The folder holds a network other than `net`; a class or setting is not supported; a
            weight is missing, unexpected or of another shape; a file is truncated or pickled.
    """
    folder = Path(folder)
    family, config = _describe(folder, net)
    _check_same_network(folder, family, config, net)
    stored = _tensors(folder, family)
    leaves = paths(abstract)
    rows = family.table(config)
    _check_paths(folder, family, rows, leaves)
    expected = {}
    for row in rows:
        shape = leaves[row.path].shape
        for name in row.names(shape):
            expected[name] = row.torch_shape(shape)
    copies = {copy: name for copy, name in family.tied if copy not in expected}
    tensors = _without_copies(stored, copies)
    _check_names(folder, tensors, expected, family.ignored)
    filled = {}
    for row in rows:
        leaf = leaves[row.path]
        parts = [tensors[name] for name in row.names(leaf.shape)]
        filled[row.path] = _place(leaf, _reader(row, parts))
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [filled[path] for path in leaves]
    )


def save(
    folder: str | Path,
    net: Net,
    params: Params,
    *,
    card: str = "",
    beside: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that PyTorch loads: configuration, and weights in their own dtypes.

    The folder appears when it is complete, and replaces an earlier export as a whole.

    Args:
        folder: Where to.
        net: The network.
        params: Its weights; every leaf must be addressable from this process.
        card: The text of README.md; empty: none.
        beside: Further files by name: JSON objects, or paths of files that are copied.
        max_shard_bytes: The most in one file of weights.

    Raises:
        Refused: No family has this net, or it lacks some of the weights; or `folder` holds
            something other than an export (`folder.replaceable`).
    """
    folder = Path(folder)
    family = family_of(net)
    rows = family.table(net.config)
    leaves = paths(params)
    _check_paths(folder, family, rows, leaves)
    for path, expected in paths(net.shapes).items():
        shape = leaves[path].shape
        if shape != expected.shape:
            raise Refused(
                f"{folder}: {path} has shape {list(shape)}, expected {list(expected.shape)}"
            )
    sources = {}  # PyTorch's name -> (row, number among its names)
    sizes = {}  # PyTorch's name -> bytes
    for row in rows:
        leaf = leaves[row.path]
        for i, name in enumerate(row.names(leaf.shape)):
            sources[name] = (row, i)
            sizes[name] = leaf.nbytes // (leaf.shape[0] if row.stacked else 1)
    constants = family.constants(net.config)
    sizes |= {name: array.nbytes for name, array in constants.items()}

    def read(name: str) -> np.ndarray:
        if name in constants:
            return constants[name]
        row, i = sources[name]
        leaf = leaves[row.path]
        return row.layout.to_torch(np.asarray(leaf[i] if row.stacked else leaf))

    with whole_folder(folder) as fresh:
        for file, value in {**family.write(net.config), **(beside or {})}.items():
            put(fresh / file, value)
        write_folder(fresh, STEMS[family.library], sizes, read, max_shard_bytes)
        if card:
            (fresh / "README.md").write_text(card, encoding="utf-8")


def family_of(net: Net) -> Family:
    """The family of a net. Raises Refused where no PyTorch class has its weights alone."""
    found = [family for family in FAMILIES if type(net.config) is family.config]
    complete = [family for family in found if not family.part]
    if complete:
        return complete[0]
    name = type(net.config).__name__
    if found:
        raise Refused(
            f"export: {name} is {found[0].part} of {found[0].name}, which cannot be saved without "
            "the rest"
        )
    supported = dict.fromkeys(family.name for family in FAMILIES)
    raise Refused(
        f"export: no PyTorch class for {name}; supported: {', '.join(supported)}"
    )


def _describe(folder: Path, net: Net | None = None) -> tuple[Family, Any]:
    """The family and configuration of a folder.

    Where a folder holds several networks of ours, it is described as the one of `net`'s kind,
    without `net` as the first.
    """
    if (folder / "model_index.json").exists():
        raise Refused(
            f"{folder}: a diffusers pipeline; give the folder of its model, such as "
            f"{folder / 'transformer'}"
        )
    file = folder / "config.json"
    if not file.exists():
        # EDM publishes pickles without a folder
        pickles = (
            [folder] if folder.suffix == ".pkl" else sorted(folder.glob("*.pkl"))
        )
        if pickles:
            raise Refused(_pickled(pickles[0], edm.SONG))
    config = read_json(file)
    by_name = {
        family.name: [f for f in FAMILIES if f.name == family.name]
        for family in FAMILIES
    }
    candidates = lookup(by_name, _class(config, file), f"{file}: class")
    family = candidates[0]
    if net is not None:
        own = [family for family in candidates if type(net.config) is family.config]
        family = (own or candidates)[0]
    for key in STORED:
        check_value(config, key, None, file)
    settings.check(config, file, family.kinds)
    sizes = family.read(config, folder)
    settings.check_fields(sizes, file)
    return family, sizes


def _network(folder: Path) -> Net:
    """The network that a folder describes. Raises Refused where its sizes make none."""
    family, config = _describe(folder)
    file = folder / "config.json"
    try:
        return make_net(config, config=config)
    except Refused as error:
        raise Refused(f"{file}: {error}") from error
    except (
        ArithmeticError,
        AssertionError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        # raised by flax's layers, or for shapes that do not fit
        said = one_line(error, 120)
        raise Refused(
            f"{file}: no {family.name} has these sizes ({said})"
        ) from error


def _class(config: Mapping[str, Any], file: Path) -> str:
    """The name of PyTorch's class, "" where config.json has none."""
    name = config.get("_class_name")
    if not isinstance(name, str | None):
        raise _no_class(config, "_class_name", file)
    several = config.get("architectures") or [""]
    if not isinstance(several, list) or not isinstance(several[0], str):
        raise _no_class(config, "architectures", file)
    return name or several[0]


def _no_class(config: Mapping[str, Any], key: str, file: Path) -> Refused:
    return Refused(
        f"{file}: {key} is {quoted(config[key])}, expected the name of a class, of architectures "
        "in a list"
    )


def _check_same_network(
    folder: Path, family: Family, config: Any, net: Net
) -> None:
    """Raises Refused where the folder's configuration is not that of `net`."""
    if type(net.config) is not family.config:
        raise Refused(
            f"{folder}: holds a {family.name}, expected a {type(net.config).__name__}"
        )
    stored = family.write(config)["config.json"]
    ours = family.write(net.config)["config.json"]
    for key in stored:
        if stored[key] != ours.get(key) and key not in family.free:
            raise Refused(
                f"{folder / 'config.json'}: {key} is {quoted(stored[key])}, expected "
                f"{quoted(ours.get(key))}"
            )


def _tensors(folder: Path, family: Family) -> dict[str, Tensor]:
    """The stored tensors under the table's names. Raises Refused where there are none."""
    stem = STEMS[family.library]
    try:
        stored = read_folder(
            folder, stem, index_first=family.library == "diffusers"
        )
    except KeyError:
        pickled = sorted(
            file.name for file in folder.iterdir() if file.suffix in PICKLED
        )
        if pickled:
            raise Refused(_pickled(folder / pickled[0], family)) from None
        raise Refused(
            f"{folder}: no {stem}.safetensors and no {stem}.safetensors.index.json"
        ) from None
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        add(found, family.current(name), tensor)
    return found


def _without_copies(
    tensors: dict[str, Tensor], copies: Mapping[str, str]
) -> dict[str, Tensor]:
    """`tensors` without second names of one weight, {second name: the table's name}.

    The weight is found under the table's name even where only another is stored. Raises Refused
    where they differ: one of transformers 4 and 5 computes with the one, the other with the other.
    """
    found = dict(tensors)
    for copy, name in copies.items():
        tensor = found.pop(copy, None)
        if tensor is None:
            continue
        if not same(found.setdefault(name, tensor), tensor):
            raise Refused(
                f"{tensor.file}: {copy} differs from {name}, to which config.json ties it "
                "(tie_word_embeddings); expected one of them, or equal ones"
            )
    return found


def _pickled(file: Path, family: Family) -> str:
    """Why a pickle is refused, and the command that converts it."""
    folder = file.parent
    if family.convert:
        command = family.convert(file)
    else:
        source = literal(folder)
        out = literal(f"{folder}-safetensors")
        command = shell(
            f"from {family.library} import {family.name} as M; "
            f"M.from_pretrained({source}).save_pretrained({out})"
        )
    return f"{folder}: {file.name} is pickled and is not opened; convert it with: {command}"


def _check_paths(
    folder: Path, family: Family, rows: tuple[Row, ...], leaves: Mapping[str, Any]
) -> None:
    """Raises Refused where the weights are not those that the table names."""
    known = {row.path for row in rows}
    for path in sorted(known ^ leaves.keys()):
        fault = "needs" if path in known else "has no place for"
        raise Refused(f"{folder}: {family.name} {fault} {path}")


def _check_names(
    folder: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    ignored: tuple[str, ...],
) -> None:
    """Raises Refused where the stored tensors are not those that are expected (name -> shape)."""
    extra = []
    for name in sorted(tensors.keys() - expected.keys()):
        if not any(re.fullmatch(pattern, name) for pattern in ignored):
            extra.append(name)
    for name in extra:
        if QUANTISED.fullmatch(name):
            raise Refused(
                f"{tensors[name].file}: {shown(name)} says that the weights are quantised, "
                "expected plain floats"
            )
    for name, shape in expected.items():
        if name not in tensors:
            near = difflib.get_close_matches(name, extra, 1)
            hint = f"; did you mean {shown(near[0])!r}?" if near else ""
            raise Refused(f"{folder}: {name} {list(shape)} is missing{hint}")
        _check_tensor(name, tensors[name], shape)
    if extra:
        more = f" (and {len(extra) - 1} more)" if extra[1:] else ""
        raise Refused(
            f"{tensors[extra[0]].file}: unexpected key {shown(extra[0])}{more}"
        )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises Refused where a stored weight has another shape, or does not hold floats."""
    data = tensor.data
    if data.shape != shape:
        raise Refused(
            f"{tensor.file}: {name} has shape {list(data.shape)}, expected {list(shape)}"
        )
    if not jnp.issubdtype(data.dtype, jnp.floating):
        raise Refused(
            f"{tensor.file}: {name} has numbers of type {data.dtype.name}, expected plain floats"
        )


def _reader(
    row: Row, tensors: list[Tensor]
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function that reads the part of a leaf that a tuple of slices names.

    Raises Refused where the copies of a weight differ.
    """
    views = [row.layout.to_jax(tensor.data) for tensor in tensors]
    if row.stacked:
        return lambda index: np.stack([view[index[1:]] for view in views[index[0]]])
    for tensor, view in zip(tensors[1:], views[1:]):
        if not np.array_equal(view, views[0]):
            raise Refused(
                f"{tensor.file}: the copies of {row.name} differ, expected one weight repeated"
            )
    return lambda index: views[0][index]


def _place(
    leaf: jax.ShapeDtypeStruct, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> Array:
    """A leaf on its devices, in the dtype and sharding of `leaf`."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        # a copy, since the file may be removed
        return np.array(read(index), leaf.dtype)

    if leaf.sharding is None:
        return jnp.asarray(part((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
