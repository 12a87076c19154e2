"""Small pictures with captions of three words: the smallest text-conditional data set, made on the
fly.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.data.base import Dataset

SHAPES = {
    "square": ["....", ".##.", ".##.", "...."],
    "cross": [".#..", "###.", ".#..", "...."],
    "ring": ["####", "#..#", "#..#", "####"],
    "stairs": ["#...", "##..", "###.", "####"],
}
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1)}
WORDS = ("<s>", *SHAPES, *COLOURS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes(Dataset):
    """x float32 [6, 6, 3] in -1 to 1: a shape of one colour on black, at one of nine places. cond:
    text float32 [3, dim], the embeddings of "<s>", shape and colour, and mask bool [3], False for a
    colour that is not told. null_cond: "<s>" alone.

    `label` int32 [2] is the number of the shape, and of the colour in the picture.
    """

    batch_size: int = 64
    dim: int = 16  # of the words' embeddings, fixed random vectors of unit variance
    untold: float = 0.5  # share of captions without a colour

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.untold <= 1:
            raise Refused(f"data.untold={self.untold}: expected a share from 0 to 1")

    def draw(self, rng: np.random.Generator, n: int) -> dict:
        shape, colour, row, column = (
            rng.integers(0, k, n) for k in (len(SHAPES), len(COLOURS), 3, 3)
        )
        told = rng.random(n) >= self.untold
        return {
            "x": pictures()[shape, colour, row, column],
            "cond": self.caption(shape, colour, told),
            "null_cond": self.caption(shape, colour, told & False, shaped=False),
            "label": np.stack([shape, colour], 1).astype(np.int32),
        }

    def caption(
        self, shape: np.ndarray, colour: np.ndarray, told: np.ndarray, shaped: bool = True
    ) -> dict[str, np.ndarray]:
        """The condition of shapes [n] and colours [n], these where `told` [n]; without shapes where
        not `shaped`.
        """
        words = np.stack([np.zeros_like(shape), 1 + shape, 1 + len(SHAPES) + colour], 1)
        mask = np.stack([np.ones_like(told), np.full_like(told, shaped), told], 1)
        table = np.random.default_rng(7).standard_normal((len(WORDS), self.dim)).astype(np.float32)
        return {"text": table[words], "mask": mask}

    def batch(self, index, rows):
        out = self.draw(np.random.default_rng([self.seed, 1, index]), self.batch_size)
        pick = lambda tree: {
            k: pick(v) if isinstance(v, dict) else v[rows] for k, v in tree.items()
        }
        return pick(out)

    def evaluation(self, n):
        return self.draw(np.random.default_rng([self.seed, 2]), n)


def pictures() -> np.ndarray:
    """Every picture: float32 [shapes, colours, 3, 3, 6, 6, 3], by shape, colour, row and column."""
    out = np.full((len(SHAPES), len(COLOURS), 3, 3, 6, 6, 3), -1, np.float32)
    for i, rows in enumerate(SHAPES.values()):
        ink = np.array([[mark == "#" for mark in row] for row in rows])
        for j, colour in enumerate(COLOURS.values()):
            for r in range(3):
                for c in range(3):
                    out[i, j, r, c, r : r + 4, c : c + 4][ink] = colour
    return out
