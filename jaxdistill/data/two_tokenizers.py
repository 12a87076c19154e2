"""Text for a student and a teacher that have different tokenizers.

A batch has the student's arrays, and the teacher's under teacher_tokens, teacher_mask, ... Both
sides have `span` int32: the number of the span of text that a token belongs to (data.alignment). It
is -1 on tokens that are no targets or have no counterpart on the other side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxdistill.core.fields import Share
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
from jaxdistill.data.text import Document, PaddedJson, pad_documents
from jaxdistill.data.tokenizers import Tokenizer, load_tokenizer

# Token ids of a prompt and of its response, and the bytes of each token of the response.
Sized = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignedJson(PaddedJson):
    """Prompts with responses: the arrays of `data.text:PaddedJson`, of both sides.

    The end-of-text tokens of both sides are a span of their own.
    """

    teacher_tokenizer: str = "byte"  # "byte" or a folder (data.tokenizers)
    teacher_prompt_length: int = 0  # tokens; 0: as many as the student's
    teacher_response_length: int = 0
    # Where spans may end. any: wherever tokens of both sides end; unbiased: where moreover the
    # tokenization bias of the two sides differs little; words: before white space alone.
    ends: Literal["any", "unbiased", "words"] = "any"
    # For "unbiased": the most probability that the one side excludes and the other does not; ALM's
    # value.
    bias: Share = 1e-4
    # Whether batches say which tokens begin with white space: space uint8 [ceil(vocab / 8)], of
    # both sides.
    space: bool = False

    @functools.cached_property
    def teacher_codec(self) -> Tokenizer:
        """The teacher's tokenizer."""
        return load_tokenizer(self.teacher_tokenizer)

    @functools.cached_property
    def covers(self) -> tuple[Covers, Covers]:
        """`Covers` of student and teacher, with unigrams of the training responses."""
        answers = [answer for _, answer in self.samples("train")]
        student = Covers(self.codec, unigram(self.codec, answers))
        teacher = Covers(self.teacher_codec, unigram(self.teacher_codec, answers))
        return student, teacher

    def stops(self, answer: str, both: Sequence[Sized]) -> Sequence[int] | None:
        """Byte positions of a response where spans may end; None: anywhere.

        Args:
            both: the response as `document` returns it, of student and teacher.
        """
        if self.ends == "any":
            return None
        size = len(answer.encode())
        if self.ends == "words":
            return [*word_ends(answer), size, size + 1]
        last = []  # of both sides: byte position -> the token that ends there
        for _, tokens, lengths in both:
            last.append(dict(zip(np.cumsum(lengths).tolist(), tokens.tolist())))
        found = []
        for at in sorted(last[0].keys() & last[1].keys()):
            tokens = (last[0][at], last[1][at])
            if at > size or bias(*self.covers, tokens) <= self.bias:
                found.append(at)
        return found

    @property
    def teacher_vocab_size(self):
        return self.teacher_codec.vocab

    @property
    def rooms(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The most tokens of (prompt, response), of the student and of the teacher."""
        prompt = self.teacher_prompt_length or self.prompt_length
        response = self.teacher_response_length or self.response_length
        return (self.prompt_length, self.response_length), (prompt, response)

    def arrays(self, split):
        samples = self.samples(split)
        sides = list(zip((self.codec, self.teacher_codec), self.rooms))
        documents = ([], [])
        numbers = ([], [])
        for question, answer in samples:
            both = [
                self.document(codec, rooms, question, answer)
                for codec, rooms in sides
            ]
            fits = [len(both[side][0]) <= self.rooms[side][0] for side in (0, 1)]
            if not all(fits):
                continue
            lengths = [found[2] for found in both]
            numbered = spans(*lengths, ends=self.stops(answer, both))
            for side in (0, 1):
                documents[side].append(both[side][:2])
                numbers[side].append(numbered[side])
        if samples and not documents[0]:
            raise Refused(
                f"data.path={self.path}: no prompt fits, of {self.rooms[0][0]} tokens and the "
                f"teacher's {self.rooms[1][0]}"
            )
        student, teacher = (
            self._side(*sides[side], documents[side], numbers[side])
            for side in (0, 1)
        )
        return {**student, **{f"teacher_{k}": v for k, v in teacher.items()}}

    def _side(
        self,
        codec: Tokenizer,
        rooms: tuple[int, int],
        documents: Sequence[Document],
        numbers: Sequence[np.ndarray],
    ) -> dict[str, np.ndarray]:
        """The arrays of one side, from the spans' `numbers` of the tokens of each response."""
        width, room = rooms
        out = pad_documents(documents, width, width + room, codec.pad)
        span = np.full(out["tokens"].shape, -1, np.int32)
        for sample, number in enumerate(numbers):
            span[sample, width : width + len(number)] = number
        out["span"] = span
        if self.space:
            out["space"] = np.tile(begins_with_space(codec), (len(documents), 1))
        return out

    def document(
        self, codec: Tokenizer, rooms: tuple[int, int], question: str, answer: str
    ) -> Sized:
        """A sample as one side reads it, its response cut to its room.

        Returns:
            Prompt int32 [n], response int32 [m], and the bytes that each token of the response
            stands for [m]; 1 for the end of the text.
        """
        bos = np.int32([] if codec.bos is None else [codec.bos])
        tokens, lengths = covered(codec, answer)
        response = np.append(tokens, np.int32(codec.eos))
        lengths = np.append(lengths, np.int32(1))
        prompt = np.concatenate([bos, codec.encode(question + self.between)])
        return prompt, response[: rooms[1]], lengths[: rooms[1]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(Markov):
    """A second-order chain (data.language) whose teacher reads two symbols at a time.

    The student reads symbol by symbol. The teacher reads blocks: block (a, b) is its token
    vocab a + b. The first block is context; each later one is a span. `net` is the exact teacher.
    """

    # samples that training draws from, again and again; 0: always new ones
    size: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.length % 2 or self.length < 4:
            raise Refused(
                f"data.length={self.length}: expected an even number of at least 4 tokens"
            )

    @property
    def teacher_vocab_size(self):
        return self.vocab**2

    @functools.cached_property
    def kept(self) -> dict[str, np.ndarray]:
        """The `size` samples that training draws from."""
        u = np.random.default_rng([self.seed, 5]).random((self.size, self.length))
        return self.sequences(u)

    def batch(self, index, samples):
        if not self.size:
            return super().batch(index, samples)
        rng = np.random.default_rng([self.seed, 6, index])
        picked = rng.integers(self.size, size=self.batch_size)[samples]
        return {k: v[picked] for k, v in self.kept.items()}

    def sequences(self, u):
        tokens = super().sequences(u)["tokens"]
        blocks = tokens[:, ::2] * self.vocab + tokens[:, 1::2]
        by_symbol, by_block = spans(
            np.ones(self.length), np.full(self.length // 2, 2)
        )
        out = {}
        for prefix, side, number in (
            ("", tokens, by_symbol),
            ("teacher_", blocks, by_block),
        ):
            target = number > 0
            repeat = (len(tokens), 1)
            out[f"{prefix}tokens"] = side
            out[f"{prefix}mask"] = np.tile(np.float32(target), repeat)
            out[f"{prefix}span"] = np.tile(np.where(target, number, -1), repeat)
        return out

    def net(self) -> Net:
        """The exact teacher: blocks [B T/2] -> logits float32 [B T/2 V^2] of the next block."""
        return fixed_net(self.logits)

    def logits(self, tokens: Array, **_) -> Array:
        """log p(c d | a b) = log p(c | a b) + log p(d | b c), for every block (c, d)."""
        table = jnp.asarray(np.log(self.transitions[1]), jnp.float32)
        a, b = jnp.divmod(tokens, self.vocab)
        both = table[a, b][..., None] + table[b]
        return both.reshape(*tokens.shape, -1)
