"""What goes with a language student besides its weights: the tokens that end a text, and the
tokenizer's files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STORED = (  # what `transformers` keeps a tokenizer in; never code
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


def with_special_tokens(config: Any, data: Any) -> Any:
    """A language model's configuration with the end token of the data that it was trained on; any
    other as it is.

    Where the configuration has that token among its own, its vocabulary is the data's, and its
    other special tokens stay.
    Else those of the data take the place of all of them.
    """
    fields = (
        {field.name for field in dataclasses.fields(config)}
        if dataclasses.is_dataclass(config)
        else set()
    )
    codec = getattr(data, "codec", data)
    end = getattr(codec, "eos", None)
    if end is None or not isinstance(getattr(config, "eos", None), tuple):
        return config
    new: dict[str, Any] = {"eos": config.eos if end in config.eos else (end,)}
    if "bos" in fields:  # else the filler begins texts, as T5 has it
        begin = getattr(codec, "bos", None)
        new["bos"] = config.bos if end in config.eos else -1 if begin is None else begin
        new["pad"] = config.pad if end in config.eos and config.pad >= 0 else codec.pad
    return dataclasses.replace(config, **new)


def tokenizer_files(experiment: Any, role: str) -> Mapping[str, Any]:
    """The tokenizer of a role's ids by file name, JSON objects or paths: that of the data, else
    that of the folder from which the role's weights come, through roles and runs; of fresh weights
    the teacher's. Empty where there is none.
    """
    found = experiment.data.texts.tokenizer_files()
    if isinstance(found, Path):
        return stored(found)
    return found or _at_the_start(experiment, role, ())


def _at_the_start(experiment: Any, role: str, seen: tuple[str, ...]) -> Mapping[str, Any]:
    source = experiment.source(role)
    if source == "fresh" and "teacher" in experiment.roles and role != "teacher":
        source = "teacher"
    if source in experiment.roles:
        return {} if source in seen else _at_the_start(experiment, source, (*seen, role))
    if (run := experiment.run_at(role, source)) is not None:
        return tokenizer_files(run, "student")
    return stored(Path(source)) if (Path(source) / "config.json").is_file() else {}


def stored(folder: Path) -> dict[str, Path]:
    """The tokenizer's files in a folder; where there are none but code, none."""
    files = {name: folder / name for name in STORED if (folder / name).is_file()}
    return (
        files
        if files.keys() - {"special_tokens_map.json", "chat_template.jinja", "chat_template.json"}
        else {}
    )
