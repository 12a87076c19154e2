"""General text without labels and a little labelled text of one kind, side by side in every batch."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from jaxdistill.data.base import Dataset, _order
from jaxdistill.data.language import Markov


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patterns(Dataset):
    """tokens int32, mask bool [length], label int32: which of two rare patterns (a b c, or c b a) a
    text of the first language has; `size` of them for training. general_tokens, general_mask:
    endless text of all `languages` (first-order Markov chains over one vocabulary).

    Evaluation: half in the first language, half in the second (domain int32 0, 1).
    """

    size: int = 300  # labelled texts
    languages: int = 4
    vocab: int = 12  # the pattern's three symbols occur elsewhere too
    length: int = 16

    classes = 2

    @functools.cached_property
    def chains(self) -> list[Markov]:
        return [
            Markov(
                order=1, branch=2, vocab=self.vocab, length=self.length, seed=self.seed * 101 + i
            )
            for i in range(self.languages)
        ]

    def planted(self, language: int, n: int, key: int) -> dict[str, np.ndarray]:
        """`n` texts of a language with a pattern somewhere in each."""
        rng = np.random.default_rng([self.seed, 5, key])
        tokens = self.chains[language].walk(rng.random((n, self.length)))["tokens"]
        label = rng.integers(0, 2, n).astype(np.int32)
        at = rng.integers(0, self.length - 2, n)
        pattern = np.array([[3, 1, 2], [2, 1, 3]], np.int32)[label]
        for column in range(3):
            tokens[np.arange(n), at + column] = pattern[:, column]
        return {"tokens": tokens, "mask": np.ones(tokens.shape, bool), "label": label}

    @functools.cached_property
    def labelled(self) -> dict[str, np.ndarray]:
        return self.planted(0, self.size, 0)

    def batch(self, index, rows):
        at = index * self.batch_size + np.arange(self.batch_size)[rows]
        pick = np.array(
            [_order(self.seed, self.size, int(p // self.size))[p % self.size] for p in at]
        )
        rng = np.random.default_rng([self.seed, 6, index])
        kind = rng.integers(0, self.languages, self.batch_size)[rows]
        u = rng.random((self.batch_size, self.length))[rows]
        every = np.stack([chain.walk(u)["tokens"] for chain in self.chains])
        general = every[kind, np.arange(len(kind))]
        return {
            **{k: v[pick] for k, v in self.labelled.items()},
            "general_tokens": general,
            "general_mask": np.ones(general.shape, bool),
        }

    def evaluation(self, n):
        parts = [self.planted(language, n // 2, 1 + language) for language in (0, 1)]
        return {
            **{k: np.concatenate([p[k] for p in parts]) for k in parts[0]},
            "domain": np.repeat(np.int32([0, 1]), n // 2),
        }
