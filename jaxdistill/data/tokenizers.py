"""Tokenizers: the bytes of a text, or a tokenizer that `transformers` stored in a folder."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxdistill.core.tokenizer import (
    decoded,
    decoded_bytes,
    stored_tokenizer,
    vocabulary_size,
)
from jaxdistill.core.types import Refused, one_line

SPACE = "\u2581"  # SentencePiece's sign for a space
BROKEN = "\ufffd"  # what decoding puts in the place of bytes that are no characters
BYTE = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's piece for a single byte


class Tokenizer(Protocol):
    """What data sets and evaluations need of a tokenizer."""

    vocab: int  # ids are below it
    pad: int  # fills samples up
    # begins every document; None where the tokenizer has no such token
    bos: int | None
    eos: int  # ends every document

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, without special tokens: int32 [n]."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids.

        Special tokens are left out, and incomplete characters become U+FFFD.
        """

    def lengths(self, tokens: np.ndarray) -> np.ndarray:
        """How many bytes of text each token stands for, int32 [n]; 0 for special tokens."""

    def texts(self) -> list[str | None]:
        """The text of every id; None for special tokens and for parts of characters."""


class ByteTokenizer:
    """Ids 0-255 are the bytes of UTF-8; 256 pads, 257 begins and 258 ends a document."""

    vocab = 259
    pad = 256
    bos = 257
    eos = 258

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, tokens):
        return decoded_bytes(tokens)

    def lengths(self, tokens):
        return (np.asarray(tokens) < 256).astype(np.int32)

    def texts(self):
        return [chr(i) if i < 128 else None for i in range(self.vocab)]


class StoredTokenizer:
    """A tokenizer folder of `transformers`.

    It is read without network, and code in the folder is never run. Where it has no padding token,
    eos pads.

    Raises:
        Refused: where the folder holds no tokenizer, one without an end-of-text token, or one that
            begins every text with several tokens.
    """

    def __init__(self, folder: Path):
        self.inner = stored_tokenizer(folder)
        if self.inner.eos_token_id is None:
            raise Refused(
                f"tokenizer={folder}: has no end-of-text token (eos_token)"
            )
        self.folder = folder
        self.vocab = vocabulary_size(self.inner)
        self.eos = self.inner.eos_token_id
        self.pad = (
            self.eos if self.inner.pad_token_id is None else self.inner.pad_token_id
        )
        begin = self._begin()
        if len(begin) > 1:
            names = " ".join(map(str, self.inner.convert_ids_to_tokens(begin)))
            raise Refused(
                f"tokenizer={folder}: begins every text with {len(begin)} tokens "
                f"({one_line(names)}), expected one or none"
            )
        self.bos = begin[0] if begin else None

    def _begin(self) -> list[int]:
        """The ids that every text begins with.

        They are those before the tokens of a text, which are found where these tokens stand in one
        place only.
        """
        for text in ("a", *itertools.islice(self.inner.get_vocab(), 1000)):
            try:
                plain = self.inner(text, add_special_tokens=False)["input_ids"]
                full = self.inner(text, add_special_tokens=True)["input_ids"]
            except (
                Exception
            ):  # the library raises this of a text without known tokens
                continue
            places = []
            for i in range(len(full)):
                if plain and full[i : i + len(plain)] == plain:
                    places.append(i)
            if len(places) == 1:
                return full[: places[0]]
        return []

    def encode(self, text):
        """The tokens of a text, without special tokens: int32 [n].

        Raises:
            Refused: where the tokenizer has no token for a part of the text, not even an unknown
                one.
        """
        try:
            out = self.inner(
                text, add_special_tokens=False, return_offsets_mapping=self._drops
            )
        except MemoryError:
            raise
        except Exception as error:  # the library has no class of its own
            raise Refused(
                f"tokenizer={self.folder}: cannot encode {text[:40]!r} ({one_line(error)})"
            ) from error
        if self._drops:
            self._check_complete(text, out["offset_mapping"])
        return np.asarray(out["input_ids"], np.int32)

    @functools.cached_property
    def _drops(self) -> bool:
        """Whether characters without a token are dropped.

        This is so for BPE that has no unknown token and does not fall back to bytes.
        """
        backend = self._backend
        if backend is None or type(backend.model).__name__ != "BPE":
            return False
        if backend.model.unk_token or backend.model.byte_fallback:
            return False
        return (
            "ByteLevel" not in f"{backend.normalizer!r} {backend.pre_tokenizer!r}"
        )

    @property
    def _backend(self) -> Any:
        """The tokenizer of the library `tokenizers`; None of one that is written in Python."""
        return getattr(self.inner, "backend_tokenizer", None)

    def _check_complete(self, text: str, places: Sequence[tuple[int, int]]) -> None:
        """Raises Refused where a character, other than white space, is in none of the `places`."""
        seen = np.zeros(len(text), bool)
        for start, stop in places:
            seen[start:stop] = True
        for at in np.flatnonzero(~seen):
            if not text[at].isspace():
                around = text[max(0, at - 20) : at + 20]
                raise Refused(
                    f"tokenizer={self.folder}: no token, not even an unknown one, for a part of "
                    f"{around!r}"
                )

    def decode(self, tokens):
        return decoded(self.inner, self.vocab, tokens)

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        """How many bytes of text every id stands for, int32 [vocab]."""
        pieces = self.inner.convert_ids_to_tokens(list(range(self.vocab)))
        return np.int32([self._size(i, piece) for i, piece in enumerate(pieces)])

    def _size(self, i: int, piece: str | None) -> int:
        """How many bytes of text an id stands for, from its piece of the vocabulary.

        A byte-level piece has a letter for each byte. A piece of SentencePiece has "\u2581" for a
        space, and "<0x0A>" for a single byte. An added token is the text itself. Marks of where
        words continue or end are no text.
        """
        if piece and not self._is_byte_level and BYTE.fullmatch(piece):
            return 1
        if piece is None or i in self._special:
            return 0
        if i in self._added:
            return len(piece.encode())
        plain = self._unmarked(piece)
        return (
            len(plain)
            if self._is_byte_level
            else len(plain.replace(SPACE, " ").encode())
        )

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in self.inner.backend_tokenizer.to_str()

    @functools.cached_property
    def _added(self) -> Mapping[int, Any]:
        """The ids of tokens that were added to the vocabulary, whose text is never split."""
        return self.inner.added_tokens_decoder

    @functools.cached_property
    def _special(self) -> set[int]:
        return {
            *self.inner.all_special_ids,
            *([] if self.bos is None else [self.bos]),
        }

    @functools.cached_property
    def _marks(self) -> tuple[str, str]:
        """Marks in the vocabulary: before pieces that continue a word ("##"), after its end."""
        model = getattr(self._backend, "model", None)
        before = getattr(model, "continuing_subword_prefix", None)
        after = getattr(model, "end_of_word_suffix", None)
        return before or "", after or ""

    def _unmarked(self, piece: str) -> str:
        """A piece without the marks of `_marks`; a piece that is only a mark is text."""
        before, after = self._marks
        return piece.removeprefix(before).removesuffix(after) or piece

    def lengths(self, tokens):
        return self._bytes[np.asarray(tokens)]

    def texts(self):
        if self._is_byte_level:
            every = [[i] for i in range(self.vocab)]
            found = self.inner.batch_decode(
                every, clean_up_tokenization_spaces=False
            )
        else:
            pieces = self.inner.convert_ids_to_tokens(list(range(self.vocab)))
            found = [_piece_text(piece) for piece in pieces]
        texts = []
        for i, text in enumerate(found):
            plain = text if i in self._added else self._unmarked(text)
            texts.append(None if i in self._special or BROKEN in plain else plain)
        return texts


def _piece_text(piece: str | None) -> str:
    """The text of a piece of SentencePiece."""
    if not piece:
        return BROKEN
    if BYTE.fullmatch(piece):
        value = int(piece[3:5], 16)
        return chr(value) if value < 128 else BROKEN
    return piece.replace(SPACE, " ")


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "byte", or a folder.

    Raises:
        Refused: on any other name.
    """
    if name == "byte":
        return ByteTokenizer()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise Refused(
            f"tokenizer={name!r}: expected 'byte' or a folder with a stored transformers tokenizer"
        )
    return StoredTokenizer(folder)


def stored_as(name: str, *, begins: bool) -> Path | dict[str, Any]:
    """The files from which `transformers` loads the tokenizer called `name`.

    Args:
        name: "byte", or a folder.
        begins: for "byte", whether texts begin with bos; a folder's own settings say it.

    Returns:
        The folder, or JSON objects by file name.
    """
    return byte_files(begins=begins) if name == "byte" else Path(name).expanduser()


def byte_files(*, begins: bool) -> dict[str, Any]:
    """The files of `ByteTokenizer` for `PreTrainedTokenizerFast`.

    Its three special tokens are written by their names, such as "<|end|>".
    """
    codec = ByteTokenizer
    special = {"<|begin|>": codec.bos, "<|end|>": codec.eos, "<|pad|>": codec.pad}
    split = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    first = {"<|begin|>": codec.bos} if begins else {}
    files = _files(_byte_letters(), special, split, split, first)
    return files | _settings(bos="<|begin|>", eos="<|end|>", pad="<|pad|>")


def characters(
    alphabet: str, special: Mapping[str, int], *, eos: str, pad: str
) -> dict[str, Any]:
    """Files for `PreTrainedTokenizerFast` where each id is a character, in the alphabet's order."""
    files = _files(alphabet, special, None, {"type": "Fuse"}, {})
    return files | _settings(eos=eos, pad=pad)


def _settings(**special: str) -> dict[str, Any]:
    """tokenizer_config.json with these special tokens."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{kind}_token": token for kind, token in special.items()},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer_config.json": settings}


def _files(
    letters: str,
    special: Mapping[str, int],
    split: Any,
    decoder: Any,
    first: Mapping[str, int],
) -> dict[str, Any]:
    """tokenizer.json of the library `tokenizers`, where every letter is a token.

    It is byte-pair encoding without pairs.

    Args:
        letters: the letters, by id.
        special: special token -> id.
        split: the library's pre-tokenizer.
        decoder: the library's decoder.
        first: the special tokens before each text, with their ids.
    """
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {letter: i for i, letter in enumerate(letters)} | dict(special),
        "merges": [],
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags} for token, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": _template(first) if first else None,
        "decoder": decoder,
        "model": model,
    }
    return {"tokenizer.json": content}


def _template(first: Mapping[str, int]) -> dict[str, Any]:
    """The library's post-processor that puts tokens before each text."""
    tokens = [{"SpecialToken": {"id": token, "type_id": 0}} for token in first]
    a = {"Sequence": {"id": "A", "type_id": 0}}
    b = {"Sequence": {"id": "B", "type_id": 1}}
    known = {
        token: {"id": token, "ids": [i], "tokens": [token]}
        for token, i in first.items()
    }
    return {
        "type": "TemplateProcessing",
        "single": [*tokens, a],
        "pair": [*tokens, a, b],
        "special_tokens": known,
    }


def _byte_letters() -> str:
    """The letter that stands for each byte in byte-level vocabularies, as in GPT-2's.

    A printable byte is its own character; the others are characters from 256 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\xa1"), ord("\xac") + 1),
        *range(ord("\xae"), ord("\xff") + 1),
    ]
    rest = iter(range(256, 512))
    return "".join(chr(b if b in printable else next(rest)) for b in range(256))
