"""Model families: what PyTorch's class of a network is called, and how its files are read and
written.

A family is a file in `families` that defines a `Family` and stands in `interop.FAMILIES`. Its two
tables are read in both directions: `keys` for config.json (interop/keys.py), and `table` for the
weights, a `Row` (our path, PyTorch's name, layout) for each leaf of the net's params.

A layout is written with array methods only (reshape, transpose), since it is applied to memory
maps, where it stays a view, and to abstract arrays, where it gives the shape to expect.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill.core.types import Array
from jaxdistill.interop.keys import Key, check_implied, read_keys, write_keys
from jaxdistill.interop.settings import Kind

# Library -> the name of its files of weights, without number and ending
STEMS = {
    "transformers": "model",
    "diffusers": "diffusion_pytorch_model",
    "edm": "model",
    "lpips": "model",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Two inverse maps between PyTorch's array and ours."""

    to_jax: Callable[[Array], Array]
    to_torch: Callable[[Array], Array]


SAME = Layout(lambda w: w, lambda w: w)  # norms, biases, embeddings
# [out in] <-> [in out]
LINEAR = Layout(lambda w: w.transpose(1, 0), lambda w: w.transpose(1, 0))
# A convolution, with any number of spatial axes: [out in *size] <-> [*size in out]
CONV = Layout(
    lambda w: w.transpose(*range(2, w.ndim), 1, 0),
    lambda w: w.transpose(w.ndim - 1, w.ndim - 2, *range(w.ndim - 2)),
)
# A 1x1 convolution, which is a matrix of ours: [out in 1 1] <-> [in out]
POINT = Layout(
    lambda w: w.reshape(w.shape[:2]).transpose(1, 0),
    lambda w: w.transpose(1, 0).reshape(w.shape[1], w.shape[0], 1, 1),
)


def patches(size: int | tuple[int, ...]) -> Layout:
    """A convolution over disjoint patches, which is a linear map of ours.

    `size` is the side p of square patches, [o c p p] <-> [p*p*c o], or the lengths along any number
    of axes, [o c t p q] <-> [t*p*q*c o].
    """
    lengths = (size, size) if isinstance(size, int) else tuple(size)
    n = len(lengths)
    return Layout(
        lambda w: w.transpose(*range(2, w.ndim), 1, 0).reshape(-1, w.shape[0]),
        lambda w: w.reshape(*lengths, -1, w.shape[1]).transpose(
            n + 1, n, *range(n)
        ),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A leaf of our params and its name in PyTorch.

    `{i}` in the name numbers the layers that ours has stacked on axis 0; with `copies`, the copies
    of one weight that PyTorch stores.
    """

    path: str
    name: str
    layout: Layout = SAME
    copies: int = 0

    @property
    def stacked(self) -> bool:
        """Whether axis 0 of our leaf counts layers."""
        return "{i}" in self.name and not self.copies

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """PyTorch's names, in the order of layers, of a leaf of this shape."""
        count = shape[0] if self.stacked else max(self.copies, 1)
        return [self.name.format(i=i) for i in range(count)]

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """PyTorch's shape of each of them."""
        one = jax.ShapeDtypeStruct(shape[1:] if self.stacked else shape, "float32")
        return jax.eval_shape(self.layout.to_torch, one).shape


def linear(
    path: str,
    name: str,
    layout: Layout = LINEAR,
    bias: bool = True,
    copies: int = 0,
) -> tuple[Row, ...]:
    """Kernel and bias of a linear map or a convolution."""
    kernel = Row(f"{path}/kernel", f"{name}.weight", layout, copies)
    if not bias:
        return (kernel,)
    return (kernel, Row(f"{path}/bias", f"{name}.bias", copies=copies))


def norm(path: str, name: str) -> tuple[Row, Row]:
    """Gain and bias of a norm."""
    return Row(f"{path}/scale", f"{name}.weight"), Row(
        f"{path}/bias", f"{name}.bias"
    )


def shell(code: str) -> str:
    """The command that runs Python code in a shell."""
    return f"python -c {shlex.quote(code)}"


def literal(text: str | Path) -> str:
    """A text or path as a string in Python code, without backquotes, which shells and Markdown give
    a meaning.
    """
    return json.dumps(str(text), ensure_ascii=False).replace("`", r"\u0060")


def _unchanged(values: dict[str, Any], file: Path) -> dict[str, Any]:
    return values


def _nothing(*args: Any) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A class of PyTorch and the networks of ours that it is."""

    # PyTorch's class: `architectures` (transformers) or `_class_name` (others) in config.json
    name: str
    # A key of STEMS: the library whose classes read the folder, hence the names of its files
    library: str
    # Our dataclass of sizes, callable with rngs; a net belongs to the family of its `net.config`
    config: type
    # `model_type` in config.json of transformers
    model_type: str = ""
    # The keys of config.json. Reading raises Refused on every setting that our model does not have,
    # so that no checkpoint is loaded into a different network
    keys: tuple[Key, ...] = ()
    # (config.json, its path) -> config.json under the table's keys, where other versions of the
    # file or classes with several networks have other keys
    prepare: Callable[[dict[str, Any], Path], dict[str, Any]] = _unchanged
    # (config.json, folder) -> fields of ours that no single key holds
    more_fields: Callable[[dict[str, Any], Path], dict[str, Any]] = _nothing
    # our dataclass -> {file name: keys beyond those of the table}
    more_files: Callable[[Any], dict[str, dict[str, Any]]] = _nothing
    # our dataclass -> the rows of its weights, one for each leaf of the net's params
    table: Callable[[Any], tuple[Row, ...]]
    # Regular expressions of the full names of stored arrays that carry no weight
    ignored: tuple[str, ...] = ()
    # (second name, the table's name) of one weight: a file has any of the names, and equal values
    # under them. A second name that the table has itself (an untied head) does not count
    tied: tuple[tuple[str, str], ...] = ()
    # (regular expression, replacement) that turn the names in old files into those of the table
    renamed: tuple[tuple[str, str], ...] = ()
    # What keys of config.json hold where it differs from other families (interop/settings.py)
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)
    # Keys of config.json in which two copies of one network may differ
    free: tuple[str, ...] = ()
    # PyTorch's expression of one evaluation, for the model card; of a denoiser at the state {x} and
    # the time {t}, under a condition `cond` that the line `given` makes
    call: str = ""
    given: str = ""
    # The model's name in diffusers' pipelines
    component: str = "transformer"
    # Python that makes `model` of the folder ".", where PyTorch's class has no `from_pretrained`
    loads: str = ""
    # Whether the library puts low-rank adapters on the class
    adapters: bool = True
    # Which part of PyTorch's class our network is, where it cannot be saved as one alone
    part: str = ""
    # our dataclass -> arrays by name that PyTorch's class stores beside the weights
    constants: Callable[[Any], dict[str, np.ndarray]] = _nothing
    # path of a pickle -> the command that makes safetensors of it, where it is not the command of
    # transformers and diffusers
    convert: Callable[[Path], str] | None = None

    def read(self, values: dict[str, Any], folder: Path) -> Any:
        """Our dataclass of sizes for the `values` of the folder's config.json. Raises Refused."""
        file = folder / "config.json"
        values = self.prepare(values, file)
        fields = read_keys(self.keys, values, file) | self.more_fields(
            values, folder
        )
        ours = self.config(**fields)
        check_implied(self.keys, ours, values, file)
        return ours

    def write(self, ours: Any) -> dict[str, dict[str, Any]]:
        """{file name: JSON object} for our dataclass: config.json, and what stands beside it.

        Raises Refused where PyTorch's class cannot have these sizes.
        """
        if self.library == "transformers":
            names = {"architectures": [self.name], "model_type": self.model_type}
        else:
            names = {"_class_name": self.name}
        files = {"config.json": names | write_keys(self.keys, ours)}
        for file, values in self.more_files(ours).items():
            files[file] = files.get(file, {}) | values
        return files

    def current(self, name: str) -> str:
        """The table's name for a name found in a file."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name
