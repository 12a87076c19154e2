"""A low-rank adapter as the folder that `peft` (transformers) or `load_lora_adapter` and
`load_lora_weights` (diffusers) read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxdistill.core.lora import Adapter
from jaxdistill.core.net import Net
from jaxdistill.core.types import Params, Refused
from jaxdistill.interop import family_of
from jaxdistill.interop.folder import put, whole_folder
from jaxdistill.interop.safetensors import write_json
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
    """Writes the adapter of `base` whose weights are `params` ({path: {"a", "b"}}); the base's own
    are not written.

    For transformers: adapter_config.json and adapter_model.safetensors (arXiv:2106.09685's A and B
    with alpha), `source` being where the base is. For diffusers: pytorch_lora_weights.safetensors
    under the component's name, alpha / rank folded into B, and a config.json that names the class.
    `card` and `beside` are as for `interop.save`. The folder appears when it is complete. Raises
    Refused where no family has the base, its library puts no adapter on it, or a weight that is
    adapted has no matrix of its own in PyTorch.
    """
    folder, family = Path(folder), _family(folder, base)
    rows = {row.path: row for row in family.table(base.config)}
    tensors = {}
    modules = []
    rank = next(iter(params.values()))["a"].shape[-1]
    peft = family.library == "transformers"
    for path, pair in params.items():
        row, (a, b) = rows[path], (np.asarray(pair[k], np.float32) for k in "ab")
        for i, name in enumerate(row.names(a.shape)):
            module = name.removesuffix(".weight")
            down, up = _pair(folder, row, *((a[i], b[i]) if row.stacked else (a, b)))
            modules.append(module)
            lead = "base_model.model" if peft else family.component
            tensors[f"{lead}.{module}.lora_A.weight"] = down
            tensors[f"{lead}.{module}.lora_B.weight"] = up if peft else adapter.scale * up
    with whole_folder(folder) as fresh:
        if peft:
            settings = {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": adapter.scale * rank,
                "lora_dropout": 0.0,
                "bias": "none",
            }
            settings |= {
                "target_modules": modules,
                "base_model_name_or_path": source,
                "inference_mode": True,
            }
            write_json(fresh / "adapter_config.json", settings)
        else:
            write_json(fresh / "config.json", {"_class_name": family.name, "lora_rank": rank})
        for file, value in (beside or {}).items():
            put(fresh / file, value)
        name = "adapter_model" if peft else "pytorch_lora_weights"
        save_file(
            {k: np.ascontiguousarray(v) for k, v in tensors.items()},
            fresh / f"{name}.safetensors",
            metadata={"format": "pt"},
        )
        if card:
            (fresh / "README.md").write_text(card, encoding="utf-8")


def check_adapter(folder: str | Path, base: Net, adapter: Adapter) -> None:
    """Raises Refused where `save_adapter` would, whatever the weights are: found on weights that
    are drawn here.
    """
    family = _family(folder, base)
    draw = np.random.default_rng(0)
    rows = {row.path: row for row in family.table(base.config)}
    for path, pair in adapter.shapes.items():
        rank = min(pair["a"].shape[-1], 2)
        a = (*pair["a"].shape[:-1], rank)
        b = (*pair["b"].shape[:-2], rank, pair["b"].shape[-1])
        one = slice(1, None) if rows[path].stacked else slice(None)
        _pair(
            Path(folder),
            rows[path],
            *(draw.standard_normal(shape[one], np.float32) for shape in (a, b)),
        )


def _family(folder: str | Path, base: Net) -> Family:
    """The base's. Raises Refused where its library puts no adapter on it."""
    family = family_of(base)
    if not family.adapters:
        raise Refused(
            f"{folder}: {family.library} puts no adapter on {family.name}; export without --adapter, merged"
        )
    return family


def _pair(folder: Path, row: Row, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(A [r, in, ...], B [out, r, ...]) of PyTorch for a [i, r], b [r, o] of ours; checked on their
    product.
    """
    if a.ndim == 2 and row.name.endswith(".weight"):
        down = np.asarray(row.layout.to_torch(a))
        up = b.T.reshape(*b.T.shape, *[1] * (down.ndim - 2))
        whole = np.asarray(row.layout.to_torch(a @ b))
        product = (
            (b.T @ down.reshape(len(down), -1)).reshape(whole.shape)
            if down.shape[0] == a.shape[1]
            else np.nan
        )
        if np.allclose(product, whole, rtol=1e-4, atol=1e-5 * (np.abs(whole).max() + 1e-30)):
            return down, up
    raise Refused(
        f"{folder}: {row.name} is not a matrix of its own in PyTorch; export without --adapter, merged"
    )
