"""Named entities of any type from a teacher that answers in text, as conversations for a student
(arXiv:2308.03279).

passages -> `ask` -> the teacher (data/endpoint.py) -> `parse_entities`, `cleaned` -> rows {"text",
"entities"} -> `conversation` -> tokens. A conversation asks for one type at a time; types that a
passage lacks are asked for too, and answered by an empty list.
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
from jaxdistill.data.text import JsonLines, _field, _file, _objects, _read_text, pad_rows
from jaxdistill.data.tokenizers import Tokenizer

Pair = tuple[str, str]
SYSTEM = "A virtual assistant answers questions from a user based on the provided text."
CATCH_ALL = {"none", "na", "n/a", "misc", "miscellaneous", "else", "other", "others", "unknown"}


def ask(passage: str, kind: str = "type") -> list[dict[str, str]]:
    """Messages that make a teacher list a passage's entities, with types in its own words (our
    wording).

    `kind`: "type", or "one-sentence definition of its type" for the paper's variant, whose types
    are short sentences.
    """
    wanted = f'List every named entity in the passage below together with its {kind}. Reply with a JSON list of pairs ["entity", "{kind}"]'
    wanted += " and nothing else; copy entities exactly as they are written."
    return [{"role": "user", "content": f"{wanted}\n\nPassage: {passage}"}]


def parse_entities(text: str) -> list[Pair] | None:
    """(entity, type) pairs of a teacher's reply: a JSON list of pairs, or of objects with "entity"
    and "type"; None where there is none, or where an item is neither.
    """
    start = text.find("[")
    end = text.rfind("]")
    try:
        items = json.loads(text[start : end + 1]) if start >= 0 else None
    except json.JSONDecodeError:
        return None
    if not isinstance(items, list):
        return None
    pairs = [
        (i.get("entity"), i.get("type"))
        if isinstance(i, dict)
        else tuple(i)
        if isinstance(i, list)
        else ()
        for i in items
    ]
    return pairs if all(len(p) == 2 and all(isinstance(s, str) for s in p) for p in pairs) else None


def cleaned(passage: str, pairs: Sequence[Pair]) -> list[Pair]:
    """Without catch-all types, entities outside ASCII (taken for not English), and what the passage
    does not contain;
    types in lower case; each pair once.
    """
    kept = [(entity.strip(), kind.strip().lower()) for entity, kind in pairs]
    good = lambda e, k: e and k and k not in CATCH_ALL and e.isascii() and e in passage
    return list(dict.fromkeys((e, k) for e, k in kept if good(e, k)))


def labelled(
    passages: Mapping[str, str], replies: Iterable[Mapping[str, str]]
) -> list[dict[str, object]]:
    """Rows {"text", "entities"} for `Conversations` from a teacher's replies {"id", "text"}; what
    cannot be parsed is left out.
    """
    told = [
        (passages[reply["id"]], parse_entities(reply["text"]))
        for reply in replies
        if reply["id"] in passages
    ]
    return [
        {"text": text, "entities": [list(pair) for pair in cleaned(text, pairs)]}
        for text, pairs in told
        if pairs is not None
    ]


def frequencies(rows: Iterable[Sequence[Pair]]) -> Counter:
    """Type -> mentions in the whole data set, equal mentions in a passage counted once."""
    return Counter(kind for pairs in rows for _, kind in set(pairs))


def absent(
    positive: Iterable[str],
    counts: Mapping[str, int],
    n: int,
    rng: np.random.Generator,
    how: str = "frequency",
) -> list[str]:
    """Up to `n` types that are not `positive`, without replacement; `how`: frequency | uniform |
    none.
    """
    if how not in ("frequency", "uniform", "none"):
        raise Refused(f"negatives={how!r}: expected frequency, uniform or none")
    others = sorted(counts.keys() - set(positive))
    if how == "none" or not others:
        return []
    weights = np.array([counts[kind] if how == "frequency" else 1 for kind in others], np.float64)
    return [
        others[i]
        for i in rng.choice(
            len(others), min(n, len(others)), replace=False, p=weights / weights.sum()
        )
    ]


def conversation(
    passage: str,
    answers: Mapping[str, Sequence[str]],
    rng: np.random.Generator | None = None,
    source: str = "",
) -> list[Pair]:
    """(user, assistant) turns: the text with an acknowledgement, then a question for each type,
    shuffled by `rng`.

    `source` names the data set, for supervised data whose definitions conflict; none when asked
    about new text.
    """
    first = (
        f"Text: {passage}" + (f"\nDataset: {source}" if source else ""),
        "I've read this text.",
    )
    asked = [
        (f"What describes {kind} in the text?", json.dumps(list(found)))
        for kind, found in answers.items()
    ]
    order = range(len(asked)) if rng is None else rng.permutation(len(asked))
    return [first, *(asked[i] for i in order)]


def together(
    passage: str,
    answers: Mapping[str, Sequence[str]],
    rng: np.random.Generator | None = None,
    source: str = "",
) -> list[Pair]:
    """The all-in-one variant: one question for every type (our wording), answered by a JSON object
    of their lists.
    """
    kinds = (
        list(answers) if rng is None else [list(answers)[i] for i in rng.permutation(len(answers))]
    )
    question = f"What describes each of these in the text: {', '.join(kinds)}?"
    return [
        conversation(passage, {}, source=source)[0],
        (question, json.dumps({kind: list(answers[kind]) for kind in kinds})),
    ]


FORMS = {"type": conversation, "all": together}


def pieces(turns: Sequence[Pair], train_ack: bool = False) -> list[tuple[str, bool]]:
    """(text, is it a target?) of a conversation; the end sign that follows each answer is the
    tokenizer's, here "" with it.
    """
    out = [(f"{SYSTEM} ", False)]
    for i, (user, assistant) in enumerate(turns):
        out += [(f"USER: {user} ", False), ("ASSISTANT: ", False), (assistant, i > 0 or train_ack)]
    return out


def encode(
    turns: Sequence[Pair], codec: Tokenizer, train_ack: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [T], targets float32 [T]): pieces one by one, each answer followed by the end
    sign, which is one too.

    The last answer may be "" (to be written): then no end sign follows it.
    """
    tokens = [np.int32([] if codec.bos is None else [codec.bos])]
    mask = [np.zeros(0 if codec.bos is None else 1)]
    parts = pieces(turns, train_ack)
    for i, (text, target) in enumerate(parts):
        ends = i > 0 and i % 3 == 0 and text
        part = np.append(codec.encode(text), np.int32([codec.eos] if ends else []))
        tokens.append(part), mask.append(np.full(len(part), float(target)))
    return np.concatenate(tokens).astype(np.int32), np.concatenate(mask).astype(np.float32)


def parse_answer(text: str) -> list[str]:
    """Entities in a student's answer, normalised, each once; a malformed answer has none.

    The answer must start with a list, which ends at the first "]" of the line; its elements are
    strings or lists of these.
    """
    match = re.match(r"\[.*?\]", text.strip())
    try:
        found = json.loads(match.group(0)) if match else []
    except json.JSONDecodeError:
        return []
    flat = [s for item in found for s in (item if isinstance(item, list) else [item])]
    return (
        list(dict.fromkeys(map(normalise, flat))) if all(isinstance(s, str) for s in flat) else []
    )


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and runs of white space."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def conll(file: str | Path) -> list[tuple[str, list[Pair]]]:
    """(passage, (entity, type) pairs) of two-column BIO text, words joined by blanks. Raises
    Refused on another tag.
    """
    out = []
    words = []
    spans = []
    inside = False
    for number, line in enumerate([*_read_text(Path(file)).split("\n"), ""], 1):
        word, _, tag = line.partition("\t")
        if not word.strip():
            if words:
                out.append((" ".join(words), [(" ".join(w), kind) for w, kind in spans]))
            words = []
            spans = []
            inside = False
            continue
        mark, _, kind = tag.strip().partition("-")
        if mark not in ("B", "I", "O") or bool(kind) == (mark == "O"):
            raise Refused(f"{file}:{number}: tag {tag!r}, expected O, B-type or I-type")
        if mark == "B" or (mark == "I" and not inside):
            spans.append(([word], kind))
        elif mark == "I":
            spans[-1][0].append(word)
        inside = mark != "O"
        words.append(word)
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversations(JsonLines):
    """JSON lines {"text": passage, "entities": [[entity, type], ...]} as conversations: tokens,
    segments, positions int32 and mask float32 [length], padded on the right. Those that are longer
    are left out, since answers would be cut.
    """

    length: int = 1024  # tokens
    heldout: float = 0.02  # the paper's code: a 98 / 2 split
    negatives: str = (
        "frequency"  # types asked for that a passage lacks: frequency | uniform | none; drawn once
    )
    # of them in a passage; 0: as many as it has types, at least one (not stated in the paper)
    n_neg: int = 0
    train_ack: bool = False  # whether the acknowledgement is a target too, as in the paper's code
    form: str = "type"  # type: a question for each type | all: one for all of them
    source: str = ""  # name of the data set, for the supervised template

    def prompt_text(self, question):
        return question

    def passages(self, split: str) -> list[tuple[str, list[Pair]]]:
        """(text, (entity, type) pairs) of every row. Raises Refused, naming the row, on a bad one."""
        path = self.existing()
        file = path if path.is_file() else _file(path, split)
        if file is None:
            raise Refused(f"data.path={self.path}: no {split}.jsonl or {split}.json")
        rows = []
        for where, item in _objects(file):
            text = _field(item, "text", where)
            found = item.get("entities")
            pairs = parse_entities(json.dumps(found)) if isinstance(found, list) else None
            if pairs is None:
                raise Refused(f"{where}: expected a list of [entity, type] under 'entities'")
            rows.append((text, pairs))
        return (
            [rows[i] for i in held_out(len(rows), self.heldout, split)] if path.is_file() else rows
        )

    def conversations(self, split: str) -> list[list[Pair]]:
        """Every passage's turns, with its negatives and in its order of questions."""
        rows = self.passages(split)
        rng = np.random.default_rng([self.seed, 4])
        counts = frequencies(pairs for _, pairs in self.passages("train"))
        out = []
        for text, pairs in rows:
            answers: dict[str, list[str]] = {}
            for entity, kind in pairs:
                answers.setdefault(kind, []).append(entity)
            more = absent(answers, counts, self.n_neg or max(1, len(answers)), rng, self.negatives)
            write = lookup(FORMS, self.form, "data.form")
            out.append(write(text, {**answers, **{kind: [] for kind in more}}, rng, self.source))
        return out

    def arrays(self, split):
        coded = [encode(turns, self.codec, self.train_ack) for turns in self.conversations(split)]
        kept = [(tokens, mask) for tokens, mask in coded if len(tokens) <= self.length]
        logging.info(
            "%s, %s: %d conversations, %d too long",
            self.path,
            split,
            len(coded),
            len(coded) - len(kept),
        )
        if coded and not kept:
            raise Refused(
                f"data.path={self.path}: all {len(coded)} conversations are longer than {self.length} tokens"
            )
        shape = (len(kept), self.length)
        out = {
            "tokens": np.full(shape, self.codec.pad, np.int32),
            "mask": np.zeros(shape, np.float32),
        }
        out |= {
            "segments": np.zeros(shape, np.int32),
            "positions": np.tile(np.arange(self.length, dtype=np.int32), (len(kept), 1)),
        }
        for r, (tokens, mask) in enumerate(kept):
            out["tokens"][r, : len(tokens)] = tokens
            out["mask"][r, : len(tokens)] = mask
            out["segments"][r, : len(tokens)] = 1
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots(InMemory):
    """Sentences of filler words with entity words of `types` types, frequent ones first (Zipf); a
    question for one type.

    A row is the sentence, "?", the type: then the entity words of that type in their order and the
    end. The teacher that labels the training sentences misses or misnames each entity with
    probability `noise`, and lists only types that it sees; `negatives` adds questions for others.
    Evaluation asks for every type of every sentence, and its labels are right.
    """

    size: int = 3000  # training sentences
    types: int = 12
    words: int = 6  # entity words of a type
    fillers: int = 20  # other words
    length: int = 10  # words in a sentence
    rate: float = 0.2  # probability that a word is an entity
    noise: float = 0.08
    negatives: str = "frequency"

    # the end, padding, "?"
    eos = 0
    pad = 1
    mark = 2

    @property
    def vocab(self) -> int:
        return 3 + self.types + self.types * self.words + self.fillers

    def kind(self, word: Array) -> Array:
        """The type of a word, by position below the first entity word's id; outside [0, types) it
        is no entity.
        """
        return (word - 3 - self.types) // self.words

    def sentences(self, split: str) -> np.ndarray:
        rng = np.random.default_rng([self.seed, split == "test"])
        n = 300 if split == "test" else self.size
        law = 1 / np.arange(1, self.types + 1)
        entity = (
            3
            + self.types
            + rng.choice(self.types, (n, self.length), p=law / law.sum()) * self.words
        )
        filler = 3 + self.types * (1 + self.words) + rng.integers(0, self.fillers, (n, self.length))
        return np.where(
            rng.random((n, self.length)) < self.rate,
            entity + rng.integers(0, self.words, (n, self.length)),
            filler,
        )

    def arrays(self, split):
        sentences = self.sentences(split)
        rng = np.random.default_rng([self.seed, 2])
        kinds = self.kind(sentences)
        told = np.where((kinds >= 0) & (kinds < self.types), kinds, -1)
        if split == "train":
            off = (told >= 0) & (rng.random(told.shape) < self.noise)
            told = np.where(
                off,
                np.where(rng.random(told.shape) < 0.5, -1, rng.integers(0, self.types, told.shape)),
                told,
            )
        counts = Counter({str(k): int((told == k).sum()) for k in range(self.types)})
        rows = []
        for words, labels in zip(sentences, told):
            seen = sorted(set(labels[labels >= 0].tolist()))
            if split == "test":
                asked = range(self.types)
            else:
                asked = seen + [
                    int(k)
                    for k in absent(map(str, seen), counts, max(1, len(seen)), rng, self.negatives)
                ]
            rows += [
                (np.int32([*words, self.mark, 3 + k]), np.int32([*words[labels == k], self.eos]))
                for k in asked
            ]
        return pad_rows(rows, self.length + 2, 2 * self.length + 3, self.pad)

    def evaluation(self, n):
        """Whole sentences, every type asked for."""
        return {k: v[: n // self.types * self.types] for k, v in self._cached("test").items()}

    def gold(self, tokens: np.ndarray) -> list[list[str]]:
        """The right answer to each row's question, as words."""
        return [
            [str(w) for w in row[: self.length] if self.kind(w) == row[self.length + 1] - 3]
            for row in tokens
        ]

    def answers(self, tokens: np.ndarray) -> list[list[str]]:
        """What each row answers, as words."""
        tails = [row[self.length + 2 :].tolist() for row in tokens]
        return [
            [str(w) for w in (tail[: tail.index(self.eos)] if self.eos in tail else tail)]
            for tail in tails
        ]

    def correct(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each row's answer is exactly right: bool [n]."""
        return np.array(
            [
                a == b
                for a, b in zip(self.answers(np.asarray(tokens)), self.gold(np.asarray(tokens)))
            ]
        )
