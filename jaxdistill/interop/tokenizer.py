"""What is exported with a language student besides its weights: the tokens that end a text, and the
tokenizer's files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The files that `transformers` keeps a tokenizer in; none of them is code
STORED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# Those that make no tokenizer without others
ADDITIONS = {"special_tokens_map.json", "chat_template.jinja", "chat_template.json"}


def with_special_tokens(config: Any, data: Any) -> Any:
    """A language model's configuration with the end token of its training data.

    A configuration that has this token already has the data's vocabulary, and keeps its special
    tokens. Any other takes all of the data's. A configuration without end tokens stays as it is.
    """
    codec = getattr(data, "codec", data)
    end = getattr(codec, "eos", None)
    if end is None or not isinstance(getattr(config, "eos", None), tuple):
        return config
    fields = {field.name for field in dataclasses.fields(config)}
    same_vocabulary = end in config.eos
    new: dict[str, Any] = {}
    if not same_vocabulary:
        new["eos"] = (end,)
    if (
        "bos" in fields
    ):  # a configuration without it begins texts with the padding token, as T5
        if not same_vocabulary:
            begin = getattr(codec, "bos", None)
            new["bos"] = -1 if begin is None else begin
        if not same_vocabulary or config.pad < 0:
            new["pad"] = codec.pad
    return dataclasses.replace(config, **new)


def tokenizer_files(experiment: Any, role: str) -> Mapping[str, Any]:
    """The tokenizer of a role's ids by file name, JSON objects or paths; empty where there is none.

    It is that of the data; else that of the folder from which the role's weights come, through
    other roles and runs. For fresh weights it is the teacher's.
    """
    found = experiment.data.texts.tokenizer_files()
    if isinstance(found, Path):
        return stored(found)
    return found or _at_the_start(experiment, role, ())


def _at_the_start(
    experiment: Any, role: str, seen: tuple[str, ...]
) -> Mapping[str, Any]:
    """The tokenizer of the folder from which a role's weights come; `seen` are the roles on the way
    to it.
    """
    source = experiment.source(role)
    if source == "fresh" and "teacher" in experiment.roles and role != "teacher":
        source = "teacher"
    if source in experiment.roles:
        if source in seen:
            return {}
        return _at_the_start(experiment, source, (*seen, role))
    run = experiment.run_at(role, source)
    if run is not None:
        return tokenizer_files(run, "student")
    if not (Path(source) / "config.json").is_file():
        return {}
    return stored(Path(source))


def stored(folder: Path) -> dict[str, Path]:
    """The files of the tokenizer in a folder, by name; empty where they make none."""
    files = {name: folder / name for name in STORED if (folder / name).is_file()}
    return files if files.keys() - ADDITIONS else {}
