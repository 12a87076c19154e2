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
from jaxtyping import Bool, Float, Int, Shaped

from jaxdistill.core.types import Array, Batch, Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """Base of all partitions. A subclass gives `assign`."""

    cells: int = 4

    def __post_init__(self):
        if self.cells < 1:
            raise Refused(
                f"partition.cells={self.cells}: expected a positive integer"
            )

    def assign(self, cond: Any) -> Int[Array, " B"]:
        """The cell of each condition, in 0..cells - 1."""
        raise NotImplementedError

    def sizes(self, cond: Any) -> Int[Array, " K"]:
        """How many of these conditions each cell has."""
        return jnp.bincount(self.assign(cond), length=self.cells)

    def split(self, batch: Batch) -> tuple[Batch, Bool[Array, " K"]]:
        """A batch in which each cell has B / cells samples in turn, and which cells had any before.

        Where a cell has too many samples, the last ones are left out; where it has too few, some
        are repeated. With one cell the batch stays as it is.

        Raises:
          Refused: where B is no multiple of `cells`.
        """
        cell = self.assign(batch["cond"])
        share, left = divmod(cell.shape[0], self.cells)
        if left:
            given = f"data.batch_size={cell.shape[0]}"
            raise Refused(
                f"{given}: expected a multiple of partition.cells={self.cells}"
            )

        @jax.vmap
        def samples_of(k: Array) -> Array:
            own = cell == k
            own_first = jnp.argsort(~own, stable=True)
            return own_first[jnp.arange(share) % jnp.maximum(jnp.sum(own), 1)]

        index = samples_of(jnp.arange(self.cells)).reshape(-1)
        return jax.tree.map(lambda v: v[index], dict(batch)), self.sizes(
            batch["cond"]
        ) > 0


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
        order = np.random.default_rng(self.seed).permutation(self.classes)
        return super().assign(jnp.asarray(order)[cond])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded(Partition):
    """Base of partitions by an embedding: the condition itself, or its entry `key` where it is a
    tree.
    """

    key: str = "pooled"

    def embedding(self, cond: Any) -> Float[Array, "B D"]:
        """The embedding of each condition, float32."""
        found = cond[self.key] if isinstance(cond, Mapping) else cond
        return jnp.asarray(found, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadrant(Embedded):
    """The pattern of signs along log2(cells) random directions.

    Without thresholds it does not depend on the length of the embedding. Raises Refused where
    `cells` is no power of two.
    """

    seed: int = 0  # of the directions
    thresholds: tuple[float, ...] = ()  # one for each direction; none: 0

    def __post_init__(self):
        super().__post_init__()
        if self.cells & (self.cells - 1):
            expected = "a power of two, a sign for each direction"
            raise Refused(f"partition.cells={self.cells}: expected {expected}")

    def heights(self, cond: Any) -> Float[Array, "B K"]:
        """Coordinates of the embeddings along the log2(cells) directions."""
        embedding = self.embedding(cond)
        shape = (self.cells.bit_length() - 1, embedding.shape[-1])
        directions = np.random.default_rng(self.seed).standard_normal(shape)
        return embedding @ jnp.asarray(directions, embedding.dtype).T

    def assign(self, cond):
        above = self.heights(cond) > jnp.asarray(self.thresholds or 0.0)
        return jnp.sum(above << jnp.arange(above.shape[-1]), -1, dtype=jnp.int32)

    def balanced(self, cond: Any) -> Quadrant:
        """The partition with the medians over these conditions as its thresholds.

        Each direction then halves them.
        """
        medians = np.median(np.asarray(self.heights(cond)), 0)
        return dataclasses.replace(
            self, thresholds=tuple(float(m) for m in medians)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest(Embedded):
    """The nearest of some centres (`kmeans`). Cells may be of very different sizes."""

    centres: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if len(self.centres) != self.cells:
            given = f"partition.centres: {len(self.centres)} of them"
            raise Refused(f"{given}, expected {self.cells}, one for each cell")

    def assign(self, cond):
        gap = self.embedding(cond)[:, None] - jnp.asarray(self.centres, jnp.float32)
        return jnp.argmin(jnp.sum(gap**2, -1), -1).astype(jnp.int32)


def kmeans(
    points: Shaped[np.ndarray, "N D"], cells: int, seed: int = 0, rounds: int = 100
) -> tuple[tuple[float, ...], ...]:
    """Centres of Lloyd's algorithm, from k-means++'s choice among the points.

    A centre that loses all its points stays where it is.
    """
    points = np.asarray(points, np.float64)
    rng = np.random.default_rng(seed)

    def squared_distances(centres: np.ndarray) -> np.ndarray:
        return ((points[:, None] - centres) ** 2).sum(-1)  # [N, centres]

    centres = points[rng.integers(len(points), size=1)]
    while len(centres) < cells:
        far = squared_distances(centres).min(1)
        chosen = points[rng.choice(len(points), 1, p=far / far.sum())]
        centres = np.concatenate([centres, chosen])
    for _ in range(rounds):
        nearest = np.argmin(squared_distances(centres), 1)
        moved = centres.copy()
        for k in range(cells):
            if np.any(nearest == k):
                moved[k] = points[nearest == k].mean(0)
        if np.allclose(moved, centres, rtol=0, atol=1e-12):
            break
        centres = moved
    return tuple(tuple(float(v) for v in centre) for centre in centres)
