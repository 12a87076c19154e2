"""Spans of two tokenisations against a search by brute force, on random splits and on real tokenizers."""

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.alignment import covered, spans, word_ends
from jaxdistill.data.tokenizers import ByteTokenizer, load_tokenizer


class Merged:
    """Greedy longest match over a few byte strings and every single byte."""

    pieces = [b"the ", b"th", b"he", b"e c", b" and", *(bytes([i]) for i in range(256))]

    def encode(self, text):
        text, out = text.encode(), []
        while text:
            out.append(next(i for i, piece in enumerate(self.pieces) if text.startswith(piece)))
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
    a, b = split(rng, total), split(rng, total)
    first, second = spans(a, b)
    assert first.dtype == second.dtype == np.int32
    assert pieces(a, first) == pieces(b, second)  # the same bytes on both sides
    assert (np.diff(first) >= 0).all() and set(first) == set(second) == set(range(first.max() + 1))
    assert set().union(*pieces(a, first).values()) == set(range(total))  # nothing is left out
    ends = lambda lengths: set(np.cumsum(lengths).tolist())
    assert first.max() + 1 == len(ends(a) & ends(b))  # none could be finer
    assert all((x == y).all() for x, y in zip(spans(b, a), (second, first)))


@pytest.mark.parametrize("seed", range(20))
def test_special_tokens_and_cut_ends(seed):
    rng = np.random.default_rng(seed)
    total = int(rng.integers(4, 60))
    a, b = split(rng, total), split(rng, total)
    first, second = spans(a, b)
    places = rng.integers(0, len(a) + 1, 3)
    again, other = spans(np.insert(a, places, 0), b)
    zeros = np.insert(a, places, 0) == 0
    assert (again[zeros] == -1).all() and (again[~zeros] == first).all() and (other == second).all()
    kept = int(rng.integers(0, len(a) + 1))
    cut, short = spans(a[:kept], b)
    whole = np.cumsum(a)[first <= (cut.max() if len(cut) else -1)]
    assert pieces(a[:kept], cut) == pieces(b, short) and (len(whole) == 0 or whole.max() <= a[:kept].sum())
    assert all((pieces(b, short)[number] == pieces(b, second)[number]) for number in pieces(b, short))


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
    assert second.tolist() == list(range(len(tokens)))  # every merged token is a span of bytes
    assert np.bincount(first).tolist() == b.tolist()


def test_only_at_words(folder):
    text = "the cat and the dögs end"
    codec = load_tokenizer(str(folder(bos=False, eos_token="</s>")))
    (_, a), (_, b) = covered(ByteTokenizer(), text), covered(codec, text)
    coarse, _ = spans(a, b, ends=[*word_ends(text), len(text.encode())])
    said = [bytes(text.encode()[min(p) : max(p) + 1]).decode() for p in pieces(a, coarse).values()]
    assert said == ["the", " cat", " and", " the", " dögs", " end"]
    fine, _ = spans(a, b)
    assert fine.max() > coarse.max()


@pytest.mark.parametrize("text", ["", "the dog", "Zürich, 東京 🙂 the end"])
def test_covered_adds_up(folder, text):
    for codec in (ByteTokenizer(), Merged(), load_tokenizer(str(folder(bos=True, eos_token="</s>")))):
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
