"""Spans of two tokenisations against a search by brute force, on random splits and on real
tokenizers.
"""

import itertools

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.alignment import (
    Covers,
    begins_with_space,
    bias,
    covered,
    spans,
    unigram,
    word_ends,
)
from jaxdistill.data.tokenizers import ByteTokenizer, load_tokenizer


class Merged:
    """Greedy longest match over a few byte strings and every single byte."""

    pieces = [
        b"the ",
        b"th",
        b"he",
        b"e c",
        b" and",
        *(bytes([i]) for i in range(256)),
    ]

    def encode(self, text):
        text = text.encode()
        out = []
        while text:
            out.append(
                next(
                    i
                    for i, piece in enumerate(self.pieces)
                    if text.startswith(piece)
                )
            )
            text = text[len(self.pieces[out[-1]]) :]
        return np.int32(out)

    def lengths(self, tokens):
        return np.int32([len(self.pieces[i]) for i in tokens])


def split(rng, total):
    """Lengths of the pieces between random cuts of `total` bytes."""
    cuts = np.flatnonzero(rng.random(total - 1) < rng.random()) + 1
    return np.diff([0, *cuts, total])


def pieces(lengths, span):
    """Span -> the byte positions of its tokens."""
    ends = np.cumsum(lengths)
    out = {}
    for end, size, number in zip(ends, lengths, span):
        if number >= 0:
            out.setdefault(int(number), set()).update(range(end - size, end))
    return out


@pytest.mark.parametrize("seed", range(50))
def test_random_splits(seed):
    rng = np.random.default_rng(seed)
    total = int(rng.integers(1, 60))
    a = split(rng, total)
    b = split(rng, total)
    first, second = spans(a, b)
    assert first.dtype == second.dtype == np.int32
    assert pieces(a, first) == pieces(b, second)  # the same bytes on both sides
    assert (np.diff(first) >= 0).all() and set(first) == set(second) == set(
        range(first.max() + 1)
    )
    # nothing is left out
    assert set().union(*pieces(a, first).values()) == set(range(total))
    ends = lambda lengths: set(np.cumsum(lengths).tolist())
    assert first.max() + 1 == len(ends(a) & ends(b))  # none could be finer
    assert all((x == y).all() for x, y in zip(spans(b, a), (second, first)))


@pytest.mark.parametrize("seed", range(20))
def test_special_tokens_and_cut_ends(seed):
    rng = np.random.default_rng(seed)
    total = int(rng.integers(4, 60))
    a = split(rng, total)
    b = split(rng, total)
    first, second = spans(a, b)
    places = rng.integers(0, len(a) + 1, 3)
    again, other = spans(np.insert(a, places, 0), b)
    zeros = np.insert(a, places, 0) == 0
    assert (
        (again[zeros] == -1).all()
        and (again[~zeros] == first).all()
        and (other == second).all()
    )
    kept = int(rng.integers(0, len(a) + 1))
    cut, short = spans(a[:kept], b)
    whole = np.cumsum(a)[first <= (cut.max() if len(cut) else -1)]
    assert pieces(a[:kept], cut) == pieces(b, short) and (
        len(whole) == 0 or whole.max() <= a[:kept].sum()
    )
    assert all(
        (pieces(b, short)[number] == pieces(b, second)[number])
        for number in pieces(b, short)
    )


def test_the_same_tokenizer_gives_tokens():
    first, second = spans([1, 2, 3], [1, 2, 3])
    assert first.tolist() == second.tolist() == [0, 1, 2]
    assert [s.tolist() for s in spans([], [1])] == [[], [-1]]
    with pytest.raises(Refused, match="less than 0"):
        spans([1, -1], [1])


def test_bytes_against_a_merged_vocabulary():
    text = "the cat and thé hen"
    (_, a), (tokens, b) = covered(ByteTokenizer(), text), covered(Merged(), text)
    assert b.tolist() == [4, 1, 1, 1, 4, 1, 2, 1, 1, 1, 2, 1]
    first, second = spans(a, b)
    # every merged token is a span of bytes
    assert second.tolist() == list(range(len(tokens)))
    assert np.bincount(first).tolist() == b.tolist()


def test_only_at_words(folder):
    text = "the cat and the dögs end"
    codec = load_tokenizer(str(folder(bos=False, eos_token="</s>")))
    (_, a), (_, b) = covered(ByteTokenizer(), text), covered(codec, text)
    coarse, _ = spans(a, b, ends=[*word_ends(text), len(text.encode())])
    said = [
        bytes(text.encode()[min(p) : max(p) + 1]).decode()
        for p in pieces(a, coarse).values()
    ]
    assert said == ["the", " cat", " and", " the", " dögs", " end"]
    fine, _ = spans(a, b)
    assert fine.max() > coarse.max()


@pytest.mark.parametrize("text", ["", "the dog", "Zürich, 東京 🙂 the end"])
def test_covered_adds_up(folder, text):
    for codec in (
        ByteTokenizer(),
        Merged(),
        load_tokenizer(str(folder(bos=True, eos_token="</s>"))),
    ):
        tokens, lengths = covered(codec, text)
        assert len(tokens) == len(lengths) and lengths.sum() == len(text.encode())


def test_tokenizers_that_change_the_text_are_refused():
    class Lossy(Merged):
        def encode(self, text):
            return super().encode(text.replace("é", ""))

    class Blank(Merged):
        def encode(self, text):
            return super().encode(" " + text)

    assert covered(Blank(), "the")[1].tolist() == [0, 2, 1]
    with pytest.raises(Refused, match="stand for 3 bytes of a text of 5"):
        covered(Lossy(), "théo")


class Longest:
    """Greedy longest match over these pieces; an empty piece is a special token."""

    def __init__(self, *pieces):
        self.pieces = pieces
        self.vocab = len(pieces)

    def encode(self, text):
        out = []
        while text:
            out.append(
                max(
                    (
                        i
                        for i, p in enumerate(self.pieces)
                        if p and text.startswith(p)
                    ),
                    key=lambda i: len(self.pieces[i]),
                )
            )
            text = text[len(self.pieces[out[-1]]) :]
        return np.int32(out)

    def lengths(self, tokens):
        return np.int32([len(self.pieces[i]) for i in tokens])

    def texts(self):
        return [piece or None for piece in self.pieces]


WORDS = Longest("a", "b", "c", " ", "ab", "abc", "bca", " a", "cc", "")
LETTERS = Longest("", "a", "b", "c", " ")


@pytest.mark.parametrize("piece", ["a", "b", "ab", "bca", " a", "abc", "cc"])
def test_what_a_tokenizer_leaves_out_after_a_piece(piece):
    """Against all continuations of up to three letters: those that the token across the end of the
    piece would have had.
    """
    wanted = {}
    for size in (1, 2, 3):
        for letters in itertools.product("abc ", repeat=size):
            more = "".join(letters)
            tokens = WORDS.encode(piece + more)
            if WORDS.lengths(tokens)[:-1].sum() < len(
                piece
            ):  # the last token begins inside the piece
                wanted[more] = 0.1 * tokens[-1] + 0.01
    assert Covers(WORDS, 0.1 * np.arange(10) + 0.01).of(piece) == pytest.approx(
        wanted
    )


def test_bias_is_what_one_side_leaves_out_and_the_other_does_not():
    p = unigram(WORDS, ["abc", "abc", "bca", "cc", " ", " "], smoothing=0.0)
    np.testing.assert_allclose(p * 6, [0, 0, 0, 2, 0, 2, 1, 0, 1, 0])
    words = Covers(WORDS, p)
    letters = Covers(LETTERS, unigram(LETTERS, ["abc"]))
    assert letters.of("a") == {}
    # "ab" would have been "abc" before a c
    np.testing.assert_allclose(bias(words, letters, (4, 2)), 2 / 6)
    np.testing.assert_allclose(bias(letters, words, (2, 4)), 2 / 6)
    # nothing begins with "abc"; equal sides
    assert bias(words, letters, (5, 3)) == bias(words, words, (4, 4)) == 0.0
    assert bias(words, letters, (9, 1)) == 0.0  # a special token
    assert bias(words, letters, (3, 4)) == 1.0  # white space alone


def test_tokens_that_begin_with_white_space():
    bits = np.unpackbits(begins_with_space(WORDS))[: WORDS.vocab]
    assert bits.tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0, 1]


def test_a_blank_before_every_text_is_refused():
    class Blank(Longest):
        def lengths(self, tokens):
            return np.int32([2] * len(tokens))

    with pytest.raises(
        Refused, match="puts a blank before a text; expected ends=words"
    ):
        Covers(Blank("a"), np.ones(1))
