"""Answers with the reasons for them: prompts that make a teacher give both, parsers of what it
says, and data sets of both.

Rows of (input, label, rationale) become two documents each, in the same order: predict_prefix +
input -> label, and explain_prefix + input -> rationale (step-by-step distillation,
arXiv:2305.02301).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill.core.types import Array, Refused, lookup
from jaxdistill.data.base import InMemory, held_out
from jaxdistill.data.text import JsonLines, _field, _file, _objects, _text, pad_rows


class Told(NamedTuple):
    """What a teacher's text says. Where `valid` is False the two are a blank each, as in the
    paper's code.
    """

    rationale: str
    label: str
    valid: bool


NOTHING = Told(" ", " ", False)


def few_shot(
    shots: Sequence[tuple[str, str, str]], question: str, ending: Callable[[str], str]
) -> str:
    """A chain-of-thought prompt: shots (input, rationale, label) as questions with answers, then
    the question alone.

    `ending(label)` is the sentence that the parser of the task looks for.
    """
    told = "".join(f"Q: {x}\nA: {rationale} {ending(label)}\n\n" for x, rationale, label in shots)
    return f"{told}Q: {question}\nA:"


def parse_choice(text: str) -> Told:
    """ "R. So the answer is (b) dog." -> ("R.", "dog"); what follows a further "Q:" is cut off."""
    rationale, found, tail = text.split("Q:")[0].rstrip().partition("So the answer is")
    match = re.match(r"\s*\([a-z]\)\s*(.+?)\.?$", tail, re.DOTALL)
    return Told(rationale.rstrip(), match.group(1), True) if found and match else NOTHING


def parse_equation(text: str) -> Told:
    """ "R. The answer is (1 + 2)." -> ("R.", "(1 + 2)"); what follows a further "Q:" is cut off."""
    rationale, found, tail = text.split("Q:")[0].rstrip().partition("The answer is")
    spans = ((line, line.find("("), line.rfind(")")) for line in tail.split("\n")) if found else ()
    label = next((line[low : high + 1] for line, low, high in spans if 0 <= low < high), None)
    return NOTHING if label is None else Told(rationale.rstrip(), label, True)


RANK = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}  # how close an operator binds


def arithmetic(text: str) -> Fraction | None:
    """The value of numbers with + - * / and parentheses, exactly; None for anything else (division
    by 0 included).

    Time is linear in the number of tokens, whatever is nested in what.
    """
    values: list[tuple[int, int]] = []  # numerator and denominator, not reduced
    waiting: list[str] = []  # operators and open parentheses
    begins = True  # whether a number comes next

    def settle(least: int) -> None:
        """Applies what binds as close as `least` or closer."""
        while waiting and RANK.get(waiting[-1], 0) >= least:
            values.append(_apply(waiting.pop(), values))

    try:
        for token in re.findall(r"[0-9]+\.?[0-9]*|\.[0-9]+|\S", text):
            if begins and token in "(-":
                waiting.append({"-": "negative"}.get(token, token))
            elif begins:
                values.append(_ratio(token))
                begins = False
            elif token == ")":
                settle(1)
                waiting.pop()
            else:
                settle(RANK[token])
                waiting.append(token)
                begins = True
        settle(1)
        return Fraction(*values[0]) if not begins and not waiting else None
    except (ValueError, LookupError, ZeroDivisionError):
        return None


def _ratio(token: str) -> tuple[int, int]:
    """A decimal number as numerator and denominator. Raises ValueError on anything else."""
    _, _, decimals = token.partition(".")
    return int(token.replace(".", "", 1)), 10 ** len(decimals)


def _apply(sign: str, values: list[tuple[int, int]]) -> tuple[int, int]:
    """Takes the operands off the end of `values`."""
    c, d = values.pop()
    if sign == "negative":
        return -c, d
    a, b = values.pop()
    if sign in "+-":
        return a * d + (c if sign == "+" else -c) * b, b * d
    if sign == "*":
        return a * c, b * d
    if not c:
        raise ZeroDivisionError
    return a * d, b * c


def same_value(a: str, b: str) -> bool:
    """Whether two equations have the same value: integers exactly, others to 1e-6; False where one
    has none.
    """
    x = arithmetic(a)
    y = arithmetic(b)
    if x is None or y is None:
        return False
    return x == y or (
        x.denominator * y.denominator > 1 and abs(x - y) <= Fraction(1, 10**6) * max(1, abs(y))
    )


def svamp(folder: str | Path, labels: str = "gt") -> dict[str, list[dict[str, str]]]:
    """SVAMP with the released PaLM rationales: split -> records of input, label, rationale, and
    gold the data's own equation.

    `labels`: "gt", gold ones, or "llm", the teacher's; test labels are always gold. Rows whose
    rationale cannot be parsed are left out. Raises Refused where a file is missing, or where they
    do not belong together.
    """
    folder = Path(folder)
    teachers = lookup({"gt": False, "llm": True}, labels, "data.labels")
    sources = {
        "train": ("palm_train_CoT_0.json", "palm_train_CoT_1.json"),
        "test": ("palm_test_CoT_0.json",),
    }
    out = {}
    for split, files in sources.items():
        rows = [
            tuple(_field(row, key, where) for key in ("input", "label"))
            for where, row in _objects(folder / f"svamp_{split}.json")
        ]
        texts = [_text(text, where) for file in files for where, text in _objects(folder / file)]
        if len(rows) != len(texts):
            raise Refused(f"{folder}: {len(texts)} rationales for {len(rows)} rows of {split}")
        told = [parse_equation(text) for text in texts]
        label = lambda gold, t: t.label if teachers and split == "train" else gold
        out[split] = [
            {"input": problem, "gold": gold, "rationale": t.rationale, "label": label(gold, t)}
            for (problem, gold), t in zip(rows, told)
            if t.valid
        ]
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rationales(JsonLines):
    """JSON lines with keys input, label, rationale (`path` as in `JsonLines`), both documents of a
    row padded.

    The answer has the arrays of `data.text:PaddedJson`, [prompt_length + label_length]; the reasons
    have those that a loss needs under explain_tokens, explain_mask, ... [prompt_length +
    rationale_length]. Rows whose prompt is too long are left out; targets lose their end. A row
    without a rationale has no explain targets.
    """

    input_key: str = "input"
    response_key: str = "label"
    rationale_key: str = "rationale"
    between: str = ""  # after the prompt
    predict_prefix: str = "predict: "  # the paper's code; the paper: [label]
    explain_prefix: str = "explain: "  # the paper: [rationale]
    prompt_length: int = 1024  # tokens, the prefix included
    label_length: int = 256
    rationale_length: int = 256

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "prompt_length", "label_length", "rationale_length")

    def arrays(self, split):
        answer = lambda text, room: (
            np.append(self.codec.encode(text), np.int32(self.codec.eos))[:room]
            if text.strip()
            else np.int32([])
        )
        prefixes = (self.predict_prefix, self.explain_prefix)
        both = [
            (*(self.asked(prefix + row[0]) for prefix in prefixes), row) for row in self.told(split)
        ]
        kept = [item for item in both if max(len(item[0]), len(item[1])) <= self.prompt_length]
        if both and not kept:
            raise Refused(
                f"data.path={self.path}: all {len(both)} prompts are longer than {self.prompt_length} tokens"
            )
        make = lambda documents, room: pad_rows(
            documents, self.prompt_length, self.prompt_length + room, self.codec.pad
        )
        predict = make(
            [(p, answer(row[1], self.label_length)) for p, _, row in kept], self.label_length
        )
        explain = make(
            [(e, answer(row[2], self.rationale_length)) for _, e, row in kept],
            self.rationale_length,
        )
        return {
            **predict,
            **{f"explain_{k}": explain[k] for k in ("tokens", "mask", "segments", "positions")},
        }

    def prompt_text(self, question):
        return super().prompt_text(self.predict_prefix + question)

    def told(self, split: str) -> list[tuple[str, str, str]]:
        """(input, label, rationale) of every row."""
        path = self.existing()
        keys = (self.input_key, self.response_key, self.rationale_key)
        if path.is_dir():
            if (file := _file(path, split)) is None:
                raise Refused(f"data.path={self.path}: no {split}.jsonl or {split}.json")
            return [
                tuple(_field(item, key, where) for key in keys) for where, item in _objects(file)
            ]
        rows = [tuple(_field(item, key, where) for key in keys) for where, item in _objects(path)]
        return [rows[i] for i in held_out(len(rows), self.heldout, split)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVAMP(Rationales):
    """Arithmetic word problems (arXiv:2103.07191), their equations, and the reasons that PaLM 540B
    gave (see `svamp`): `path` is the folder of the released files. No prompt is longer than 344
    bytes, no equation than 32.
    """

    # what the student learns to answer: "gt", the data's equations | "llm", those of the teacher
    labels: str = "gt"
    prompt_length: int = 344
    label_length: int = 32

    def told(self, split):
        return [
            (row["input"], row["label"], row["rationale"])
            for row in svamp(self.existing(), self.labels)[split]
        ]

    def correct(self, tokens: np.ndarray) -> np.ndarray:
        """Whether what is written after each test problem, int [n, prompt_length + label_length],
        has the value of the data's equation: bool [n].
        """
        codec, (end,) = self.codec, self.eos
        told = [
            (self.asked(self.predict_prefix + problem), label)
            for problem, label, _ in self.told("test")
        ]
        told = [(prompt, label) for prompt, label in told if len(prompt) <= self.prompt_length]
        rows = pad_rows(
            [(prompt, np.int32([])) for prompt, _ in told],
            self.prompt_length,
            self.prompt_length,
            codec.pad,
        )["prompt"]
        wanted = {
            row.tobytes(): label for row, (_, label) in zip(rows, told)
        }  # whole rows: padding may be a token of the text
        prompts, answers = np.split(np.asarray(tokens, np.int32), [self.prompt_length], axis=1)
        labels = [wanted[prompt.tobytes()] for prompt in prompts]
        written = [codec.decode(a[: np.argmax(a == end)] if end in a else a) for a in answers]
        return np.array([same_value(a, label) for a, label in zip(written, labels)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums(InMemory):
    """Lists of 4 digits: the answer is their sum modulo 10, the rationale the partial sums, "3729"
    -> "1" because "021".

    A row is prefix, digits, "=": then the answer, or (explain_tokens) the rationale, and the end.
    Ids 0-9 are the digits, 10 asks for the answer, 11 for the rationale, 12 "=", 13 ends, 14 pads.
    In a share `wrong` of the training rationales one digit is wrong. Test: 1,000 lists that are
    never trained on.
    """

    size: int = 400  # training lists
    wrong: float = 0.03
    joined: bool = (
        False  # the answer is preceded by its rationale, in one document (the single-task baseline)
    )

    vocab = 15
    predict = 10
    explain = 11
    equals = 12
    eos = 13
    pad = 14

    def arrays(self, split):
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(10_000)
        lists = (
            (order[:1000] if split == "test" else order[1000 : 1000 + self.size])[:, None]
            // np.array([1000, 100, 10, 1])
            % 10
        )
        steps = lists.cumsum(1)[:, 1:] % 10
        answer = steps[:, -1:]
        told = steps.copy()
        if split == "train":
            off = np.flatnonzero(rng.random(len(lists)) < self.wrong)
            place = rng.integers(0, 3, len(off))
            told[off, place] = (told[off, place] + rng.integers(1, 10, len(off))) % 10
        row = lambda prefix, digits, t: (
            np.int32([prefix, *digits, self.equals]),
            np.int32([*t, self.eos]),
        )
        rows = lambda prefix, target: [row(prefix, digits, t) for digits, t in zip(lists, target)]
        make = lambda prefix, target: pad_rows(
            rows(prefix, target), 6, 7 + target.shape[1], self.pad
        )
        out = make(self.predict, np.concatenate([told, answer], 1) if self.joined else answer)
        explain = make(self.explain, told)
        return {
            **out,
            **{f"explain_{k}": explain[k] for k in ("tokens", "mask", "segments", "positions")},
        }

    def correct(self, tokens: Array) -> Array:
        """Whether each row [..., T] ends in the right answer and the end sign: bool [...]."""
        right = tokens[..., 1:5].sum(-1) % 10
        return (tokens[..., -2] == right) & (tokens[..., -1] == self.eos)
