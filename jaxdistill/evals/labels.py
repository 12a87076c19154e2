"""Evaluation of classifiers on held-out samples."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from jaxdistill.evals.base import Evaluation, Trained, judged


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelEval(Evaluation):
    """Accuracy of teacher and student, and `brier`: their probabilities' mean squared error."""

    samples: int = 10_000

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "brier")

    def table(self, roles, data):
        return {f"{role}@1": self.metrics for role in judged(roles)}

    def rows(self, trained: Trained) -> list[dict[str, Any]]:
        held_out = trained.experiment.data.evaluation(self.samples)
        return [
            {"name": role, "nfe": 1, **self.scores(trained, role, held_out)}
            for role in judged(trained.params)
        ]

    def scores(
        self, trained: Trained, role: str, held_out: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """The metrics of one network."""
        classify = jax.jit(trained.nets[role].apply)
        logits = classify(trained.params[role], held_out["x"])
        probs = np.asarray(jax.nn.softmax(logits))
        label = held_out["cond"]
        one_hot = np.eye(probs.shape[-1])[label]
        return {
            "accuracy": float(np.mean(probs.argmax(-1) == label)),
            "brier": float(np.mean((probs - one_hot) ** 2)),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLabelEval(LabelEval):
    """Accuracy of classifiers of text, over all and of each domain: `accuracy_0`, ..."""

    samples: int = 2000

    metrics = ("accuracy", "accuracy_*")

    def scores(self, trained, role, held_out):
        net = trained.nets[role]

        @jax.jit
        def classify(params, tokens, mask):
            return net.apply(params, tokens, mask=mask)

        logits = classify(
            trained.params[role], held_out["tokens"], held_out["mask"]
        )
        correct = np.asarray(logits).argmax(-1) == held_out["label"]
        scores = {"accuracy": float(np.mean(correct))}
        for domain in np.unique(held_out["domain"]):
            mine = held_out["domain"] == domain
            scores[f"accuracy_{domain}"] = float(np.mean(correct[mine]))
        return scores
