"""Text for language models: windows of running text, and prompts with responses, packed or padded.

Arrays of the data sets, int32 [B T] except the mask (`Text` has the first two):
  tokens     token ids; padding is the tokenizer's `pad`.
  mask       float32, 1 where the token is a target, to be predicted from the tokens before it. The
             first token of a window or document is never a target.
  segments   numbers the documents of a sample from 1; 0 on padding. Attention stays inside a
             segment.
  positions  counts the tokens of each document from 0; 0 on padding.
"""

from __future__ import annotations

import bisect
import codecs
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from absl import logging

from jaxdistill.core.fields import LARGEST, Count, Range
from jaxdistill.core.types import Refused, nearest, one_line
from jaxdistill.data.base import InMemory, check_share, contents, held_out
from jaxdistill.data.tokenizers import Tokenizer, load_tokenizer, stored_as

# token ids int32 of a prompt and of its response
Document = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(InMemory):
    """Windows of one plain-text file: tokens and mask [B length].

    The file is UTF-8. Lines that end in "\\r\\n" or "\\r" are read as if they ended in "\\n". The
    last part of the file is held out.

    Neighbouring windows share one token. In an epoch every token but the first is a target exactly
    once; the tokens at the end that do not fill a window are left out.
    """

    tokenizer: str = "byte"  # "byte" or a folder (data.tokenizers)
    length: int = 128  # tokens of a window
    heldout: float = 0.1  # share of the tokens

    @functools.cached_property
    def codec(self) -> Tokenizer:
        """The tokenizer, which encodes and decodes text."""
        return load_tokenizer(self.tokenizer)

    @property
    def vocab_size(self):
        return self.codec.vocab

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """The tokens of the full file, int32 [n]."""
        file = self.existing()  # `path` as a Path, checked
        return self.codec.encode(_read_text(file))

    def tokenizer_files(self):
        return stored_as(self.tokenizer, begins=False)  # windows have no bos token

    def arrays(self, split):
        heldout = round(len(self.tokens) * check_share(self.heldout))
        cut = len(self.tokens) - heldout
        tokens = self.tokens[:cut] if split == "train" else self.tokens[cut:]
        if len(tokens) < self.length or self.length < 2:
            raise Refused(
                f"data.length={self.length}: expected 2 to {len(tokens)}, "
                f"the tokens of {self.path} kept for {split}"
            )
        every = np.lib.stride_tricks.sliding_window_view(tokens, self.length)
        windows = every[:: self.length - 1]
        mask = np.float32(np.arange(self.length) > 0)
        return {"tokens": windows, "mask": np.broadcast_to(mask, windows.shape)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(InMemory):
    """Base of data sets of prompts with responses: a JSON object per line, or one JSON list.

    `path` is a file, of which a fixed random share is held out, or a folder with train.jsonl and
    test.jsonl (or .json).

    A document is: bos (if the tokenizer has one), prompt, `between`, response, eos. The response
    and eos are targets. Prompts are never cut: a sample whose prompt is too long is left out. A
    response that is too long loses its end, eos included. The log reports the numbers of samples
    left out and of responses cut.
    """

    tokenizer: str = "byte"  # "byte" or a folder (data.tokenizers)
    prompt_key: str = "prompt"
    response_key: str = "response"
    # text between prompt and response; it belongs to the prompt
    between: str = "\n"
    heldout: float = 0.05  # share of the samples, if there is no test file

    @functools.cached_property
    def codec(self) -> Tokenizer:
        """The tokenizer, which encodes and decodes text."""
        return load_tokenizer(self.tokenizer)

    @property
    def vocab_size(self):
        return self.codec.vocab

    @property
    def eos(self) -> tuple[int, ...]:
        """The token that ends a response, as a tuple: roll-outs may stop at several tokens."""
        return (self.codec.eos,)

    @property
    def pad(self) -> int:
        """The padding token."""
        return self.codec.pad

    def samples(self, split: str) -> list[tuple[str, str]]:
        """(prompt, response) of every sample.

        Raises:
            Refused: on a sample that cannot be read; the message names file and line.
        """
        path = self.existing()  # `path` as a Path, checked
        if path.is_file():
            every = self._pairs(path)
            return [every[i] for i in held_out(len(every), self.heldout, split)]
        train = _file(path, "train")
        test = _file(path, "test")
        if train is None:
            raise Refused(f"data.path={self.path}: no train.jsonl or train.json")
        if test is not None:
            return self._pairs(train if split == "train" else test)
        every = self._pairs(train)
        return [every[i] for i in held_out(len(every), self.heldout, split)]

    def _pairs(self, file: Path) -> list[tuple[str, str]]:
        """(prompt, response) of every sample in a file."""
        pairs = []
        for where, item in _objects(file):
            prompt = _field(item, self.prompt_key, where)
            response = _field(item, self.response_key, where)
            pairs.append((prompt, response))
        return pairs

    def tokenizer_files(self):
        return stored_as(self.tokenizer, begins=True)

    def prompt_text(self, question):
        """The text before the response: prompt and `between`."""
        return question + self.between

    def prompt_tokens(self, question: str) -> np.ndarray:
        """The tokens before the response, int32 [n]: bos, prompt and `between`."""
        bos = np.int32([] if self.codec.bos is None else [self.codec.bos])
        return np.concatenate([bos, self.codec.encode(question + self.between)])

    def documents(
        self, split: str, prompt_room: int, response_room: int, room: int
    ) -> list[Document]:
        """The documents of a split as token ids; their responses may be cut.

        Args:
            split: "train" or "test".
            prompt_room: the most tokens of a prompt.
            response_room: the most tokens of a response.
            room: the most tokens of both together.
        """
        kept = []
        cut = 0
        samples = self.samples(split)
        for question, answer in samples:
            prompt = self.prompt_tokens(question)
            if len(prompt) > prompt_room:
                continue
            response = np.append(
                self.codec.encode(answer), np.int32(self.codec.eos)
            )
            most = min(response_room, room - len(prompt))
            cut += len(response) > most
            kept.append((prompt, response[:most]))
        left_out = len(samples) - len(kept)
        if samples and not kept:
            raise Refused(
                f"data.path={self.path}: all {left_out} prompts are longer than {prompt_room} "
                "tokens"
            )
        logging.info(
            "%s, %s: %d samples, %d prompts too long, %d responses cut",
            self.path,
            split,
            len(samples),
            left_out,
            cut,
        )
        return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedJson(JsonLines):
    """Several complete documents in each sample: tokens, segments, positions and mask [B length].

    The documents are packed once, by best-fit decreasing (see `pack`). An epoch shuffles the packed
    samples.
    """

    length: Annotated[int, Range(2, LARGEST)] = 512  # tokens of a sample

    def arrays(self, split):
        documents = self.documents(split, self.length - 1, self.length, self.length)
        sizes = [len(prompt) + len(response) for prompt, response in documents]
        groups = pack(sizes, self.length)
        out = _padding(len(groups), self.length, self.codec.pad)
        for sample, group in enumerate(groups):
            start = 0
            for number, document in enumerate(group, 1):
                _place(out, sample, start, number, documents[document])
                start += sizes[document]
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedJson(JsonLines):
    """One document in each sample, with all responses starting at the same column.

    For students that write their own responses. The arrays are those of `pad_documents`, where
    T = prompt_length + response_length.
    """

    prompt_length: Count = 256  # tokens
    response_length: Count = 256

    def arrays(self, split):
        length = self.prompt_length + self.response_length
        documents = self.documents(
            split, self.prompt_length, self.response_length, length
        )
        return pad_documents(documents, self.prompt_length, length, self.codec.pad)


def pad_documents(
    documents: Sequence[Document], width: int, length: int, pad: int
) -> dict[str, np.ndarray]:
    """One document per sample, with all responses starting at column `width`.

    Prompts are padded on the left and responses on the right.

    Args:
        documents: prompts of at most `width` tokens, with their responses.
        width: columns of the prompt, P.
        length: columns of prompt and response together, T.
        pad: the padding token.

    Returns:
        tokens, segments, positions int32 and mask float32 [B T]; prompt int32 [B P], the first
        columns of `tokens`; prompt_mask bool [B P], False on padding.
    """
    out = _padding(len(documents), length, pad)
    for sample, (prompt, response) in enumerate(documents):
        _place(out, sample, width - len(prompt), 1, (prompt, response))
    out["prompt"] = out["tokens"][:, :width]
    out["prompt_mask"] = out["segments"][:, :width] > 0
    return out


def _padding(samples: int, length: int, pad: int) -> dict[str, np.ndarray]:
    """Arrays [samples length] that hold nothing but padding."""
    shape = (samples, length)
    return {
        "tokens": np.full(shape, pad, np.int32),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, np.float32),
    }


def _place(
    arrays: dict[str, np.ndarray],
    sample: int,
    start: int,
    number: int,
    document: Document,
) -> None:
    """Writes a document into a sample from column `start` on, as its segment `number`."""
    prompt, response = document
    size = len(prompt) + len(response)
    at = (sample, slice(start, start + size))
    arrays["tokens"][at] = np.concatenate([prompt, response])
    arrays["segments"][at] = number
    arrays["positions"][at] = np.arange(size)
    # Without a prompt the first token of the response is not a target.
    arrays["mask"][at] = np.arange(size) >= max(len(prompt), 1)


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Groups documents so that the tokens of a group fit into `length`: best-fit decreasing.

    The documents are taken from the longest to the shortest. Each joins the fullest group that
    still has room for it, or begins a new one.

    Args:
        sizes: tokens of each document, at most `length`.
        length: the most tokens of a group.

    Returns:
        The documents' indices in `sizes`, group by group.
    """
    groups = []
    rooms = []  # (tokens left, group) of every group, ascending
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, (sizes[i], -1))
        if at < len(rooms):
            room, group = rooms.pop(at)
        else:
            room = length
            group = len(groups)
            groups.append([])
        groups[group].append(i)
        bisect.insort(rooms, (room - sizes[i], group))
    return groups


def _file(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder; None if it does not exist."""
    for file in (folder / f"{split}.jsonl", folder / f"{split}.json"):
        if file.is_file():
            return file
    return None


def _read_text(file: Path) -> str:
    """The text of a file, without a byte order mark and with "\\n" at the end of every line.

    Raises:
        Refused: the file is missing or is not UTF-8.
    """
    if file.is_dir():
        raise Refused(f"data.path={file}: a folder, expected a text file")
    if not file.exists():
        raise Refused(f"data.path={file.parent}: no {file.name}")
    data = contents(file)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Refused(f"{file}: begins with the mark of UTF-16, expected UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    zero = data.find(b"\0")
    if zero >= 0:
        raise Refused(f"{file}: byte {zero} is 0, expected text in UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: byte {error.start} is not UTF-8") from error
    if "\r" not in text:
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _objects(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line of JSON, or of each item if the file is one JSON list.

    `where` is the place in messages: the file with the number of the line or item.
    """
    text = _read_text(file)
    if text.lstrip().startswith("["):
        items = _loaded(text, str(file), file, None)
        for i, item in enumerate(items):
            where = f"{file} item {i}"
            yield where, _encodable(item, where, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            yield where, _encodable(_loaded(line, where, file, number), where, line)


def _loaded(text: str, where: str, file: Path, line: int | None) -> Any:
    """The value of a JSON text.

    Args:
        text: a line of the file, or the complete file.
        where: the place in messages.
        file: the file that `text` is from.
        line: the line's number; None if `text` is the complete file.

    Raises:
        Refused: `text` is not JSON, or cannot be read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = error.lineno if line is None else line
        raise Refused(
            f"{file}:{at}: expected JSON ({error.msg} at column {error.colno})"
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number too long, or nesting too deep
        raise Refused(
            f"{where}: JSON that cannot be read ({one_line(error)})"
        ) from error


def _encodable(item: Any, where: str, source: str) -> Any:
    """Returns `item` unchanged; it was read from the JSON text `source`.

    Raises:
        Refused: a character is half of a surrogate pair, which no encoding can write.
    """
    if (
        "\\ud" not in source.lower()
    ):  # JSON writes such a character by an escape sequence
        return item
    try:
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        character = f"\\u{ord(error.object[error.start]):x}"
        raise Refused(
            f"{where}: {character} is half of a surrogate pair, expected both or none"
        ) from error
    return item


def _field(item: Any, key: str, where: str) -> str:
    """The text under a key of a JSON object. Raises Refused if there is none."""
    if not isinstance(item, dict):
        raise Refused(
            f"{where}: expected a JSON object with {key!r}, found {str(item)[:40]!r}"
        )
    if key not in item:
        near = nearest(key, filter(str.isprintable, item)).removeprefix("; ")
        raise Refused(f"{where}: key={key!r}: {one_line(near)}")
    return _text(item[key], where, f" under {key!r}")


def _text(value: Any, where: str, place: str = "") -> str:
    """Returns `value` unchanged. Raises Refused if it is not text."""
    if not isinstance(value, str):
        raise Refused(f"{where}: expected text{place}, found {str(value)[:40]!r}")
    return value
