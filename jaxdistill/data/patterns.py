"""Much text without labels and a little labelled text of one kind, together in every batch."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from jaxdistill.data.base import Dataset, at_positions
from jaxdistill.data.language import Markov


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patterns(Dataset):
    """Texts that contain one of two patterns, a b c or c b a, and general text.

    tokens int32 and mask bool [B length] are a text of the first language, label int32 [B] which
    pattern it has. general_tokens and general_mask are endless text of all languages, which are
    first-order Markov chains over one vocabulary. Held-out texts are half of the first language and
    half of the second, which domain int32 [B] tells.
    """

    size: int = 300  # labelled texts for training
    languages: int = 4
    vocab: int = 12  # the pattern's three symbols occur elsewhere too
    length: int = 16

    classes = 2

    @property
    def vocab_size(self):
        return self.vocab

    @functools.cached_property
    def chains(self) -> list[Markov]:
        """The languages."""
        first = Markov(order=1, branch=2, vocab=self.vocab, length=self.length)
        seeds = [self.seed * 101 + i for i in range(self.languages)]
        return [dataclasses.replace(first, seed=seed) for seed in seeds]

    def planted(self, language: int, n: int, key: int) -> dict[str, np.ndarray]:
        """`n` texts of a language with a pattern somewhere in each; `key` seeds the draw."""
        rng = np.random.default_rng([self.seed, 5, key])
        tokens = self.chains[language].sequences(rng.random((n, self.length)))[
            "tokens"
        ]
        label = rng.integers(0, 2, n).astype(np.int32)
        at = rng.integers(0, self.length - 2, n)
        pattern = np.array([[3, 1, 2], [2, 1, 3]], np.int32)[label]
        for column in range(3):
            tokens[np.arange(n), at + column] = pattern[:, column]
        return {
            "tokens": tokens,
            "mask": np.ones(tokens.shape, bool),
            "label": label,
        }

    @functools.cached_property
    def labelled(self) -> dict[str, np.ndarray]:
        """The labelled texts for training."""
        return self.planted(0, self.size, 0)

    def batch(self, index, samples):
        positions = index * self.batch_size + np.arange(self.batch_size)[samples]
        picked = at_positions(self.seed, self.size, positions)
        rng = np.random.default_rng([self.seed, 6, index])
        language = rng.integers(0, self.languages, self.batch_size)[samples]
        u = rng.random((self.batch_size, self.length))[samples]
        every = np.stack([chain.sequences(u)["tokens"] for chain in self.chains])
        general = every[language, np.arange(len(language))]
        return {
            **{k: v[picked] for k, v in self.labelled.items()},
            "general_tokens": general,
            "general_mask": np.ones(general.shape, bool),
        }

    def evaluation(self, n):
        first = self.planted(0, n // 2, 1)
        second = self.planted(1, n // 2, 2)
        both = {k: np.concatenate([first[k], second[k]]) for k in first}
        return {**both, "domain": np.repeat(np.int32([0, 1]), n // 2)}
