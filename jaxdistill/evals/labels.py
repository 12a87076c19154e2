"""Evaluation of classifiers on held-out samples."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from jaxdistill.evals.base import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelEval(Evaluation):
    """Rows for teacher and student: `accuracy`, and the mean squared error of the softmax from the
    label's (`brier`).
    """

    samples: int = 10_000

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "brier")

    def table(self, roles, data):
        return {f"{role}@1": self.metrics for role in ("teacher", "student") if role in roles}

    def rows(self, trained) -> list[dict[str, Any]]:
        """[{"name", "nfe", metric: value, ...}]"""
        held = trained.experiment.data.evaluation(self.samples)
        rows = []
        for role in ("teacher", "student"):
            if role in trained.params:
                law = np.asarray(
                    jax.nn.softmax(
                        jax.jit(trained.nets[role].apply)(trained.params[role], held["x"])
                    )
                )
                error = np.mean((law - np.eye(law.shape[-1])[held["cond"]]) ** 2)
                rows.append(
                    {
                        "name": role,
                        "nfe": 1,
                        "accuracy": float(np.mean(law.argmax(-1) == held["cond"])),
                        "brier": float(error),
                    }
                )
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLabelEval(LabelEval):
    """Of classifiers of text: `accuracy`, and that of each domain of the held-out texts
    (`accuracy_0`, `accuracy_1`, ...).
    """

    samples: int = 2000

    metrics = ("accuracy", "accuracy_*")

    def rows(self, trained):
        held = trained.experiment.data.evaluation(self.samples)
        rows = []
        for role in ("teacher", "student"):
            if role in trained.params:
                run = jax.jit(
                    lambda params, tokens, mask, net=trained.nets[role]: net.apply(
                        params, tokens, mask=mask
                    )
                )
                right = (
                    np.asarray(run(trained.params[role], held["tokens"], held["mask"])).argmax(-1)
                    == held["label"]
                )
                each = {
                    f"accuracy_{d}": float(np.mean(right[held["domain"] == d]))
                    for d in np.unique(held["domain"])
                }
                rows.append({"name": role, "nfe": 1, "accuracy": float(np.mean(right)), **each})
        return rows
