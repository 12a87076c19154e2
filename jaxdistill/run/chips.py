"""What accelerators can do: one table, from the vendors' data sheets."""

from __future__ import annotations

import dataclasses

from jaxdistill.core.types import lookup


@dataclasses.dataclass(frozen=True)
class Chip:
    """Per chip: dense bfloat16 flops/s, HBM bytes and bytes/s, and bytes/s that all its links to
    neighbours send together.
    """

    kinds: tuple[str, ...]  # how jax names the device (`device_kind`), or the beginning of it
    flops: float
    hbm: float
    bandwidth: float
    links: float
    node: int = 0  # GPUs that share NVLink; 0: a torus
    network: float = 0.0  # bytes/s and GPU between nodes


GIB = 2**30
T = 1e12
G = 1e9
# TPU: cloud.google.com/tpu/docs, a page for each version ("interchip interconnect bandwidth").
# NVIDIA: data sheets,
CHIPS = {
    # links in one direction; network: InfiniBand of 400 Gb/s a GPU, 200 Gb/s with A100
    "v4": Chip(("TPU v4",), 275 * T, 32 * GIB, 1228 * G, 300 * G),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197 * T, 16 * GIB, 819 * G, 200 * G),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459 * T, 95 * GIB, 2765 * G, 600 * G),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918 * T, 32 * GIB, 1640 * G, 448 * G),
    "a100": Chip(("NVIDIA A100",), 312 * T, 80 * GIB, 2039 * G, 300 * G, node=8, network=25 * G),
    "h100": Chip(("NVIDIA H100",), 989 * T, 80 * GIB, 3350 * G, 450 * G, node=8, network=50 * G),
    "h200": Chip(("NVIDIA H200",), 989 * T, 141 * GIB, 4800 * G, 450 * G, node=8, network=50 * G),
}


def chip(name: str) -> Chip:
    """A row of the table. Raises Refused on an unknown name."""
    return lookup(CHIPS, name, "chip")


def of(kind: str) -> Chip | None:
    """The chip that a `device_kind` names; None for CPUs and chips that the table does not know."""
    found = [
        c
        for c in CHIPS.values()
        if kind in c.kinds or any(k.startswith("NVIDIA") and kind.startswith(k) for k in c.kinds)
    ]
    return found[0] if found else None
