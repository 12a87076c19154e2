"""Peak figures of accelerators, from the vendors' data sheets."""

from __future__ import annotations

import dataclasses

from jaxdistill.core.types import lookup


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip."""

    kinds: tuple[str, ...]  # JAX's `device_kind`, or for NVIDIA the beginning of it
    flops: float  # dense bfloat16 flops/s
    hbm: float  # bytes of its memory
    bandwidth: float  # bytes/s of its memory
    links: float  # bytes/s that all links to neighbours send together, in one direction
    node: int = 0  # GPUs that share NVLink; 0 for TPUs, which form a torus
    network: float = 0.0  # bytes/s of each GPU between nodes


GIB = 2**30
T = 1e12
G = 1e9
# TPU: cloud.google.com/tpu/docs, a page for each version ("interchip interconnect bandwidth").
# NVIDIA: data sheets; the network is InfiniBand of 400 Gb/s a GPU, 200 Gb/s with A100.
CHIPS = {
    "v4": Chip(("TPU v4",), 275 * T, 32 * GIB, 1228 * G, 300 * G),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197 * T, 16 * GIB, 819 * G, 200 * G),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459 * T, 95 * GIB, 2765 * G, 600 * G),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918 * T, 32 * GIB, 1640 * G, 448 * G),
    "a100": Chip(
        ("NVIDIA A100",),
        312 * T,
        80 * GIB,
        2039 * G,
        300 * G,
        node=8,
        network=25 * G,
    ),
    "h100": Chip(
        ("NVIDIA H100",),
        989 * T,
        80 * GIB,
        3350 * G,
        450 * G,
        node=8,
        network=50 * G,
    ),
    "h200": Chip(
        ("NVIDIA H200",),
        989 * T,
        141 * GIB,
        4800 * G,
        450 * G,
        node=8,
        network=50 * G,
    ),
}


def chip(name: str) -> Chip:
    """The chip of this name in CHIPS. Raises Refused on an unknown name."""
    return lookup(CHIPS, name, "chip")


def of(kind: str) -> Chip | None:
    """The chip of a `device_kind`; None for CPUs and chips that are not in CHIPS."""
    for found in CHIPS.values():
        if kind in found.kinds:
            return found
        gpus = tuple(name for name in found.kinds if name.startswith("NVIDIA"))
        if kind.startswith(gpus):
            return found
    return None
