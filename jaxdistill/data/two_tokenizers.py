"""Text as two networks read it that have different tokenizers: the teacher's tokens beside the
student's, and which of them stand for the same bytes.

Beside the student's arrays stand the teacher's under teacher_tokens, teacher_mask, ... and on both
sides `span` int32, the number of the piece of text that a token is a part of (data.alignment), -1
on what is no target or has no counterpart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxdistill.core.net import Net, fixed_net
from jaxdistill.core.types import Array, Refused
from jaxdistill.data.alignment import (
    Covers,
    begins_with_space,
    bias,
    covered,
    spans,
    unigram,
    word_ends,
)
from jaxdistill.data.language import Markov
from jaxdistill.data.text import PaddedJson, pad_rows
from jaxdistill.data.tokenizers import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignedJson(PaddedJson):
    """Prompts with responses: the arrays of `data.text:PaddedJson` of both sides. The ends of text
    are a span of their own.
    """

    teacher_tokenizer: str = "byte"  # "byte" or a folder (data.tokenizers)
    teacher_prompt_length: int = 0  # tokens; 0: as many as the student's
    teacher_response_length: int = 0
    # where spans may end: any | unbiased, where the two sides' laws differ little | words, before
    # white space alone
    ends: str = "any"
    # of unbiased: the most that the one side leaves out of its law and the other does not; ALM's
    # 1e-4
    bias: float = 1e-4
    # whether batches say which tokens begin with white space: space uint8 [ceil(vocab / 8)], of
    # both sides
    space: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.ends not in ("any", "unbiased", "words"):
            raise Refused(f"data.ends={self.ends!r}: expected any, unbiased or words")
        if not 0 <= self.bias <= 1:
            raise Refused(f"data.bias={self.bias}: expected 0 to 1")

    @functools.cached_property
    def teacher_codec(self) -> Tokenizer:
        return load_tokenizer(self.teacher_tokenizer)

    @functools.cached_property
    def covers(self) -> tuple[Covers, Covers]:
        """Of student and teacher, with unigrams of the training responses."""
        answers = [answer for _, answer in self.samples("train")]
        return tuple(
            Covers(codec, unigram(codec, answers)) for codec in (self.codec, self.teacher_codec)
        )

    def stops(self, answer: str, both) -> Sequence[int] | None:
        """Byte positions of a response where spans may end; None: anywhere."""
        if self.ends == "any":
            return None
        size = len(answer.encode())
        if self.ends == "words":
            return [*word_ends(answer), size, size + 1]
        last = [
            dict(zip(np.cumsum(lengths).tolist(), tokens.tolist())) for _, tokens, lengths in both
        ]
        common = sorted(last[0].keys() & last[1].keys())
        return [
            at
            for at in common
            if at > size or bias(*self.covers, (last[0][at], last[1][at])) <= self.bias
        ]

    @property
    def teacher_vocab_size(self):
        return self.teacher_codec.vocab

    @property
    def rooms(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(prompt, response) lengths of the student and of the teacher."""
        own = (self.prompt_length, self.response_length)
        return own, (self.teacher_prompt_length or own[0], self.teacher_response_length or own[1])

    def arrays(self, split):
        samples = self.samples(split)
        sides = list(zip((self.codec, self.teacher_codec), self.rooms))
        documents = ([], [])
        numbers = ([], [])
        for question, answer in samples:
            both = [self.document(codec, rooms, question, answer) for codec, rooms in sides]
            if all(len(prompt) <= rooms[0] for (prompt, _, _), (_, rooms) in zip(both, sides)):
                found = spans(*(lengths for _, _, lengths in both), ends=self.stops(answer, both))
                for side in (0, 1):
                    documents[side].append(both[side][:2])
                    numbers[side].append(found[side])
        if samples and not documents[0]:
            raise Refused(
                f"data.path={self.path}: no prompt fits, of {self.rooms[0][0]} tokens and the teacher's {self.rooms[1][0]}"
            )
        out = {}
        for prefix, (codec, (width, room)), docs, numbered in zip(
            ("", "teacher_"), sides, documents, numbers
        ):
            rows = pad_rows(docs, width, width + room, codec.pad)
            rows["span"] = np.full(rows["tokens"].shape, -1, np.int32)
            for row, number in zip(rows["span"], numbered):
                row[width : width + len(number)] = number
            if self.space:
                rows["space"] = np.tile(begins_with_space(codec), (len(docs), 1))
            out |= {prefix + k: v for k, v in rows.items()}
        return out

    def document(self, codec: Tokenizer, rooms: tuple[int, int], question: str, answer: str):
        """(prompt, response, bytes of each token of the response, 1 of the end), the response cut
        to its room.
        """
        bos = np.int32([] if codec.bos is None else [codec.bos])
        tokens, lengths = covered(codec, answer)
        response = np.append(tokens, np.int32(codec.eos))
        lengths = np.append(lengths, np.int32(1))
        return (
            np.concatenate([bos, codec.encode(question + self.between)]),
            response[: rooms[1]],
            lengths[: rooms[1]],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(Markov):
    """A second-order chain (data.language) that the student reads symbol by symbol and the teacher
    in blocks of two, block (a, b) being its token vocab a + b. The first block is context; each
    later one is a span. `net` is the exact teacher.
    """

    size: int = 0  # rows that training draws from, again and again; 0: new ones all the time

    def __post_init__(self):
        super().__post_init__()
        if self.size < 0:
            raise Refused(f"data.size={self.size}: expected 0 or more rows")
        if self.length % 2 or self.length < 4:
            raise Refused(
                f"data.length={self.length}: expected an even number of at least 4 tokens"
            )

    @property
    def teacher_vocab_size(self):
        return self.vocab**2

    @functools.cached_property
    def kept(self) -> dict[str, np.ndarray]:
        """The rows of a set of `size`."""
        return self.walk(np.random.default_rng([self.seed, 5]).random((self.size, self.length)))

    def batch(self, index, rows):
        if not self.size:
            return super().batch(index, rows)
        pick = np.random.default_rng([self.seed, 6, index]).integers(
            self.size, size=self.batch_size
        )[rows]
        return {k: v[pick] for k, v in self.kept.items()}

    def walk(self, u):
        tokens = super().walk(u)["tokens"]
        rows = len(tokens)
        blocks = tokens[:, ::2] * self.vocab + tokens[:, 1::2]
        out = {}
        for prefix, side, number in zip(
            ("", "teacher_"),
            (tokens, blocks),
            spans(np.ones(self.length), np.full(self.length // 2, 2)),
        ):
            target = number > 0
            out |= {
                f"{prefix}tokens": side,
                f"{prefix}mask": np.tile(np.float32(target), (rows, 1)),
                f"{prefix}span": np.tile(np.where(target, number, -1), (rows, 1)),
            }
        return out

    def net(self) -> Net:
        """Blocks [B T / 2] -> logits float32 [B T / 2, V^2] of the next block."""
        return fixed_net(self.logits)

    def logits(self, tokens: Array, **_) -> Array:
        table = jnp.asarray(np.log(self.transitions[1]), jnp.float32)
        a, b = jnp.divmod(tokens, self.vocab)
        return (table[a, b][..., None] + table[b]).reshape(
            *tokens.shape, -1
        )  # log p(c | a b) + log p(d | b c)
