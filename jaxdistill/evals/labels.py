"""Evaluation of classifiers on held-out samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelEval:
    """Rows for teacher and student: `accuracy`, and the mean squared error of the softmax from the label's (`brier`)."""

    samples: int = 10_000

    def rows(self, trained) -> list[dict[str, Any]]:
        """[{"name", "nfe", metric: value, ...}]"""
        held, rows = trained.experiment.data.evaluation(self.samples), []
        for role in ("teacher", "student"):
            if role in trained.params:
                law = np.asarray(jax.nn.softmax(jax.jit(trained.nets[role].apply)(trained.params[role], held["x"])))
                error = np.mean((law - np.eye(law.shape[-1])[held["cond"]]) ** 2)
                rows.append({"name": role, "nfe": 1, "accuracy": float(np.mean(law.argmax(-1) == held["cond"])), "brier": float(error)})
        return rows

    def pictures(self, trained) -> dict[str, Any]:
        return {}
