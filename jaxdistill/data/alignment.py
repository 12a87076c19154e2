"""Two tokenisations of one text, brought together by the bytes that their tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.data.tokenizers import Tokenizer


def spans(first: Sequence[int], second: Sequence[int], *, ends: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which span each token belongs to: int32 [n] and [m], from the bytes of each token of either side, [n] and [m].

    Spans are numbered from 0 and are the finest pieces that are whole tokens on both sides: one ends wherever tokens of
    both sides do, with `ends` at these byte positions only. -1 on tokens of no bytes (special ones), and after the last
    common end, where one side is cut short. Raises Refused on negative numbers.
    """
    sides = [np.asarray(side, np.int64).reshape(-1) for side in (first, second)]
    if min((int(side.min()) for side in sides if len(side)), default=0) < 0:
        raise Refused("spans: a token of less than 0 bytes")
    stops = [np.cumsum(side) for side in sides]
    common = np.intersect1d(*(stop[side > 0] for stop, side in zip(stops, sides)))
    if ends is not None:
        common = np.intersect1d(common, ends)
    at = [np.searchsorted(common, stop) for stop in stops]
    return tuple(np.where((side > 0) & (i < len(common)), i, -1).astype(np.int32) for side, i in zip(sides, at))


def covered(codec: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, bytes of `text` that each stands for), int32 [n] each.

    A blank that a tokenizer puts before every text counts nothing. Raises Refused where the tokens do not add up to the
    text (a tokenizer that changes it: lower case, unknown tokens).
    """
    tokens = codec.encode(text)
    lengths = np.asarray(codec.lengths(tokens), np.int32)
    spare = int(lengths.sum()) - len(text.encode())
    if spare == 1 and lengths[0] > 0:
        lengths[0] -= 1
    elif spare:
        raise Refused(f"tokenizer: its tokens stand for {lengths.sum()} bytes of a text of {len(text.encode())}: {text[:40]!r}")
    return tokens, lengths


def word_ends(text: str) -> np.ndarray:
    """Byte positions in `text` before white space: where tokenizers that split words end a token whatever follows."""
    blank = [i for i, c in enumerate(text) if c.isspace() and i]
    return np.cumsum([0, *(len(c.encode()) for c in text)])[blank]
