"""One table per model family, read in both directions: (our path, PyTorch's name, layout).

A family is a file beside this one that defines `FAMILY = Family(...)` and stands in
`interop.FAMILIES`:

- `name`: PyTorch's class, as `architectures` (transformers) or `_class_name` (diffusers) of
  config.json says;
- `config`: our dataclass of sizes, callable with rngs; a net belongs to the family of its
  `net.config`;
- `read(config_json, folder) -> config` and `write(config) -> {file name: JSON object}`; `read`
  raises Refused on every setting that our model does not have, so that no checkpoint is loaded into
  a different network;
- `table(config) -> rows`, one for each leaf of the net's params, `ignored`, patterns of names that
  carry no weight, `renamed`, the names that old files use, and `tied`, second names of weights of
  the table: a file has any of the names, and equal values under them. A second name that the table
  has itself (an untied head) is no such name;
- `kinds`, what keys of config.json hold where it is something else than in other families
  (interop/settings.py);
- `free`, the keys of config.json in which two copies of one network may differ;
- `call`, PyTorch's expression of one evaluation for the model card (of a denoiser, at the state {x}
  and the time {t} under a condition `cond`, which the line `given` makes), and `component`, the
  model's name in diffusers' pipelines;
- `loads`, Python that makes `model` of the folder ".", where PyTorch's class has no
  `from_pretrained`, and `adapters`, whether its library puts adapters on it;
- `part`, what ours is of PyTorch's class, where it is not the whole and cannot be saved as one;
- `constants(config)`, where PyTorch's class stores arrays that are no weights, and `convert(file)`,
  where its pickles become safetensors by another command than that of transformers and diffusers.

A layout is written with array methods only (reshape, transpose), since it is applied to memory
maps, where it stays a view, and to abstract arrays, where it gives the shape to expect.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill.core.types import Array, Refused
from jaxdistill.interop.safetensors import shown
from jaxdistill.interop.settings import Kind

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
LINEAR = Layout(lambda w: w.transpose(1, 0), lambda w: w.transpose(1, 0))  # [out in] <-> [in out]
CONV = Layout(  # [out in *size] <-> [*size in out], any number of spatial axes
    lambda w: w.transpose(*range(2, w.ndim), 1, 0),
    lambda w: w.transpose(w.ndim - 1, w.ndim - 2, *range(w.ndim - 2)),
)
POINT = Layout(  # a 1x1 convolution, here a matrix: [out in 1 1] <-> [in out]
    lambda w: w.reshape(w.shape[:2]).transpose(1, 0),
    lambda w: w.transpose(1, 0).reshape(w.shape[1], w.shape[0], 1, 1),
)


def patches(size: int | tuple[int, ...]) -> Layout:
    """A convolution over disjoint patches, here a linear map of (row, column, channel): [o c p p]
    <-> [p*p*c o].

    `size` is p, or the lengths of any number of axes: [o c t p q] <-> [t*p*q*c o] of (frame, row,
    column, channel).
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    n = len(size)
    return Layout(
        lambda w: w.transpose(*range(2, w.ndim), 1, 0).reshape(-1, w.shape[0]),
        lambda w: w.reshape(*size, -1, w.shape[1]).transpose(n + 1, n, *range(n)),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A leaf of our params and its name in PyTorch, where `{i}` numbers the layers that ours has
    stacked on axis 0.

    With `copies`, PyTorch stores our one weight that many times, numbered by `{i}`.
    """

    path: str
    name: str
    layout: Layout = SAME
    copies: int = 0

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name and not self.copies

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """PyTorch's names, in layer order, of a leaf of this shape."""
        count = shape[0] if self.stacked else max(self.copies, 1)
        return [self.name.format(i=i) for i in range(count)]

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """PyTorch's shape of each of them."""
        one = jax.ShapeDtypeStruct(shape[1:] if self.stacked else shape, "float32")
        return jax.eval_shape(self.layout.to_torch, one).shape


def linear(
    path: str, name: str, layout: Layout = LINEAR, bias: bool = True, copies: int = 0
) -> tuple[Row, ...]:
    """Kernel and bias of a linear map or a convolution."""
    kernel = Row(f"{path}/kernel", f"{name}.weight", layout, copies)
    return (kernel, Row(f"{path}/bias", f"{name}.bias", copies=copies)) if bias else (kernel,)


def norm(path: str, name: str) -> tuple[Row, Row]:
    """Gain and bias of a norm."""
    return Row(f"{path}/scale", f"{name}.weight"), Row(f"{path}/bias", f"{name}.bias")


def fixed(config: Mapping[str, Any], values: Mapping[str, Any], where: Path) -> None:
    """Raises Refused where config.json has another value than the one that our model can do; a
    missing key has it.
    """
    for key, value in values.items():
        if config.get(key, value) != value:
            raise Refused(
                f"{where}: {key}={shown(repr(config[key]))} is not supported, expected {value!r}"
            )


def setting(config: Mapping[str, Any], key: str, where: Path) -> Any:
    """config[key]. Raises Refused where it is missing or null."""
    if config.get(key) is None:
        raise Refused(f"{where}: {key} is {'null' if key in config else 'missing'}")
    return config[key]


def sizes(config: Mapping[str, Any], names: Mapping[str, str], where: Path) -> dict[str, Any]:
    """Our fields, from PyTorch's keys of config.json. Raises Refused where one is missing."""
    return {ours: setting(config, theirs, where) for ours, theirs in names.items()}


def shell(code: str) -> str:
    """The line for a shell that runs Python code."""
    return f"python -c {shlex.quote(code)}"


def literal(text: str | Path) -> str:
    """A text or path as Python has it in its code, without backquotes, which mean something to
    shells and in Markdown.
    """
    return json.dumps(str(text), ensure_ascii=False).replace("`", r"\u0060")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a family file defines; see the head of this file."""

    name: str
    library: str  # a key of STEMS: whose classes read the folder, hence its file names
    config: type
    read: Callable[[dict[str, Any], Path], Any]
    write: Callable[[Any], dict[str, dict[str, Any]]]
    table: Callable[[Any], tuple[Row, ...]]
    ignored: tuple[str, ...] = ()  # regular expressions of whole names
    tied: tuple[tuple[str, str], ...] = ()  # (second name, the table's name)
    renamed: tuple[
        tuple[str, str], ...
    ] = ()  # (regular expression, replacement) that turn old names into those of the table
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)
    free: tuple[str, ...] = ()
    call: str = ""
    given: str = ""
    component: str = "transformer"
    loads: str = ""
    adapters: bool = True
    part: str = ""
    constants: Callable[[Any], dict[str, np.ndarray]] = (
        lambda config: {}
    )  # name -> what is written beside the weights
    convert: Callable[[Path], str] | None = None

    def current(self, name: str) -> str:
        """The table's name for a name found in a file."""
        return functools.reduce(lambda name, rule: re.sub(*rule, name), self.renamed, name)
