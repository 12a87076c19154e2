"""Random arrays in the shape of another data set, to plan, compile and time a recipe without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.data.base import Dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic(Dataset):
    """Random arrays, described one by one in `arrays`.

    Raises Refused, when a batch is made, on a description that is none of those below.
    """

    # Name -> what one sample holds: "normal 32 32 4" is float32 [32 32 4]; "integers 1000 128" is
    # int32 [128] below 1000; "constant 1000" is int32 of that value, and a shape may follow it. A
    # slash makes a group: "cond/text" is the key "text" of "cond".
    arrays: Mapping[str, str] | None = None

    @property
    def vocab_size(self):
        return self._below("tokens")

    @property
    def label_count(self):
        return self._below("cond")

    def _below(self, name: str) -> int | None:
        """The bound of an array's integers; None where it holds no integers."""
        kind, *numbers = (self.arrays or {}).get(name, "").split() or [""]
        if kind != "integers" or not numbers or not numbers[0].isdecimal():
            return None
        return int(numbers[0])

    def batch(self, index, samples):
        share = np.arange(self.batch_size)[samples]
        return self._draw(
            len(share), np.random.default_rng([self.seed, index, int(share[0])])
        )

    def evaluation(self, n):
        return self._draw(n, np.random.default_rng([self.seed, 1 << 32]))

    def _draw(self, n: int, rng: np.random.Generator) -> dict:
        out: dict = {}
        for name, text in (self.arrays or {}).items():
            *groups, last = name.split("/")
            inner = out
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[last] = self._array(name, text, n, rng)
        return out

    def _array(
        self, name: str, text: str, n: int, rng: np.random.Generator
    ) -> np.ndarray:
        kind, *numbers = text.split()
        try:
            sizes = [int(number) for number in numbers]
            if kind == "normal":
                return rng.standard_normal((n, *sizes), np.float32)
            if kind == "integers":
                return rng.integers(0, sizes[0], (n, *sizes[1:]), np.int32)
            if kind == "constant":
                return np.full((n, *sizes[1:]), sizes[0], np.int32)
        except (ValueError, IndexError):
            pass
        raise Refused(
            f"data.arrays.{name}={text!r}: expected 'normal SHAPE', 'integers BELOW [SHAPE]' or "
            "'constant VALUE [SHAPE]'"
        )
