"""Two tokenisations of one text, brought together by the bytes that their tokens stand for."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.data.tokenizers import Tokenizer


def spans(
    first: Sequence[int], second: Sequence[int], *, ends: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which span each token belongs to: int32 [n] and [m], from the bytes of each token of either
    side, [n] and [m].

    Spans are numbered from 0 and are the finest pieces that are whole tokens on both sides: one
    ends wherever tokens of both sides do, with `ends` at these byte positions only. -1 on tokens of
    no bytes (special ones), and after the last common end, where one side is cut short. Raises
    Refused on negative numbers.
    """
    sides = [np.asarray(side, np.int64).reshape(-1) for side in (first, second)]
    if min((int(side.min()) for side in sides if len(side)), default=0) < 0:
        raise Refused("spans: a token of less than 0 bytes")
    stops = [np.cumsum(side) for side in sides]
    common = np.intersect1d(*(stop[side > 0] for stop, side in zip(stops, sides)))
    if ends is not None:
        common = np.intersect1d(common, ends)
    at = [np.searchsorted(common, stop) for stop in stops]
    return tuple(
        np.where((side > 0) & (i < len(common)), i, -1).astype(np.int32)
        for side, i in zip(sides, at)
    )


def covered(codec: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, bytes of `text` that each stands for), int32 [n] each.

    A blank that a tokenizer puts before every text counts nothing. Raises Refused where the tokens
    do not add up to the text (a tokenizer that changes it: lower case, unknown tokens).
    """
    tokens = codec.encode(text)
    lengths = np.asarray(codec.lengths(tokens), np.int32)
    spare = int(lengths.sum()) - len(text.encode())
    if spare == 1 and lengths[0] > 0:
        lengths[0] -= 1
    elif spare:
        raise Refused(
            f"tokenizer: its tokens stand for {lengths.sum()} bytes of a text of {len(text.encode())}: {text[:40]!r}"
        )
    return tokens, lengths


def word_ends(text: str) -> np.ndarray:
    """Byte positions in `text` before white space: where tokenizers that split words end a token
    whatever follows.
    """
    blank = [i for i, c in enumerate(text) if c.isspace() and i]
    return np.cumsum([0, *(len(c.encode()) for c in text)])[blank]


def begins_with_space(codec: Tokenizer) -> np.ndarray:
    """Which ids begin with white space or are special, uint8 [ceil(vocab / 8)], eight to a byte
    (`numpy.packbits`): after which text a word has ended.
    """
    texts = codec.texts()
    sizes = codec.lengths(np.arange(codec.vocab))
    return np.packbits(
        [text[:1].isspace() if text else size == 0 for text, size in zip(texts, sizes)]
    )


def unigram(codec: Tokenizer, texts: Iterable[str], smoothing: float = 1e-9) -> np.ndarray:
    """Share of every id in these texts, float64 [vocab], `smoothing` of all tokens added to each
    (ALM's 1e-9).
    """
    counts = np.zeros(codec.vocab)
    for text in texts:
        np.add.at(counts, codec.encode(text), 1)
    counts += smoothing * max(counts.sum(), 1.0)
    return counts / counts.sum()


class Covers:
    """How a tokenizer could have gone on instead of ending a token (ALM, arXiv:2503.20083, appendix
    on tokenisation bias).

    A model that has read "Hel" as a token knows that "lo" does not follow, for "Hello" is one
    token: its law after a piece of text leaves out what would have been cut otherwise. `of(piece)`
    are these continuations, with the unigram probability of the token that has each. Raises Refused
    on a tokenizer that puts a blank before every text.
    """

    def __init__(self, codec: Tokenizer, probabilities: np.ndarray):
        if int(np.sum(codec.lengths(codec.encode("a")))) != 1:
            raise Refused(
                "data.ends=unbiased: the tokenizer puts a blank before a text; expected ends=words"
            )
        self.codec = codec
        self.probabilities = probabilities
        self.texts = codec.texts()
        self.ordered = sorted((text, i) for i, text in enumerate(self.texts) if text)
        self.found: dict[str, Mapping[str, float]] = {}

    def of(self, piece: str) -> Mapping[str, float]:
        """Continuations of `piece` that some valid tokenisation reaches by a token which begins
        inside it and ends beyond.
        """
        if piece not in self.found:
            self.found[piece] = dict(self._search(piece))
        return self.found[piece]

    def _search(self, piece: str) -> Iterable[tuple[str, float]]:
        for start in range(len(piece)):
            rest = piece[start:]
            before = self.codec.encode(piece[:start]).tolist()
            for at in range(bisect.bisect_left(self.ordered, (rest,)), len(self.ordered)):
                text, i = self.ordered[at]
                if not text.startswith(rest):
                    break
                if len(text) > len(rest) and self.codec.encode(piece[:start] + text).tolist() == [
                    *before,
                    i,
                ]:
                    yield text[len(rest) :], float(self.probabilities[i])


def bias(first: Covers, second: Covers, tokens: tuple[int, int]) -> float:
    """By how much the laws of two sides differ after text whose last tokens are these ids: the
    larger probability of what the one leaves out and the other does not, each by its own unigrams.
    Special tokens have none; other tokens of white space alone, and bytes that are no characters,
    count as 1.
    """
    pieces = [covers.texts[token] for covers, token in zip((first, second), tokens)]
    sizes = [
        int(covers.codec.lengths(np.array([token]))[0])
        for covers, token in zip((first, second), tokens)
    ]
    if 0 in sizes:
        return 0.0
    if not all(piece and piece.strip() for piece in pieces):
        return 1.0
    a = first.of(pieces[0])
    b = second.of(pieces[1])
    return max(
        sum(p for k, p in a.items() if k not in b), sum(p for k, p in b.items() if k not in a)
    )
