"""Low-rank adapters as folders that PyTorch reads: `peft` of transformers' models,
`load_lora_adapter` and `load_lora_weights` of diffusers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.core.lora import Adapter
from jaxdistill.core.net import Net
from jaxdistill.core.types import Params, Refused
from jaxdistill.interop import family_of
from jaxdistill.interop.folder import put, whole_folder
from jaxdistill.interop.safetensors import write_json, write_tensors
from jaxdistill.interop.tables import Family, Row


def save_adapter(
    folder: str | Path,
    base: Net,
    adapter: Adapter,
    params: Params,
    *,
    source: str = "",
    card: str = "",
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Writes a low-rank adapter without the weights that it goes on.

    For transformers: adapter_config.json and adapter_model.safetensors, with A, B and alpha of
    arXiv:2106.09685. For diffusers: pytorch_lora_weights.safetensors under the component's name,
    alpha / rank folded into B, and a config.json that names the class. The adapter of a convolution
    is two convolutions, A of the same size and B of size 1. The folder appears when it is complete.

    Args:
        folder: Where to.
        base: The network that the adapter goes on.
        adapter: The adapter.
        params: Its weights, {path in the base: {"a", "b"}}.
        source: Where the base is, for adapter_config.json.
        card: As of `interop.save`.
        beside: As of `interop.save`.

    Raises:
        Refused: No family has the base; its library puts no adapter on it; the base has adapters
            itself; the adapter has whole leaves; or an adapted weight has no matrix of its own in
            PyTorch.
    """
    folder = Path(folder)
    family = _family(folder, base)
    _check_low_rank(folder, adapter)
    rows = {row.path: row for row in family.table(base.config)}
    is_peft = family.library == "transformers"
    prefix = "base_model.model" if is_peft else family.component
    scale = 1 if is_peft else adapter.scale
    tensors = {}
    modules = []
    for path, pair in params.items():
        row = rows[path]
        a = np.asarray(pair["a"], np.float32)
        b = np.asarray(pair["b"], np.float32)
        rank = a.shape[-1]
        for i, name in enumerate(row.names(a.shape)):
            module = name.removesuffix(".weight")
            modules.append(module)
            layer = i if row.stacked else slice(None)
            down, up = _pair(folder, row, a[layer], b[layer])
            tensors[f"{prefix}.{module}.lora_A.weight"] = down
            tensors[f"{prefix}.{module}.lora_B.weight"] = scale * up
    with whole_folder(folder) as fresh:
        if is_peft:
            config = {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": adapter.scale * rank,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": modules,
                "base_model_name_or_path": source,
                "inference_mode": True,
            }
            write_json(fresh / "adapter_config.json", config)
            weights = "adapter_model.safetensors"
        else:
            write_json(
                fresh / "config.json",
                {"_class_name": family.name, "lora_rank": rank},
            )
            weights = "pytorch_lora_weights.safetensors"
        for file, value in (beside or {}).items():
            put(fresh / file, value)
        write_tensors(fresh / weights, tensors)
        if card:
            (fresh / "README.md").write_text(card, encoding="utf-8")


def check_adapter(folder: str | Path, base: Net, adapter: Adapter) -> None:
    """Raises Refused where `save_adapter` would for any weights; it is tried on random ones."""
    folder = Path(folder)
    family = _family(folder, base)
    _check_low_rank(folder, adapter)
    rows = {row.path: row for row in family.table(base.config)}
    draw = np.random.default_rng(0)
    for path, pair in adapter.shapes.items():
        row = rows[path]
        *size, inputs, rank = pair["a"].shape
        *ones, _, outputs = pair["b"].shape
        rank = min(rank, 2)  # which is enough to tell
        if row.stacked:
            size = size[1:]
            ones = ones[1:]
        a = draw.standard_normal((*size, inputs, rank), np.float32)
        b = draw.standard_normal((*ones, rank, outputs), np.float32)
        _pair(folder, row, a, b)


def _family(folder: Path, base: Net) -> Family:
    """The base's family. Raises Refused where its library puts no adapter on it."""
    family = family_of(base)
    if not family.adapters:
        raise Refused(
            f"{folder}: {family.library} puts no adapter on {family.name}; export without "
            "--adapter, merged"
        )
    return family


def _check_low_rank(folder: Path, adapter: Adapter) -> None:
    """Raises Refused where an adapter is more than matrices of low rank on a network."""
    if adapter.depth > 1:
        raise Refused(
            f"{folder}: {adapter.adapts} has adapters itself; export without --adapter, merged"
        )
    if adapter.whole_leaves:
        path = next(iter(adapter.whole_leaves))
        raise Refused(
            f"{folder}: {path} is trained as a whole (lora.full, or a model of its own); export"
            " without --adapter, merged"
        )


def _pair(
    folder: Path, row: Row, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A [r in ...] and B [out r ...] of PyTorch for our a [... in r] and b [... r out].

    Raises Refused where their product is not the change a b of the weight in PyTorch's layout.
    """
    *size, rank, outputs = b.shape
    if np.prod(size) == 1 and row.name.endswith(".weight"):
        down = np.asarray(row.layout.to_torch(a))
        matrix = b.reshape(rank, outputs).T
        up = matrix.reshape(outputs, rank, *[1] * (down.ndim - 2))
        change = np.asarray(row.layout.to_torch(a @ b))
        if len(down) == rank:
            product = (matrix @ down.reshape(rank, -1)).reshape(change.shape)
            tolerance = 1e-5 * (np.abs(change).max() + 1e-30)
            if np.allclose(product, change, rtol=1e-4, atol=tolerance):
                return down, up
    raise Refused(
        f"{folder}: {row.name} is not a matrix of its own in PyTorch; export without --adapter, "
        "merged"
    )
