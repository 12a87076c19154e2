"""Entities found against entities wanted: counts pooled over all questions (arXiv:2308.03279)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxdistill.evals.text import TextEval

TINY = 1e-10  # in the paper's code: a perfect score is 1 - O(1e-10), and that of nothing 0


def strict_f1(wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro precision, recall and f1 of exactly equal entities, one list for each question;
    duplicates count once.
    """
    pairs = [(set(w), set(f)) for w, f in zip(wanted, found, strict=True)]
    return _scores(
        sum(len(w & f) for w, f in pairs),
        sum(len(f) for _, f in pairs),
        sum(len(w) for w, _ in pairs),
    )


def partial_f1(wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """As `strict_f1`, and half a hit for what shares a word: each found entity with at most one
    wanted, equal ones first.
    """
    hits = 0.0
    of_found = 0
    of_wanted = 0
    for w, f in zip(wanted, found, strict=True):
        w = list(dict.fromkeys(w))
        f = list(dict.fromkeys(f))
        of_found = of_found + len(f)
        of_wanted = of_wanted + len(w)
        left = [e for e in w if e not in f]
        rest = [e for e in f if e not in w]
        hits += len(w) - len(left)
        for entity in rest:
            if match := next((e for e in left if set(e.split()) & set(entity.split())), None):
                left.remove(match)
                hits += 0.5
    return _scores(hits, of_found, of_wanted)


def _scores(hits: float, found: int, wanted: int) -> dict[str, float]:
    precision = hits / (found + TINY)
    recall = hits / (wanted + TINY)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + TINY),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class NerEval(TextEval):
    """A language model's rows with strict micro scores of its greedy answers, for data that knows
    `gold` and `answers`.
    """

    needs = ("gold", "answers")
    metrics = (*TextEval.metrics, "precision", "recall", "f1")

    def _row(self, trained, role: str, held) -> dict[str, Any]:
        own, _ = self.write(trained, role, held)
        data = trained.experiment.data
        return {
            **super()._row(trained, role, held),
            **strict_f1(data.gold(own["tokens"]), data.answers(own["tokens"])),
        }
