"""The one place where a tokenizer folder of `transformers` is opened."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused, one_line


def stored_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer of `transformers` in a folder.

    It is read from local files only. A folder with code of its own is refused before transformers
    sees it, so that the code is never run. Random tokenisation (BPE dropout, Unigram sampling) is
    switched off: the same text always has the same tokens.

    Args:
      options: keyword arguments of `AutoTokenizer.from_pretrained`.

    Raises:
      Refused: the folder is missing, holds no tokenizer or a damaged one, or brings code.
    """
    if not folder.is_dir():
        raise Refused(f"tokenizer={folder}: no such folder")
    for name in ("tokenizer_config.json", "config.json"):
        _check_code(folder / name)
    from transformers import AutoTokenizer  # takes seconds; most runs do without

    try:
        found = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    # the tokenizers' Rust raises bare Exceptions on damage, and panics outside of Exception
    except BaseException as error:
        raise Refused(
            f"tokenizer={folder}: not a tokenizer folder ({one_line(error)})"
        ) from error
    model = getattr(getattr(found, "backend_tokenizer", None), "model", None)
    for name in ("dropout", "alpha", "nbest_size"):  # of BPE, of Unigram
        if getattr(model, name, None):
            setattr(model, name, None)
    return found


def decoder(name: str) -> Callable[[Iterable[int]], str]:
    """A function from token ids to text, for "byte" (bytes of UTF-8) or a tokenizer folder.

    Special tokens are left out, and bytes that are no characters become U+FFFD. Raises Refused
    where there is no such tokenizer.
    """
    if name == "byte":
        return decoded_bytes
    tokenizer = stored_tokenizer(Path(name).expanduser())
    return functools.partial(decoded, tokenizer, vocabulary_size(tokenizer))


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id of a tokenizer of `transformers`; ids may leave gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def decoded(tokenizer: Any, vocab: int, tokens: Iterable[int]) -> str:
    """The text of ids below `vocab`, without special tokens; other ids are left out."""
    known = [token for token in map(int, tokens) if 0 <= token < vocab]
    return tokenizer.decode(
        known, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def decoded_bytes(tokens: Iterable[int]) -> str:
    """The text whose UTF-8 bytes these are; ids from 256 on are special tokens."""
    return bytes(token for token in map(int, tokens) if 0 <= token < 256).decode(
        errors="replace"
    )


def _check_code(file: Path) -> None:
    """Raises Refused where a configuration names code for the tokenizer, or is damaged."""
    if not file.exists():
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{file}: not JSON ({one_line(error)})") from error
    if not isinstance(config, dict):
        raise Refused(
            f"{file}: expected a JSON object, found {type(config).__name__}"
        )
    code = config.get("auto_map")
    if isinstance(code, dict):
        code = code.get("AutoTokenizer")
    elif file.name == "config.json":  # a list is of old tokenizers' configurations
        code = None
    if code:
        raise Refused(
            f"{file}: the tokenizer is code of its own (auto_map: {one_line(code)}), which is never"
            " run; expected a tokenizer class of transformers"
        )
