"""Alignment of two tokenizations of one text by the bytes that their tokens stand for."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxdistill.core.types import Refused
from jaxdistill.data.tokenizers import Tokenizer


def spans(
    first: Sequence[int],
    second: Sequence[int],
    *,
    ends: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which span each token belongs to.

    A span is the shortest piece of text that consists of complete tokens on both sides: one ends
    wherever tokens of both sides end.

    Args:
        first: bytes of each token of one side [n].
        second: bytes of each token of the other side [m].
        ends: byte positions where spans may end; None: anywhere.

    Returns:
        The span of each token, numbered from 0: int32 [n] and [m]. It is -1 on tokens of no bytes
        (special ones), and after the last common end, where one side is cut short.

    Raises:
        Refused: on negative numbers of bytes.
    """
    sides = [np.asarray(side, np.int64).reshape(-1) for side in (first, second)]
    if min((int(side.min()) for side in sides if len(side)), default=0) < 0:
        raise Refused("spans: a token of less than 0 bytes")
    stops = [np.cumsum(side) for side in sides]
    common = np.intersect1d(*(stop[side > 0] for stop, side in zip(stops, sides)))
    if ends is not None:
        common = np.intersect1d(common, ends)
    numbers = []
    for side, stop in zip(sides, stops):
        number = np.searchsorted(common, stop)
        inside = (side > 0) & (number < len(common))
        numbers.append(np.where(inside, number, -1).astype(np.int32))
    return tuple(numbers)


def covered(codec: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text, and the bytes of the text that each stands for: int32 [n] each.

    A space that a tokenizer puts before every text is not counted.

    Raises:
        Refused: where the tokens do not add up to the text, since the tokenizer changes it (lower
            case, unknown tokens).
    """
    tokens = codec.encode(text)
    lengths = np.asarray(codec.lengths(tokens), np.int32)
    size = len(text.encode())
    spare = int(lengths.sum()) - size
    if spare == 1 and lengths[0] > 0:
        lengths[0] -= 1
    elif spare:
        raise Refused(
            f"tokenizer: its tokens stand for {lengths.sum()} bytes of a text of {size}: "
            f"{text[:40]!r}"
        )
    return tokens, lengths


def word_ends(text: str) -> np.ndarray:
    """Byte positions in `text` before white space.

    Tokenizers that split words end a token there, whatever follows.
    """
    spaces = [i for i, c in enumerate(text) if c.isspace() and i]
    starts = np.cumsum([0, *(len(c.encode()) for c in text)])
    return starts[spaces]


def begins_with_space(codec: Tokenizer) -> np.ndarray:
    """Which ids begin with white space or are special: those before which a word has ended.

    Returns:
        uint8 [ceil(vocab / 8)], eight ids to a byte (`numpy.packbits`).
    """
    texts = codec.texts()
    sizes = codec.lengths(np.arange(codec.vocab))
    begins = [
        text[:1].isspace() if text else size == 0
        for text, size in zip(texts, sizes)
    ]
    return np.packbits(begins)


def unigram(
    codec: Tokenizer, texts: Iterable[str], smoothing: float = 1e-9
) -> np.ndarray:
    """Share of every id in these texts, float64 [vocab].

    Args:
        smoothing: added to the count of each id, as a share of all tokens; ALM's value.
    """
    counts = np.zeros(codec.vocab)
    for text in texts:
        np.add.at(counts, codec.encode(text), 1)
    counts += smoothing * max(counts.sum(), 1.0)
    return counts / counts.sum()


class Covers:
    """The continuations that a tokenizer excludes by ending a token: tokenization bias.

    A model that has read the token "Hel" knows that "lo" does not follow, since "Hello" is one
    token. `of(piece)` gives such continuations of a piece of text, each with the unigram
    probability of the token that would have contained it.

    Raises:
        Refused: on a tokenizer that puts a space before every text.

    Source:
        ALM, arXiv:2503.20083, appendix on tokenization bias.
    """

    def __init__(self, codec: Tokenizer, probabilities: np.ndarray):
        if int(np.sum(codec.lengths(codec.encode("a")))) != 1:
            raise Refused(
                "data.ends=unbiased: the tokenizer puts a blank before a text; expected ends=words"
            )
        self.codec = codec
        self.probabilities = probabilities
        self.texts = codec.texts()
        self.ordered = sorted(
            (text, i) for i, text in enumerate(self.texts) if text
        )
        self.found: dict[str, Mapping[str, float]] = {}

    def of(self, piece: str) -> Mapping[str, float]:
        """The continuations of `piece` inside a token that begins in it and ends beyond it."""
        if piece not in self.found:
            self.found[piece] = dict(self._search(piece))
        return self.found[piece]

    def _search(self, piece: str) -> Iterable[tuple[str, float]]:
        for start in range(len(piece)):
            head = piece[:start]
            rest = piece[start:]
            before = self.codec.encode(head).tolist()
            first = bisect.bisect_left(self.ordered, (rest,))
            for at in range(first, len(self.ordered)):
                text, i = self.ordered[at]
                if not text.startswith(rest):
                    break
                if len(text) == len(rest):
                    continue
                # The tokenizer must indeed cut the text before this token.
                if self.codec.encode(head + text).tolist() == [*before, i]:
                    yield text[len(rest) :], float(self.probabilities[i])


def bias(first: Covers, second: Covers, tokens: tuple[int, int]) -> float:
    """How much the tokenization bias of two sides differs after a text.

    It is the probability of the continuations that one side excludes and the other does not, by its
    own unigrams; the larger one of both sides. It is 0 after special tokens, and 1 after tokens of
    white space alone or of bytes that are no characters.

    Args:
        tokens: the last token of the text on either side.
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
        sum(p for k, p in a.items() if k not in b),
        sum(p for k, p in b.items() if k not in a),
    )
