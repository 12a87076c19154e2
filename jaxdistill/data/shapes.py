"""Small pictures with captions of three words, made on the fly: a text-conditional data set."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jaxdistill.core.fields import Share
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
    """A shape of one colour on black, at one of nine places: x float32 [B 6 6 3] in [-1, 1].

    cond is a caption: text float32 [B 3 dim], the embeddings of "<s>", shape and colour, and mask
    bool [B 3], False for a colour that is not told. null_cond is the caption "<s>". label int32
    [B 2] holds the numbers of the picture's shape and colour.
    """

    batch_size: int = 64
    dim: int = 16  # of the words' embeddings, fixed random vectors of unit variance
    untold: Share = 0.5  # share of captions without a colour

    def draw(self, rng: np.random.Generator, n: int) -> dict:
        """`n` pictures with their captions."""
        shape = rng.integers(0, len(SHAPES), n)
        colour = rng.integers(0, len(COLOURS), n)
        row = rng.integers(0, 3, n)
        column = rng.integers(0, 3, n)
        told = rng.random(n) >= self.untold
        return {
            "x": pictures()[shape, colour, row, column],
            "cond": self.caption(shape, colour, told),
            "null_cond": self.caption(
                shape, colour, np.zeros_like(told), shaped=False
            ),
            "label": np.stack([shape, colour], 1).astype(np.int32),
        }

    def caption(
        self,
        shape: np.ndarray,
        colour: np.ndarray,
        told: np.ndarray,
        shaped: bool = True,
    ) -> dict[str, np.ndarray]:
        """The caption of shapes [B] in colours [B].

        Args:
            told: bool [B], whether the caption names the colour.
            shaped: whether it names the shape.
        """
        words = np.stack(
            [np.zeros_like(shape), 1 + shape, 1 + len(SHAPES) + colour], 1
        )
        mask = np.stack([np.ones_like(told), np.full_like(told, shaped), told], 1)
        table = (
            np.random.default_rng(7)
            .standard_normal((len(WORDS), self.dim))
            .astype(np.float32)
        )
        return {"text": table[words], "mask": mask}

    def batch(self, index, samples):
        drawn = self.draw(
            np.random.default_rng([self.seed, 1, index]), self.batch_size
        )
        return jax.tree.map(lambda v: v[samples], drawn)

    def evaluation(self, n):
        return self.draw(np.random.default_rng([self.seed, 2]), n)


def pictures() -> np.ndarray:
    """Every picture, by shape, colour, row and column: float32 [shapes colours 3 3 6 6 3]."""
    out = np.full((len(SHAPES), len(COLOURS), 3, 3, 6, 6, 3), -1, np.float32)
    for i, drawing in enumerate(SHAPES.values()):
        ink = np.array([[mark == "#" for mark in line] for line in drawing])
        for j, colour in enumerate(COLOURS.values()):
            for r in range(3):
                for c in range(3):
                    out[i, j, r, c, r : r + 4, c : c + 4][ink] = colour
    return out
