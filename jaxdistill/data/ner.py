"""Named entities of any type: a teacher's answers in text become conversations for a student.

The steps are those of UniversalNER (arXiv:2308.03279):
  1. `ask` makes a question about a passage, which a teacher answers (data/endpoint.py).
  2. `parse_entities` and `cleaned` read the answer; `labelled` does so for many passages.
  3. `conversation` asks for one type at a time, also for types that the passage lacks, which are
     answered by an empty list.
  4. `encode` makes tokens from a conversation.
"""

from __future__ import annotations

import dataclasses
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from jaxdistill.core.types import Array, Refused, lookup
from jaxdistill.data.base import InMemory, held_out
from jaxdistill.data.text import (
    JsonLines,
    _field,
    _file,
    _objects,
    _read_text,
    pad_documents,
)
from jaxdistill.data.tokenizers import Tokenizer

Pair = tuple[str, str]  # (entity, type), or (user, assistant)
SYSTEM = (
    "A virtual assistant answers questions from a user based on the provided text."
)
CATCH_ALL = {
    "none",
    "na",
    "n/a",
    "misc",
    "miscellaneous",
    "else",
    "other",
    "others",
    "unknown",
}


def ask(passage: str, kind: str = "type") -> list[dict[str, str]]:
    """Messages that make a teacher list a passage's entities, with types in its own words.

    The wording is not the paper's.

    Args:
        kind: "type", or "one-sentence definition of its type" for the paper's variant, whose types
            are short sentences.
    """
    wanted = (
        f"List every named entity in the passage below together with its {kind}. "
        f'Reply with a JSON list of pairs ["entity", "{kind}"] and nothing else; '
        "copy entities exactly as they are written."
    )
    return [{"role": "user", "content": f"{wanted}\n\nPassage: {passage}"}]


def parse_entities(text: str) -> list[Pair] | None:
    """(entity, type) pairs of a teacher's reply.

    The reply holds a JSON list of pairs, or of objects with "entity" and "type".

    Returns:
        The pairs; None where there is no such list.
    """
    start = text.find("[")
    end = text.rfind("]")
    try:
        items = json.loads(text[start : end + 1]) if start >= 0 else None
    except json.JSONDecodeError:
        return None
    if not isinstance(items, list):
        return None
    pairs = []
    for item in items:
        if isinstance(item, dict):
            item = [item.get("entity"), item.get("type")]
        if not isinstance(item, list) or len(item) != 2:
            return None
        if not all(isinstance(text, str) for text in item):
            return None
        pairs.append(tuple(item))
    return pairs


def cleaned(passage: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that can be used, each once, with types in lower case.

    Left out are catch-all types, entities outside ASCII (taken for not English), and entities that
    the passage does not contain.
    """
    kept = []
    for entity, kind in pairs:
        entity = entity.strip()
        kind = kind.strip().lower()
        named = kind and kind not in CATCH_ALL
        if entity and named and entity.isascii() and entity in passage:
            kept.append((entity, kind))
    return list(dict.fromkeys(kept))


def labelled(
    passages: Mapping[str, str], replies: Iterable[Mapping[str, str]]
) -> list[dict[str, object]]:
    """Samples {"text", "entities"} for `Conversations`, from a teacher's replies.

    Replies that cannot be parsed are left out.

    Args:
        passages: id -> passage.
        replies: {"id", "text"} of each reply.
    """
    out = []
    for reply in replies:
        if reply["id"] not in passages:
            continue
        passage = passages[reply["id"]]
        pairs = parse_entities(reply["text"])
        if pairs is not None:
            entities = [list(pair) for pair in cleaned(passage, pairs)]
            out.append({"text": passage, "entities": entities})
    return out


def frequencies(samples: Iterable[Sequence[Pair]]) -> Counter:
    """Type -> mentions in all samples; equal mentions in a passage count once."""
    return Counter(kind for pairs in samples for _, kind in set(pairs))


def absent(
    positive: Iterable[str],
    counts: Mapping[str, int],
    n: int,
    rng: np.random.Generator,
    how: str = "frequency",
) -> list[str]:
    """Up to `n` types that are not `positive`, drawn without replacement.

    Args:
        positive: types of the passage.
        counts: type -> mentions.
        how: "frequency" (by mentions), "uniform" or "none".
    """
    if how not in ("frequency", "uniform", "none"):
        raise Refused(f"negatives={how!r}: expected frequency, uniform or none")
    others = sorted(counts.keys() - set(positive))
    if how == "none" or not others:
        return []
    weights = np.ones(len(others))
    if how == "frequency":
        weights = np.array([counts[kind] for kind in others], np.float64)
    size = min(n, len(others))
    drawn = rng.choice(len(others), size, replace=False, p=weights / weights.sum())
    return [others[i] for i in drawn]


def conversation(
    passage: str,
    answers: Mapping[str, Sequence[str]],
    rng: np.random.Generator | None = None,
    source: str = "",
) -> list[Pair]:
    """(user, assistant) turns: the text with an acknowledgement, then a question for each type.

    Args:
        answers: type -> its entities.
        rng: shuffles the questions; None: they keep their order.
        source: name of the data set, for supervised data whose definitions conflict; empty for new
            text.
    """
    text = f"Text: {passage}"
    if source:
        text += f"\nDataset: {source}"
    first = (text, "I've read this text.")
    asked = []
    for kind, found in answers.items():
        asked.append(
            (f"What describes {kind} in the text?", json.dumps(list(found)))
        )
    order = range(len(asked)) if rng is None else rng.permutation(len(asked))
    return [first, *(asked[i] for i in order)]


def together(
    passage: str,
    answers: Mapping[str, Sequence[str]],
    rng: np.random.Generator | None = None,
    source: str = "",
) -> list[Pair]:
    """The all-in-one variant of `conversation`: one question for all types.

    The answer is a JSON object of lists. The wording is not the paper's.
    """
    kinds = list(answers)
    if rng is not None:
        kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    question = f"What describes each of these in the text: {', '.join(kinds)}?"
    answer = json.dumps({kind: list(answers[kind]) for kind in kinds})
    return [*conversation(passage, {}, source=source), (question, answer)]


FORMS = {"type": conversation, "all": together}


def pieces(
    turns: Sequence[Pair], train_ack: bool = False
) -> list[tuple[str, bool]]:
    """A conversation as (text, whether it is a target); end tokens are left out.

    Args:
        train_ack: whether the acknowledgement is a target too.
    """
    out = [(f"{SYSTEM} ", False)]
    for i, (user, assistant) in enumerate(turns):
        out.append((f"USER: {user} ", False))
        out.append(("ASSISTANT: ", False))
        out.append((assistant, i > 0 or train_ack))
    return out


def encode(
    turns: Sequence[Pair], codec: Tokenizer, train_ack: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a conversation, piece by piece.

    The end token follows each answer, and is a target where the answer is one. It is left out after
    an answer "", which is yet to be written.

    Returns:
        tokens int32 [T], and targets float32 [T].
    """
    tokens = [np.int32([] if codec.bos is None else [codec.bos])]
    mask = [np.zeros(0 if codec.bos is None else 1)]
    for i, (text, target) in enumerate(pieces(turns, train_ack)):
        is_answer = i > 0 and i % 3 == 0
        end = [codec.eos] if is_answer and text else []
        part = np.append(codec.encode(text), np.int32(end))
        tokens.append(part)
        mask.append(np.full(len(part), float(target)))
    return np.concatenate(tokens).astype(np.int32), np.concatenate(mask).astype(
        np.float32
    )


def parse_answer(text: str) -> list[str]:
    """The entities in a student's answer, normalised, each once.

    The answer must start with a JSON list of strings, or of lists of these; it ends at the first
    "]" of the line. Any other answer has no entities.
    """
    match = re.match(r"\[.*?\]", text.strip())
    try:
        found = json.loads(match.group(0)) if match else []
    except json.JSONDecodeError:
        return []
    flat = [
        s for item in found for s in (item if isinstance(item, list) else [item])
    ]
    if not all(isinstance(s, str) for s in flat):
        return []
    return list(dict.fromkeys(map(normalise, flat)))


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and runs of white space."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def conll(file: str | Path) -> list[tuple[str, list[Pair]]]:
    """(passage, its (entity, type) pairs) from a two-column file of words with BIO tags.

    Words are joined by spaces.

    Raises:
        Refused: on another tag.
    """
    out = []
    words = []
    spans = []
    inside = False
    for number, line in enumerate([*_read_text(Path(file)).split("\n"), ""], 1):
        word, _, tag = line.partition("\t")
        if not word.strip():
            if words:
                out.append(
                    (" ".join(words), [(" ".join(w), kind) for w, kind in spans])
                )
            words = []
            spans = []
            inside = False
            continue
        mark, _, kind = tag.strip().partition("-")
        if mark not in ("B", "I", "O") or bool(kind) == (mark == "O"):
            raise Refused(
                f"{file}:{number}: tag {tag!r}, expected O, B-type or I-type"
            )
        if mark == "B" or (mark == "I" and not inside):
            spans.append(([word], kind))
        elif mark == "I":
            spans[-1][0].append(word)
        inside = mark != "O"
        words.append(word)
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversations(JsonLines):
    """JSON lines {"text": passage, "entities": [[entity, type], ...]} as conversations.

    tokens, segments, positions int32 and mask float32 [B length], padded on the right.
    Conversations that are longer are left out, since their answers would be cut.
    """

    length: int = 1024  # tokens
    heldout: float = 0.02  # the paper's code: a 98 / 2 split
    # How the types are drawn that are asked for though the passage lacks them: frequency, uniform
    # or none. They are drawn once.
    negatives: str = "frequency"
    # Number of such types for a passage; 0: as many as it has types, at least one (not stated in
    # the paper).
    n_neg: int = 0
    # whether the acknowledgement is a target too, as in the paper's code
    train_ack: bool = False
    form: str = "type"  # type: a question for each type | all: one for all of them
    source: str = ""  # name of the data set, for the supervised template

    def prompt_text(self, question):
        return question

    def passages(self, split: str) -> list[tuple[str, list[Pair]]]:
        """(text, its (entity, type) pairs) of every sample.

        Raises:
            Refused: on a sample that cannot be read; the message names it.
        """
        path = self.existing()
        file = path if path.is_file() else _file(path, split)
        if file is None:
            raise Refused(
                f"data.path={self.path}: no {split}.jsonl or {split}.json"
            )
        samples = []
        for where, item in _objects(file):
            text = _field(item, "text", where)
            found = item.get("entities")
            pairs = (
                parse_entities(json.dumps(found))
                if isinstance(found, list)
                else None
            )
            if pairs is None:
                raise Refused(
                    f"{where}: expected a list of [entity, type] under 'entities'"
                )
            samples.append((text, pairs))
        if not path.is_file():
            return samples
        return [samples[i] for i in held_out(len(samples), self.heldout, split)]

    def conversations(self, split: str) -> list[list[Pair]]:
        """The turns of every passage, with its negative types and its order of questions."""
        passages = self.passages(split)
        rng = np.random.default_rng([self.seed, 4])
        counts = frequencies(pairs for _, pairs in self.passages("train"))
        write = lookup(FORMS, self.form, "data.form")
        out = []
        for text, pairs in passages:
            answers: dict[str, list[str]] = {}
            for entity, kind in pairs:
                answers.setdefault(kind, []).append(entity)
            size = self.n_neg or max(1, len(answers))
            for kind in absent(answers, counts, size, rng, self.negatives):
                answers[kind] = []
            out.append(write(text, answers, rng, self.source))
        return out

    def arrays(self, split):
        coded = [
            encode(turns, self.codec, self.train_ack)
            for turns in self.conversations(split)
        ]
        kept = [
            (tokens, mask) for tokens, mask in coded if len(tokens) <= self.length
        ]
        logging.info(
            "%s, %s: %d conversations, %d too long",
            self.path,
            split,
            len(coded),
            len(coded) - len(kept),
        )
        if coded and not kept:
            raise Refused(
                f"data.path={self.path}: all {len(coded)} conversations are longer than "
                f"{self.length} tokens"
            )
        shape = (len(kept), self.length)
        out = {
            "tokens": np.full(shape, self.codec.pad, np.int32),
            "mask": np.zeros(shape, np.float32),
            "segments": np.zeros(shape, np.int32),
            "positions": np.tile(
                np.arange(self.length, dtype=np.int32), (len(kept), 1)
            ),
        }
        for i, (tokens, mask) in enumerate(kept):
            out["tokens"][i, : len(tokens)] = tokens
            out["mask"][i, : len(tokens)] = mask
            out["segments"][i, : len(tokens)] = 1
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots(InMemory):
    """A synthetic language of filler words and entity words, with questions for one type.

    A sample is a sentence, "?" and a type; the answer is the entity words of that type in their
    order, and the end token. Types are frequent by Zipf's law.

    The teacher that labels the training sentences misses or misnames each entity with probability
    `noise`. It lists only types that it sees; `negatives` adds questions for other types. Held-out
    samples ask for every type of every sentence, and their labels are right.
    """

    size: int = 3000  # training sentences
    types: int = 12
    words: int = 6  # entity words of a type
    fillers: int = 20  # other words
    length: int = 10  # words in a sentence
    rate: float = 0.2  # probability that a word is an entity
    noise: float = 0.08
    negatives: str = "frequency"

    eos = 0
    pad = 1
    mark = 2  # "?"

    @property
    def vocab_size(self):
        return self.vocab

    @property
    def vocab(self) -> int:
        """Special tokens, types, entity words and fillers."""
        return 3 + self.types + self.types * self.words + self.fillers

    def kind(self, word: Array) -> Array:
        """The type of a word; outside [0, types) the word is no entity."""
        return (word - 3 - self.types) // self.words

    def sentences(self, split: str) -> np.ndarray:
        """The sentences of a split, int [sentences, length]."""
        rng = np.random.default_rng([self.seed, split == "test"])
        shape = (300 if split == "test" else self.size, self.length)
        zipf = 1 / np.arange(1, self.types + 1)
        kind = rng.choice(self.types, shape, p=zipf / zipf.sum())
        filler = (
            3 + self.types * (1 + self.words) + rng.integers(0, self.fillers, shape)
        )
        is_entity = rng.random(shape) < self.rate
        entity = (
            3 + self.types + kind * self.words + rng.integers(0, self.words, shape)
        )
        return np.where(is_entity, entity, filler)

    def arrays(self, split):
        sentences = self.sentences(split)
        rng = np.random.default_rng([self.seed, 2])
        kinds = self.kind(sentences)
        told = np.where((kinds >= 0) & (kinds < self.types), kinds, -1)
        if split == "train":
            wrong = (told >= 0) & (rng.random(told.shape) < self.noise)
            missed = rng.random(told.shape) < 0.5
            other = rng.integers(0, self.types, told.shape)
            told = np.where(wrong, np.where(missed, -1, other), told)
        counts = Counter(
            {str(k): int((told == k).sum()) for k in range(self.types)}
        )
        documents = []
        for words, labels in zip(sentences, told):
            seen = sorted(set(labels[labels >= 0].tolist()))
            asked = range(self.types)
            if split == "train":
                more = absent(
                    map(str, seen), counts, max(1, len(seen)), rng, self.negatives
                )
                asked = [*seen, *map(int, more)]
            for k in asked:
                prompt = np.int32([*words, self.mark, 3 + k])
                response = np.int32([*words[labels == k], self.eos])
                documents.append((prompt, response))
        return pad_documents(
            documents, self.length + 2, 2 * self.length + 3, self.pad
        )

    def evaluation(self, n):
        """Up to `n` held-out samples: all questions about each sentence."""
        size = n // self.types * self.types
        return {k: v[:size] for k, v in self._cached("test").items()}

    def gold(self, tokens: np.ndarray) -> list[list[str]]:
        """The right answer to the question of each sample [B T], as words."""
        out = []
        for sample in tokens:
            kind = sample[self.length + 1] - 3
            out.append(
                [str(w) for w in sample[: self.length] if self.kind(w) == kind]
            )
        return out

    def answers(self, tokens: np.ndarray) -> list[list[str]]:
        """The answer of each sample [B T], as words."""
        out = []
        for sample in tokens:
            words = sample[self.length + 2 :].tolist()
            if self.eos in words:
                words = words[: words.index(self.eos)]
            out.append([str(w) for w in words])
        return out

    def correct(self, tokens: np.ndarray) -> np.ndarray:
        """Whether the answer of each sample [B T] is exactly right: bool [B]."""
        tokens = np.asarray(tokens)
        pairs = zip(self.answers(tokens), self.gold(tokens))
        return np.array([answer == gold for answer, gold in pairs])
