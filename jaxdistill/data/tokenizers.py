"""Text <-> token ids: bytes as they are, or a tokenizer that `transformers` stored in a folder."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxdistill.core.types import Refused


class Tokenizer(Protocol):
    """What the data sets and evaluations ask of a tokenizer."""

    vocab: int  # ids are below it
    pad: int  # fills rows up; never looked at
    bos: int | None  # what every document begins with, where the tokenizer has it so
    eos: int  # what every document ends with

    def encode(self, text: str) -> np.ndarray:
        """int32 [n], without special tokens."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of any ids; special tokens are left out, and broken characters become U+FFFD."""

    def lengths(self, tokens: np.ndarray) -> np.ndarray:
        """How many bytes of text each token stands for, int32 [n]; 0 of special tokens."""

    def texts(self) -> list[str | None]:
        """What every id stands for; None of special tokens, and of bytes that are no whole characters."""


class ByteTokenizer:
    """Ids 0-255 are the bytes of UTF-8; 256 pads, 257 begins and 258 ends a document."""

    vocab, pad, bos, eos = 259, 256, 257, 258

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, tokens):
        return bytes(t for t in map(int, tokens) if 0 <= t < 256).decode(errors="replace")

    def lengths(self, tokens):
        return (np.asarray(tokens) < 256).astype(np.int32)

    def texts(self):
        return [chr(i) if i < 128 else None for i in range(self.vocab)]


class StoredTokenizer:
    """A tokenizer folder of `transformers`, read without network. Where it has no pad token, eos pads.

    Raises Refused where the folder holds no tokenizer, or one without an end-of-text token.
    """

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer  # takes seconds; most runs do without

        try:
            self.inner = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise Refused(f"tokenizer={folder}: not a tokenizer folder ({str(error).strip().splitlines()[0]})") from error
        if self.inner.eos_token_id is None:
            raise Refused(f"tokenizer={folder}: has no end-of-text token (eos_token)")
        self.vocab, self.eos = len(self.inner), self.inner.eos_token_id
        self.pad = self.eos if self.inner.pad_token_id is None else self.inner.pad_token_id
        begins = self.inner("a")["input_ids"][0] == self.inner.bos_token_id
        self.bos = self.inner.bos_token_id if begins else None

    def encode(self, text):
        return np.asarray(self.inner(text, add_special_tokens=False)["input_ids"], np.int32)

    def decode(self, tokens):
        known = [t for t in map(int, tokens) if 0 <= t < self.vocab]
        return self.inner.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        """Of every id: byte-level pieces have a letter for each byte; SentencePiece's have "\u2581" for a blank and "<0x0A>" for
        single bytes; added tokens are the text itself."""
        pieces = self.inner.convert_ids_to_tokens(list(range(self.vocab)))
        added, special = self.inner.added_tokens_decoder, set(self.inner.all_special_ids)
        by_letter = "ByteLevel" in self.inner.backend_tokenizer.to_str()
        size = lambda piece: len(piece) if by_letter else len(piece.replace("\u2581", " ").encode())
        count = lambda i, piece: 0 if i in special or piece is None else len(piece.encode()) if i in added else size(piece)
        single = re.compile("<0x[0-9A-F]{2}>")
        return np.int32([1 if piece and not by_letter and single.fullmatch(piece) else count(i, piece) for i, piece in enumerate(pieces)])

    def lengths(self, tokens):
        return self._bytes[np.asarray(tokens)]

    def texts(self):
        special, by_letter = set(self.inner.all_special_ids), "ByteLevel" in self.inner.backend_tokenizer.to_str()
        if by_letter:
            found = self.inner.batch_decode([[i] for i in range(self.vocab)], clean_up_tokenization_spaces=False)
        else:
            pieces = self.inner.convert_ids_to_tokens(list(range(self.vocab)))
            single = lambda piece: chr(int(piece[3:5], 16)) if int(piece[3:5], 16) < 128 else "\ufffd"
            found = [single(p) if re.fullmatch("<0x[0-9A-F]{2}>", p or "") else (p or "\ufffd").replace("\u2581", " ") for p in pieces]
        return [None if i in special or "\ufffd" in text else text for i, text in enumerate(found)]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "byte", or a folder. Raises Refused on anything else."""
    if name == "byte":
        return ByteTokenizer()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise Refused(f"tokenizer={name!r}: expected 'byte' or a folder with a stored transformers tokenizer")
    return StoredTokenizer(folder)
