"""Answers with their rationales: prompts for a teacher, parsers of its answers, and data sets.

As in step-by-step distillation (arXiv:2305.02301), each (input, label, rationale) becomes two
documents of one sample: predict_prefix + input -> label, and explain_prefix + input -> rationale.
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
from jaxdistill.data.text import (
    JsonLines,
    _field,
    _file,
    _objects,
    _text,
    pad_documents,
)


class Parsed(NamedTuple):
    """The content of a teacher's answer.

    Where it cannot be parsed, `valid` is False and both texts are a space, as in the paper's code.
    """

    rationale: str
    label: str
    valid: bool


UNPARSED = Parsed(" ", " ", False)


def few_shot(
    shots: Sequence[tuple[str, str, str]],
    question: str,
    ending: Callable[[str], str],
) -> str:
    """A chain-of-thought prompt: examples with their answers, then the question.

    Args:
        shots: (input, rationale, label) of each example.
        question: the question without an answer.
        ending: label -> the sentence that the parser of the task looks for.
    """
    prompt = ""
    for text, rationale, label in shots:
        prompt += f"Q: {text}\nA: {rationale} {ending(label)}\n\n"
    return f"{prompt}Q: {question}\nA:"


def parse_choice(text: str) -> Parsed:
    """ "R. So the answer is (b) dog." -> ("R.", "dog"). Text after a further "Q:" is ignored."""
    rationale, found, tail = (
        text.split("Q:")[0].rstrip().partition("So the answer is")
    )
    match = re.match(r"\s*\([a-z]\)\s*(.+?)\.?$", tail, re.DOTALL)
    return (
        Parsed(rationale.rstrip(), match.group(1), True)
        if found and match
        else UNPARSED
    )


def parse_equation(text: str) -> Parsed:
    """ "R. The answer is (1 + 2)." -> ("R.", "(1 + 2)"). Text after a further "Q:" is ignored."""
    rationale, found, tail = text.split("Q:")[0].rstrip().partition("The answer is")
    if not found:
        return UNPARSED
    for line in tail.split("\n"):
        low = line.find("(")
        high = line.rfind(")")
        if 0 <= low < high:
            return Parsed(rationale.rstrip(), line[low : high + 1], True)
    return UNPARSED


PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}  # of the operators


def arithmetic(text: str) -> Fraction | None:
    """The exact value of an expression of numbers, + - * / and parentheses.

    The time is linear in the number of tokens, however deep the expression is nested.

    Returns:
        The value; None for any other text, and for a division by 0.
    """
    values: list[tuple[int, int]] = []  # numerator and denominator, not reduced
    waiting: list[str] = []  # operators and open parentheses
    expects_number = True  # whether a number comes next

    def reduce(least: int) -> None:
        """Applies the last operators of at least this precedence."""
        while waiting and PRECEDENCE.get(waiting[-1], 0) >= least:
            values.append(_apply(waiting.pop(), values))

    try:
        for token in re.findall(r"[0-9]+\.?[0-9]*|\.[0-9]+|\S", text):
            if expects_number and token in "(-":
                waiting.append("negative" if token == "-" else token)
            elif expects_number:
                values.append(_ratio(token))
                expects_number = False
            elif token == ")":
                reduce(1)
                waiting.pop()
            else:
                reduce(PRECEDENCE[token])
                waiting.append(token)
                expects_number = True
        reduce(1)
        return None if expects_number or waiting else Fraction(*values[0])
    except (ValueError, LookupError, ZeroDivisionError):
        return None


def _ratio(token: str) -> tuple[int, int]:
    """A decimal number as numerator and denominator. Raises ValueError on anything else."""
    _, _, decimals = token.partition(".")
    return int(token.replace(".", "", 1)), 10 ** len(decimals)


def _apply(sign: str, values: list[tuple[int, int]]) -> tuple[int, int]:
    """The value of an operator on its operands, which are taken off the end of `values`."""
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
    """Whether two equations have the same value: integers exactly, other numbers to 1e-6.

    False where one of them has no value.
    """
    x = arithmetic(a)
    y = arithmetic(b)
    if x is None or y is None:
        return False
    if x == y:
        return True
    are_integers = x.denominator * y.denominator == 1
    return not are_integers and abs(x - y) <= Fraction(1, 10**6) * max(1, abs(y))


def svamp(
    folder: str | Path, labels: str = "gt"
) -> dict[str, list[dict[str, str]]]:
    """SVAMP with the released PaLM rationales; those that cannot be parsed are left out.

    Args:
        folder: the folder of the released files.
        labels: "gt" for the data's own equations, "llm" for the teacher's. Test labels are always
            the data's own.

    Returns:
        Split -> records of input, label, rationale, and gold, which is the data's own equation.

    Raises:
        Refused: where a file is missing, and where files do not belong together.
    """
    folder = Path(folder)
    use_teacher = lookup({"gt": False, "llm": True}, labels, "data.labels")
    sources = {
        "train": ("palm_train_CoT_0.json", "palm_train_CoT_1.json"),
        "test": ("palm_test_CoT_0.json",),
    }
    out = {}
    for split, files in sources.items():
        problems = []
        for where, item in _objects(folder / f"svamp_{split}.json"):
            problems.append(
                (_field(item, "input", where), _field(item, "label", where))
            )
        texts = [
            _text(text, where)
            for file in files
            for where, text in _objects(folder / file)
        ]
        if len(problems) != len(texts):
            raise Refused(
                f"{folder}: {len(texts)} rationales for {len(problems)} rows of {split}"
            )
        out[split] = []
        for (problem, gold), text in zip(problems, texts):
            parsed = parse_equation(text)
            if parsed.valid:
                label = parsed.label if use_teacher and split == "train" else gold
                record = {
                    "input": problem,
                    "gold": gold,
                    "rationale": parsed.rationale,
                }
                out[split].append({**record, "label": label})
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rationales(JsonLines):
    """JSON lines with keys input, label and rationale; `path` as in `JsonLines`.

    The label has the arrays of `data.text:PaddedJson`, T = prompt_length + label_length. The
    rationale has explain_tokens, explain_mask, explain_segments and explain_positions, T =
    prompt_length + rationale_length.

    Samples whose prompt is too long are left out; targets that are too long lose their end. A
    sample without a rationale has no targets in explain_mask.
    """

    input_key: str = "input"
    response_key: str = "label"
    rationale_key: str = "rationale"
    between: str = ""  # text after the prompt
    predict_prefix: str = "predict: "  # the paper's code; the paper: [label]
    explain_prefix: str = "explain: "  # the paper: [rationale]
    prompt_length: int = 1024  # tokens, the prefix included
    label_length: int = 256
    rationale_length: int = 256

    def arrays(self, split):
        records = self.records(split)
        predict = []
        explain = []
        for problem, label, rationale in records:
            predict_prompt = self.prompt_tokens(self.predict_prefix + problem)
            explain_prompt = self.prompt_tokens(self.explain_prefix + problem)
            if max(len(predict_prompt), len(explain_prompt)) <= self.prompt_length:
                predict.append(
                    (predict_prompt, self._response(label, self.label_length))
                )
                explain.append(
                    (
                        explain_prompt,
                        self._response(rationale, self.rationale_length),
                    )
                )
        if records and not predict:
            raise Refused(
                f"data.path={self.path}: all {len(records)} prompts are longer than "
                f"{self.prompt_length} tokens"
            )
        width = self.prompt_length
        pad = self.codec.pad
        return with_explanations(
            pad_documents(predict, width, width + self.label_length, pad),
            pad_documents(explain, width, width + self.rationale_length, pad),
        )

    def _response(self, text: str, room: int) -> np.ndarray:
        """The tokens of a response, cut to its room; none where there is no text."""
        if not text.strip():
            return np.int32([])
        return np.append(self.codec.encode(text), np.int32(self.codec.eos))[:room]

    def prompt_text(self, question):
        return super().prompt_text(self.predict_prefix + question)

    def records(self, split: str) -> list[tuple[str, str, str]]:
        """(input, label, rationale) of every sample."""
        path = self.existing()
        file = _file(path, split) if path.is_dir() else path
        if file is None:
            raise Refused(
                f"data.path={self.path}: no {split}.jsonl or {split}.json"
            )
        keys = (self.input_key, self.response_key, self.rationale_key)
        samples = []
        for where, item in _objects(file):
            samples.append(tuple(_field(item, key, where) for key in keys))
        if path.is_dir():
            return samples
        return [samples[i] for i in held_out(len(samples), self.heldout, split)]


def with_explanations(
    predict: dict[str, np.ndarray], explain: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays of the answers, and under explain_... those of the rationales that losses need."""
    names = ("tokens", "mask", "segments", "positions")
    return {**predict, **{f"explain_{name}": explain[name] for name in names}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVAMP(Rationales):
    """Arithmetic word problems (arXiv:2103.07191), their equations, and PaLM 540B's rationales.

    `path` is the folder of the released files (see `svamp`). No prompt is longer than 344 bytes, no
    equation than 32.
    """

    # What the student learns to answer: "gt", the data's equations | "llm", those of the teacher.
    labels: str = "gt"
    prompt_length: int = 344
    label_length: int = 32

    def records(self, split):
        records = svamp(self.existing(), self.labels)[split]
        return [
            (record["input"], record["label"], record["rationale"])
            for record in records
        ]

    def correct(self, tokens: np.ndarray) -> np.ndarray:
        """Whether the answer to each test problem has the value of the data's equation.

        Args:
            tokens: int [B T], T = prompt_length + label_length.

        Returns:
            bool [B].
        """
        width = self.prompt_length
        wanted = self._test_labels()
        correct = []
        for sample in np.asarray(tokens, np.int32):
            label = wanted[sample[:width].tobytes()]
            answer = sample[width:]
            if self.codec.eos in answer:
                answer = answer[: np.argmax(answer == self.codec.eos)]
            correct.append(same_value(self.codec.decode(answer), label))
        return np.array(correct)

    def _test_labels(self) -> dict[bytes, str]:
        """Padded prompt of each test problem, as bytes -> its label.

        The padding belongs to the key, since its token may be a token of the text.
        """
        documents = []
        labels = []
        for problem, label, _ in self.records("test"):
            prompt = self.prompt_tokens(self.predict_prefix + problem)
            if len(prompt) <= self.prompt_length:
                documents.append((prompt, np.int32([])))
                labels.append(label)
        width = self.prompt_length
        prompts = pad_documents(documents, width, width, self.codec.pad)["prompt"]
        return {prompt.tobytes(): label for prompt, label in zip(prompts, labels)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums(InMemory):
    """Sums of 4 digits modulo 10, with the partial sums as rationale: "3729" -> "1", "021".

    A sample is a prefix, the digits and "=", followed by the answer or, in explain_tokens, the
    rationale, and the end token. Ids 0-9 are the digits, 10 asks for the answer, 11 for the
    rationale, 12 is "=", 13 ends and 14 pads. 1,000 lists of digits are held out.
    """

    size: int = 400  # training lists
    wrong: float = 0.03  # share of the training rationales where one digit is wrong
    # Whether the rationale stands before the answer, in one document: the single-task baseline.
    joined: bool = False

    vocab = 15
    predict = 10
    explain = 11
    equals = 12
    eos = 13
    pad = 14

    @property
    def vocab_size(self):
        return self.vocab

    def arrays(self, split):
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(10_000)
        numbers = (
            order[:1000] if split == "test" else order[1000 : 1000 + self.size]
        )
        lists = numbers[:, None] // np.array([1000, 100, 10, 1]) % 10
        steps = lists.cumsum(1)[:, 1:] % 10
        answer = steps[:, -1:]
        told = steps.copy()
        if split == "train":
            wrong = np.flatnonzero(rng.random(len(lists)) < self.wrong)
            place = rng.integers(0, 3, len(wrong))
            told[wrong, place] = (
                told[wrong, place] + rng.integers(1, 10, len(wrong))
            ) % 10
        target = np.concatenate([told, answer], 1) if self.joined else answer
        predict = self._documents(self.predict, lists, target)
        explain = self._documents(self.explain, lists, told)
        return with_explanations(predict, explain)

    def _documents(
        self, prefix: int, lists: np.ndarray, targets: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The padded arrays of prompts with these targets."""
        documents = []
        for digits, target in zip(lists, targets):
            prompt = np.int32([prefix, *digits, self.equals])
            documents.append((prompt, np.int32([*target, self.eos])))
        return pad_documents(documents, 6, 7 + targets.shape[1], self.pad)

    def correct(self, tokens: Array) -> Array:
        """Whether each sample [... T] ends in the right answer and the end token: bool [...]."""
        right = tokens[..., 1:5].sum(-1) % 10
        return (tokens[..., -2] == right) & (tokens[..., -1] == self.eos)
