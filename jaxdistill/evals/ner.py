"""Scores of named entities: counts pooled over all questions (arXiv:2308.03279)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxdistill.data.abilities import ListsEntities
from jaxdistill.evals.text import TextEval

# Of the paper's code, against division by 0: a perfect score is 1 - O(1e-10).
TINY = 1e-10


def strict_f1(
    wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Micro-averaged precision, recall and f1 of exactly equal entities.

    Args:
        wanted: the right entities of each question; duplicates count once.
        found: the entities of each answer.
    """
    hits = 0
    of_found = 0
    of_wanted = 0
    for w, f in zip(wanted, found, strict=True):
        hits += len(set(w) & set(f))
        of_found += len(set(f))
        of_wanted += len(set(w))
    return _scores(hits, of_found, of_wanted)


def partial_f1(
    wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]]
) -> dict[str, float]:
    """`strict_f1` where entities that share a word count as half a hit.

    Equal entities are matched first; then each entity that is left in the answer with at most one
    of those that are left in the question.
    """
    hits = 0.0
    of_found = 0
    of_wanted = 0
    for w, f in zip(wanted, found, strict=True):
        w = list(dict.fromkeys(w))
        f = list(dict.fromkeys(f))
        of_found += len(f)
        of_wanted += len(w)
        missed = [entity for entity in w if entity not in f]
        hits += len(w) - len(missed)
        for entity in f:
            if entity in w:
                continue
            words = set(entity.split())
            match = next(
                (other for other in missed if words & set(other.split())), None
            )
            if match is not None:
                missed.remove(match)
                hits += 0.5
    return _scores(hits, of_found, of_wanted)


def _scores(hits: float, found: int, wanted: int) -> dict[str, float]:
    """Precision, recall and f1 from counts."""
    precision = hits / (found + TINY)
    recall = hits / (wanted + TINY)
    f1 = 2 * precision * recall / (precision + recall + TINY)
    return {"precision": precision, "recall": recall, "f1": f1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NerEval(TextEval):
    """`TextEval` with `strict_f1` of the answers, for data that asks for lists of entities."""

    needs = (ListsEntities,)
    metrics = (*TextEval.metrics, "precision", "recall", "f1")

    def scores(self, models, role, held_out):
        own, _ = self.continuations(models, role, held_out)
        wanted = models.data.gold(own["tokens"])
        found = models.data.answers(own["tokens"])
        return {
            **super().scores(models, role, held_out),
            **strict_f1(wanted, found),
        }
