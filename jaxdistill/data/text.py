"""Text for language models: running text in windows, and prompts with responses, packed or padded.

Everywhere `mask[t]` is 1 where token t is a target, to be predicted from the tokens before it, so a
window's or document's first token never is one. `segments` numbers the documents of a row from 1,
and is 0 on padding: attention stays inside a segment; `positions` counts from 0 in each document.
"""

from __future__ import annotations

import bisect
import codecs
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jaxdistill.core.types import Refused, nearest, one_line
from jaxdistill.data.base import InMemory, check_share, contents, held_out
from jaxdistill.data.tokenizers import Tokenizer, load_tokenizer, stored_as


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(InMemory):
    """tokens int32 [length], mask float32 [length]: windows of one plain-text file, UTF-8,
    whose lines end in "\\n" (as "\\r\\n" and "\\r" are read too).

    Neighbouring windows share one token, so that in an epoch every token but the first is a target
    exactly once (up to the rest at the end that fills no window). The end of the file is held out.
    """

    tokenizer: str = "byte"  # "byte" or a folder (data.tokenizers)
    length: int = 128  # tokens
    heldout: float = 0.1  # share of the tokens

    @functools.cached_property
    def codec(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    @property
    def vocab_size(self):
        return self.codec.vocab

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """int32 [n]: the whole file."""
        return self.codec.encode(_read_text(self.existing()))

    def tokenizer_files(self):
        return stored_as(self.tokenizer, begins=False)

    def arrays(self, split):
        cut = len(self.tokens) - round(len(self.tokens) * check_share(self.heldout))
        tokens = self.tokens[:cut] if split == "train" else self.tokens[cut:]
        if len(tokens) < self.length or self.length < 2:
            raise Refused(
                f"data.length={self.length}: expected 2 to {len(tokens)}, the tokens of {self.path} kept for {split}"
            )
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self.length)[:: self.length - 1]
        mask = np.float32(np.arange(self.length) > 0)
        return {"tokens": windows, "mask": np.broadcast_to(mask, windows.shape)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(InMemory):
    """Prompts with responses: a JSON object per line, or a JSON list of objects.

    `path` is a file, of which a fixed random share is held out, or a folder with train.jsonl and
    test.jsonl (or .json).
    A document is bos (where the tokenizer has one), prompt, `between`, response, eos; the response
    and eos are targets.
    Prompts are never cut: those that leave no room for a target are left out, and responses that
    are too long lose their end; both are counted in the log.
    """

    tokenizer: str = "byte"  # "byte" or a folder (data.tokenizers)
    prompt_key: str = "prompt"
    response_key: str = "response"
    between: str = "\n"  # parts prompt and response; counts as prompt
    heldout: float = 0.05  # share of the samples, where there is no test file

    @functools.cached_property
    def codec(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    @property
    def vocab_size(self):
        return self.codec.vocab

    @property
    def eos(self) -> tuple[int, ...]:
        """The token that ends a response."""
        return (self.codec.eos,)

    @property
    def pad(self) -> int:
        return self.codec.pad

    def samples(self, split: str) -> list[tuple[str, str]]:
        """(prompt, response) of every sample. Raises Refused, naming file and line, on a bad one."""
        path = self.existing()
        train, test = (
            (path, None) if path.is_file() else (_file(path, "train"), _file(path, "test"))
        )
        if train is None:
            raise Refused(f"data.path={self.path}: no train.jsonl or train.json")
        pair = lambda where, item: tuple(
            _field(item, key, where) for key in (self.prompt_key, self.response_key)
        )
        samples = [pair(*found) for found in _objects(test if test and split == "test" else train)]
        return (
            samples if test else [samples[i] for i in held_out(len(samples), self.heldout, split)]
        )

    def tokenizer_files(self):
        return stored_as(self.tokenizer, begins=True)

    def prompt_text(self, question):
        return question + self.between

    def asked(self, question: str) -> np.ndarray:
        """Token ids int32 [n] of all that comes before the response."""
        bos = np.int32([] if self.codec.bos is None else [self.codec.bos])
        return np.concatenate([bos, self.codec.encode(question + self.between)])

    def documents(
        self, split: str, prompt_room: int, response_room: int, room: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(prompt, response) as token ids, each and both together no longer than their rooms."""
        codec = self.codec
        kept = []
        cut = 0
        samples = self.samples(split)
        for question, answer in samples:
            prompt = self.asked(question)
            response = np.append(codec.encode(answer), np.int32(codec.eos))
            if len(prompt) <= prompt_room:
                most = min(response_room, room - len(prompt))
                cut += len(response) > most
                kept.append((prompt, response[:most]))
        gone = len(samples) - len(kept)
        if samples and not kept:
            raise Refused(
                f"data.path={self.path}: all {gone} prompts are longer than {prompt_room} tokens"
            )
        logging.info(
            "%s, %s: %d samples, %d prompts too long, %d responses cut",
            self.path,
            split,
            len(samples),
            gone,
            cut,
        )
        return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedJson(JsonLines):
    """tokens, segments, positions int32 [length], mask float32 [length]: several documents to a
    row, none split.

    Packed once, longest first, each into the fullest row that still has room (best-fit decreasing);
    what is shuffled anew in each epoch is the rows.
    """

    length: int = 512  # tokens

    def __post_init__(self):
        super().__post_init__()
        self.at_least(2, "length")

    def arrays(self, split):
        documents = self.documents(split, self.length - 1, self.length, self.length)
        rows = pack([len(prompt) + len(response) for prompt, response in documents], self.length)
        shape = (len(rows), self.length)
        out = {"tokens": np.full(shape, self.codec.pad, np.int32)}
        out |= {
            "segments": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "mask": np.zeros(shape, np.float32),
        }
        for r, row in enumerate(rows):
            start = 0
            for number, document in enumerate(row, 1):
                prompt, response = documents[document]
                at = (r, slice(start, start + len(prompt) + len(response)))
                size = len(prompt) + len(response)
                out["tokens"][at] = np.concatenate([prompt, response])
                out["segments"][at] = number
                out["positions"][at] = np.arange(size)
                out["mask"][at] = np.arange(size) >= max(len(prompt), 1)
                start += size
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedJson(JsonLines):
    """One document a row, its response starting at a fixed column, for students that write their
    own.

    prompt int32 [prompt_length], padded on the left, and prompt_mask bool, False on padding;
    tokens, segments, positions int32 and mask float32 [prompt_length + response_length]: the same
    prompt and the response, padded on the right.
    """

    prompt_length: int = 256  # tokens
    response_length: int = 256

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "prompt_length", "response_length")

    def arrays(self, split):
        length = self.prompt_length + self.response_length
        return pad_rows(
            self.documents(split, self.prompt_length, self.response_length, length),
            self.prompt_length,
            length,
            self.codec.pad,
        )


def pad_rows(
    documents: Sequence[tuple[np.ndarray, np.ndarray]], width: int, length: int, pad: int
) -> dict[str, np.ndarray]:
    """The arrays of `PaddedJson`, [n, length], from token ids of (prompt, response): responses
    start at column `width`.
    """
    shape = (len(documents), length)
    out = {"tokens": np.full(shape, pad, np.int32)}
    out |= {
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, np.float32),
    }
    for r, (prompt, response) in enumerate(documents):
        at = (r, slice(width - len(prompt), width + len(response)))
        size = len(prompt) + len(response)
        out["tokens"][at] = np.concatenate([prompt, response])
        out["segments"][at] = 1
        out["positions"][at] = np.arange(size)
        out["mask"][at] = np.arange(size) >= max(len(prompt), 1)
    return {
        **out,
        "prompt": out["tokens"][:, :width],
        "prompt_mask": out["segments"][:, :width] > 0,
    }


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Groups the indices of `sizes`, each at most `length`, so that a group's sum is too: best-fit
    decreasing.
    """
    # rooms: (room left, row), ascending
    rows = []
    rooms = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, (sizes[i], -1))
        room, row = rooms.pop(at) if at < len(rooms) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(rooms, (room - sizes[i], row))
    return rows


def _file(folder: Path, split: str) -> Path | None:
    return next(
        (file for file in (folder / f"{split}.jsonl", folder / f"{split}.json") if file.is_file()),
        None,
    )


def _read_text(file: Path) -> str:
    """A file's text, without a byte order mark, its lines ended by "\\n" however the file ends
    them. Raises Refused on what is not UTF-8.
    """
    if file.is_dir():
        raise Refused(f"data.path={file}: a folder, expected a text file")
    if not file.exists():
        raise Refused(f"data.path={file.parent}: no {file.name}")
    data = contents(file)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Refused(f"{file}: begins with the mark of UTF-16, expected UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    if (at := data.find(b"\0")) >= 0:
        raise Refused(f"{file}: byte {at} is 0, expected text in UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: byte {error.start} is not UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _objects(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, parsed value) of each line, or of each item where the file is one JSON list."""
    text = _read_text(file)
    if text.lstrip().startswith("["):
        lines = [(0, text)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines:
        where = f"{file}:{number}" if number else str(file)
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise Refused(
                f"{file}:{number or error.lineno}: expected JSON ({error.msg} at column {error.colno})"
            ) from error
        except (
            ValueError,
            RecursionError,
        ) as error:  # a number of thousands of digits, thousands of brackets
            raise Refused(f"{where}: JSON that cannot be read ({one_line(error)})") from error
        items = (
            [(where, value)]
            if number
            else [(f"{file} item {i}", item) for i, item in enumerate(value)]
        )
        escaped = "\\ud" in line.lower()
        yield from ((place, _whole(item, place) if escaped else item) for place, item in items)


def _whole(item: Any, where: str) -> Any:
    """The item itself. Raises Refused where a character is half of a surrogate pair, which no
    encoding can write.
    """
    try:
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"{where}: \\u{ord(error.object[error.start]):x} is half of a surrogate pair, expected both or none"
        ) from error
    return item


def _field(item: Any, key: str, where: str) -> str:
    if not isinstance(item, dict):
        raise Refused(f"{where}: expected a JSON object with {key!r}, found {str(item)[:40]!r}")
    if key not in item:
        raise Refused(
            f"{where}: key={key!r}: {one_line(nearest(key, filter(str.isprintable, item))[2:])}"
        )
    return _text(item[key], where, f" under {key!r}")


def _text(value: Any, where: str, place: str = "") -> str:
    """The value itself. Raises Refused where it is no text."""
    if not isinstance(value, str):
        raise Refused(f"{where}: expected text{place}, found {str(value)[:40]!r}")
    return value
