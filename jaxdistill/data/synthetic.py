"""Random arrays in the shape of a data set that is elsewhere: to plan, compile and time a recipe
without its data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.data.base import Dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic(Dataset):
    """`arrays` says what one sample holds: name -> "normal 32 32 4" (float32 of that shape),
    "integers 1000 128" (int32 below 1000, shape [128]) or "constant 1000" (int32; with a shape
    after the value where it has one).

    A stroke makes a group: "cond/text" is the key "text" of "cond". Raises Refused on another
    description.
    """

    arrays: Mapping[str, str] | None = None

    @property
    def vocab_size(self):
        return self._below("tokens")

    @property
    def label_count(self):
        return self._below("cond")

    def _below(self, name: str) -> int | None:
        """What the integers of an array are below; None where it has none."""
        kind, *numbers = (self.arrays or {}).get(name, "").split() or [""]
        return (
            int(numbers[0]) if kind == "integers" and numbers and numbers[0].isdecimal() else None
        )

    def batch(self, index, rows):
        share = np.arange(self.batch_size)[rows]
        return self._draw(len(share), np.random.default_rng([self.seed, index, int(share[0])]))

    def evaluation(self, n):
        return self._draw(n, np.random.default_rng([self.seed, 1 << 32]))

    def _draw(self, n: int, rng: np.random.Generator) -> dict:
        out: dict = {}
        for name, text in (self.arrays or {}).items():
            *groups, last = name.split("/")
            place = out
            for group in groups:
                place = place.setdefault(group, {})
            place[last] = self._array(name, text, n, rng)
        return out

    def _array(self, name: str, text: str, n: int, rng: np.random.Generator) -> np.ndarray:
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
            f"data.arrays.{name}={text!r}: expected 'normal SHAPE', 'integers BELOW [SHAPE]' or 'constant VALUE [SHAPE]'"
        )
