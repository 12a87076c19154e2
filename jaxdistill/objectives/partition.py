"""Which of several experts a condition belongs to: disjoint cells that cover all conditions (MSD,
arXiv:2410.23274).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.types import Array, Batch, Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """Base of all partitions. A subclass gives `assign`."""

    cells: int = 4

    def __post_init__(self):
        if self.cells < 1:
            raise Refused(f"partition.cells={self.cells}: expected a positive integer")

    def assign(self, cond: Any) -> Array:
        """The cell of each condition, int32 [B] in 0..cells - 1."""
        raise NotImplementedError

    def sizes(self, cond: Any) -> Array:
        """How many of these conditions each cell has, int32 [cells]."""
        return jnp.bincount(self.assign(cond), length=self.cells)

    def split(self, batch: Batch) -> tuple[Batch, Array]:
        """(rows [B ...] of which the k-th B / cells are of cell k, bool [cells]: whether the batch
        has any).

        Of a cell with too many rows the last ones are left out, of one with too few some are
        repeated. One cell gets the batch as it is. Raises Refused where B is no multiple of
        `cells`.
        """
        cell = self.assign(batch["cond"])
        share, left = divmod(cell.shape[0], self.cells)
        if left:
            raise Refused(
                f"data.batch_size={cell.shape[0]}: expected a multiple of partition.cells={self.cells}"
            )

        def rows(k):
            mine = cell == k
            return jnp.argsort(~mine, stable=True)[
                jnp.arange(share) % jnp.maximum(jnp.sum(mine), 1)
            ]

        index = jax.vmap(rows)(jnp.arange(self.cells)).reshape(-1)
        return jax.tree.map(lambda v: v[index], dict(batch)), self.sizes(batch["cond"]) > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consecutive(Partition):
    """Labels 0..classes - 1 in blocks: floor(c cells / classes). Sizes differ by one at most."""

    classes: int = 1000

    def assign(self, cond):
        return jnp.clip(cond * self.cells // self.classes, 0, self.cells - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shuffled(Consecutive):
    """Consecutive blocks of labels in a random order: the control without coherent cells."""

    seed: int = 0

    def assign(self, cond):
        return super().assign(
            jnp.asarray(np.random.default_rng(self.seed).permutation(self.classes))[cond]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded(Partition):
    """Base of partitions by an embedding [B D]: the condition itself, or its entry `key` where it
    is a tree.
    """

    key: str = "pooled"

    def embedding(self, cond: Any) -> Array:
        """[B D], float32."""
        return jnp.asarray(cond[self.key] if isinstance(cond, Mapping) else cond, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadrant(Embedded):
    """The sign pattern along log2(cells) random directions. Without thresholds it does not depend
    on the embedding's length.

    Raises Refused where `cells` is no power of two.
    """

    seed: int = 0  # of the directions
    thresholds: tuple[float, ...] = ()  # one for each direction; none: 0

    def __post_init__(self):
        super().__post_init__()
        if self.cells & (self.cells - 1):
            raise Refused(
                f"partition.cells={self.cells}: expected a power of two, a sign for each direction"
            )

    def heights(self, cond: Any) -> Array:
        """Coordinates along the directions, [B log2(cells)]."""
        embedding = self.embedding(cond)
        shape = (self.cells.bit_length() - 1, embedding.shape[-1])
        return (
            embedding
            @ jnp.asarray(
                np.random.default_rng(self.seed).standard_normal(shape), embedding.dtype
            ).T
        )

    def assign(self, cond):
        above = self.heights(cond) > jnp.asarray(self.thresholds or 0.0)
        return jnp.sum(above << jnp.arange(above.shape[-1]), -1, dtype=jnp.int32)

    def balanced(self, cond: Any) -> Quadrant:
        """With the medians over these conditions as thresholds, so that each direction halves them."""
        return dataclasses.replace(
            self, thresholds=tuple(float(m) for m in np.median(np.asarray(self.heights(cond)), 0))
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest(Embedded):
    """The nearest of some centres, those of `kmeans`. Cells may be of very different sizes."""

    centres: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if len(self.centres) != self.cells:
            raise Refused(
                f"partition.centres: {len(self.centres)} of them, expected {self.cells}, one for each cell"
            )

    def assign(self, cond):
        gap = self.embedding(cond)[:, None] - jnp.asarray(self.centres, jnp.float32)
        return jnp.argmin(jnp.sum(gap**2, -1), -1).astype(jnp.int32)


def kmeans(
    points: np.ndarray, cells: int, seed: int = 0, rounds: int = 100
) -> tuple[tuple[float, ...], ...]:
    """Lloyd's algorithm on points [n D] from k-means++'s choice among them; a centre that loses all
    its points stays.
    """
    points = np.asarray(points, np.float64)
    rng = np.random.default_rng(seed)
    gaps = lambda centres: ((points[:, None] - centres) ** 2).sum(-1)  # [n, centres]
    centres = points[rng.integers(len(points), size=1)]
    while len(centres) < cells:
        far = gaps(centres).min(1)
        centres = np.concatenate([centres, points[rng.choice(len(points), 1, p=far / far.sum())]])
    for _ in range(rounds):
        nearest = np.argmin(gaps(centres), 1)
        moved = np.stack(
            [
                points[nearest == k].mean(0) if np.any(nearest == k) else centres[k]
                for k in range(cells)
            ]
        )
        if np.allclose(moved, centres, rtol=0, atol=1e-12):
            break
        centres = moved
    return tuple(tuple(float(v) for v in centre) for centre in centres)
