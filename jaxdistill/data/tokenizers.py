"""Text <-> token ids: bytes as they are, or a tokenizer that `transformers` stored in a folder."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxdistill.core.tokenizer import stored_tokenizer
from jaxdistill.core.types import Refused, one_line


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
        """What every id stands for; None of special tokens, and of bytes that are no whole
        characters.
        """


class ByteTokenizer:
    """Ids 0-255 are the bytes of UTF-8; 256 pads, 257 begins and 258 ends a document."""

    vocab = 259
    pad = 256
    bos = 257
    eos = 258

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, tokens):
        return bytes(t for t in map(int, tokens) if 0 <= t < 256).decode(errors="replace")

    def lengths(self, tokens):
        return (np.asarray(tokens) < 256).astype(np.int32)

    def texts(self):
        return [chr(i) if i < 128 else None for i in range(self.vocab)]


class StoredTokenizer:
    """A tokenizer folder of `transformers`, read without network and without code of its own. Where
    it has no pad token, eos pads.

    Raises Refused where the folder holds no tokenizer, or one without an end-of-text token or that
    begins every text with several tokens.
    """

    def __init__(self, folder: Path):
        self.inner = stored_tokenizer(folder)
        if self.inner.eos_token_id is None:
            raise Refused(f"tokenizer={folder}: has no end-of-text token (eos_token)")
        self.folder = folder
        # ids may leave gaps
        self.vocab = 1 + max(self.inner.get_vocab().values())
        self.eos = self.inner.eos_token_id
        self.pad = self.eos if self.inner.pad_token_id is None else self.inner.pad_token_id
        begin = self._begin()
        if len(begin) > 1:
            names = " ".join(map(str, self.inner.convert_ids_to_tokens(begin)))
            raise Refused(
                f"tokenizer={folder}: begins every text with {len(begin)} tokens ({one_line(names)}), expected one or none"
            )
        self.bos = begin[0] if begin else None

    def _begin(self) -> list[int]:
        """The ids that texts begin with: seen on the first text whose own tokens are in one place
        among them.
        """
        for text in ("a", *itertools.islice(self.inner.get_vocab(), 1000)):
            try:
                alone, whole = (
                    self.inner(text, add_special_tokens=special)["input_ids"]
                    for special in (False, True)
                )
            except (
                Exception
            ):  # the tokenizers library has no class of its own for a text without known tokens
                continue
            places = [i for i in range(len(whole)) if alone and whole[i : i + len(alone)] == alone]
            if len(places) == 1:
                return whole[: places[0]]
        return []

    def encode(self, text):
        """Raises Refused where the tokenizer has no token for a part of the text, not even an
        unknown one.
        """
        try:
            out = self.inner(text, add_special_tokens=False, return_offsets_mapping=self._drops)
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise Refused(
                f"tokenizer={self.folder}: cannot encode {text[:40]!r} ({one_line(error)})"
            ) from error
        if self._drops:
            self._check_whole(text, out["offset_mapping"])
        return np.asarray(out["input_ids"], np.int32)

    @functools.cached_property
    def _drops(self) -> bool:
        """Whether characters without a token vanish: BPE that has no unknown token and does not go
        back to bytes.
        """
        backend = getattr(self.inner, "backend_tokenizer", None)
        if (
            backend is None
            or type(backend.model).__name__ != "BPE"
            or backend.model.unk_token
            or backend.model.byte_fallback
        ):
            return False
        return "ByteLevel" not in f"{backend.normalizer!r} {backend.pre_tokenizer!r}"

    def _check_whole(self, text: str, places: Sequence[tuple[int, int]]) -> None:
        """Raises Refused where characters of `text`, blanks apart, are in none of the `places`."""
        seen = np.zeros(len(text), bool)
        for start, stop in places:
            seen[start:stop] = True
        for at in np.flatnonzero(~seen):
            if not text[at].isspace():
                raise Refused(
                    f"tokenizer={self.folder}: no token, not even an unknown one, for a part of {text[max(0, at - 20) : at + 20]!r}"
                )

    def decode(self, tokens):
        known = [t for t in map(int, tokens) if 0 <= t < self.vocab]
        return self.inner.decode(
            known, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        """Of every id: byte-level pieces have a letter for each byte; SentencePiece's have "\u2581"
        for a blank and "<0x0A>" for single bytes; added tokens are the text itself; marks of where
        words go on or end are no text.
        """
        pieces = self.inner.convert_ids_to_tokens(list(range(self.vocab)))
        added = self.inner.added_tokens_decoder
        special = self._special
        by_letter = "ByteLevel" in self.inner.backend_tokenizer.to_str()
        letters = lambda piece: (
            len(piece) if by_letter else len(piece.replace("\u2581", " ").encode())
        )
        size = lambda piece: letters(self._unmarked(piece))
        count = lambda i, piece: (
            0
            if i in special or piece is None
            else len(piece.encode())
            if i in added
            else size(piece)
        )
        single = re.compile("<0x[0-9A-F]{2}>")
        return np.int32(
            [
                1 if piece and not by_letter and single.fullmatch(piece) else count(i, piece)
                for i, piece in enumerate(pieces)
            ]
        )

    @property
    def _special(self) -> set[int]:
        return {*self.inner.all_special_ids, *([] if self.bos is None else [self.bos])}

    @functools.cached_property
    def _marks(self) -> tuple[str, str]:
        """What the vocabulary writes before pieces that go on with a word ("##"), and after those
        that end one ("</w>").
        """
        model = getattr(getattr(self.inner, "backend_tokenizer", None), "model", None)
        return tuple(
            getattr(model, name, None) or ""
            for name in ("continuing_subword_prefix", "end_of_word_suffix")
        )

    def _unmarked(self, piece: str) -> str:
        """A piece without these marks; one that is nothing else is the text itself."""
        before, after = self._marks
        return piece.removeprefix(before).removesuffix(after) or piece

    def lengths(self, tokens):
        return self._bytes[np.asarray(tokens)]

    def texts(self):
        special = self._special
        by_letter = "ByteLevel" in self.inner.backend_tokenizer.to_str()
        if by_letter:
            found = self.inner.batch_decode(
                [[i] for i in range(self.vocab)], clean_up_tokenization_spaces=False
            )
        else:
            pieces = self.inner.convert_ids_to_tokens(list(range(self.vocab)))
            single = lambda piece: (
                chr(int(piece[3:5], 16)) if int(piece[3:5], 16) < 128 else "\ufffd"
            )
            found = [
                single(p)
                if re.fullmatch("<0x[0-9A-F]{2}>", p or "")
                else (p or "\ufffd").replace("\u2581", " ")
                for p in pieces
            ]
        added = self.inner.added_tokens_decoder
        found = [text if i in added else self._unmarked(text) for i, text in enumerate(found)]
        return [None if i in special or "\ufffd" in text else text for i, text in enumerate(found)]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "byte", or a folder. Raises Refused on anything else."""
    if name == "byte":
        return ByteTokenizer()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise Refused(
            f"tokenizer={name!r}: expected 'byte' or a folder with a stored transformers tokenizer"
        )
    return StoredTokenizer(folder)


def stored_as(name: str, *, begins: bool) -> Path | dict[str, Any]:
    """What `transformers` loads the tokenizer called `name` from: its folder, or JSON objects by
    file name. `begins` says whether texts begin with the token for that; of a folder its own
    settings do.
    """
    return byte_files(begins=begins) if name == "byte" else Path(name).expanduser()


def byte_files(*, begins: bool) -> dict[str, Any]:
    """`ByteTokenizer` for `PreTrainedTokenizerFast`. The three tokens that are no bytes are not
    made of text, but of their names.
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
    return _files(_byte_letters(), special, split, split, first) | _settings(
        bos="<|begin|>", eos="<|end|>", pad="<|pad|>"
    )


def characters(alphabet: str, special: Mapping[str, int], *, eos: str, pad: str) -> dict[str, Any]:
    """For `PreTrainedTokenizerFast`, of ids that stand for a character each, in the alphabet's
    order.
    """
    return _files(alphabet, special, None, {"type": "Fuse"}, {}) | _settings(eos=eos, pad=pad)


def _settings(**special: str) -> dict[str, Any]:
    named = {f"{kind}_token": token for kind, token in special.items()}
    how = {
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **named, **how}}


def _files(
    letters: str, special: Mapping[str, int], split: Any, decoder: Any, first: Mapping[str, int]
) -> dict[str, Any]:
    """tokenizer.json of the library `tokenizers`: byte-pair encoding without pairs, so that every
    letter is its own token; the tokens `first` come before each text.
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
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": _template(first) if first else None,
        "decoder": decoder,
        "model": model,
    }
    return {"tokenizer.json": whole}


def _template(first: Mapping[str, int]) -> dict[str, Any]:
    """Puts tokens before each text."""
    tokens = [{"SpecialToken": {"id": token, "type_id": 0}} for token in first]
    a, b = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    known = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in first.items()}
    return {
        "type": "TemplateProcessing",
        "single": [*tokens, a],
        "pair": [*tokens, a, b],
        "special_tokens": known,
    }


def _byte_letters() -> str:
    """The letter of each byte in byte-level vocabularies, since GPT-2's: itself where it is
    printable, else one from 256 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\xa1"), ord("\xac") + 1),
        *range(ord("\xae"), ord("\xff") + 1),
    ]
    rest = iter(range(256, 512))
    return "".join(chr(b if b in printable else next(rest)) for b in range(256))
