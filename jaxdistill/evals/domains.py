"""Evaluation of language models domain by domain."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.evals.base import Evaluation
from jaxdistill.evals.language import perplexity
from jaxdistill.models.language.lm import context, targets
from jaxdistill.objectives.divergence import cross_entropy, masked_sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainEval(Evaluation):
    """Rows for teacher and student on a `data.domains:Domains`: held-out perplexity of each domain
    and over all, and the largest and mean ratio to the teacher's (`max_ratio`, `mean_ratio`).
    """

    samples: int = 1000
    batch: int = 100

    needs = ("parts",)

    def table(self, roles, data):
        metrics = (
            "perplexity",
            "max_ratio",
            "mean_ratio",
            *(f"perplexity_{name}" for name in data.parts),
        )
        return {f"{role}@1": metrics for role in ("teacher", "student") if role in roles}

    def rows(self, trained) -> list[dict[str, Any]]:
        """[{"name", "nfe" (per token), metric: value, ...}]"""
        held = trained.experiment.data.evaluation(self.samples)
        names = list(trained.experiment.data.parts)
        sums = {
            role: self.tally(trained, role, held, len(names))
            for role in ("teacher", "student")
            if role in trained.params
        }
        rows = []
        for role, (nll, count) in sums.items():
            each = np.array([perplexity(*pair) for pair in zip(nll, count)])
            row = {"name": role, "nfe": 1, "perplexity": perplexity(nll.sum(), count.sum())}
            row |= {f"perplexity_{name}": float(value) for name, value in zip(names, each)}
            if "teacher" in sums:
                ratio = each / [perplexity(*pair) for pair in zip(*sums["teacher"])]
                row |= {"max_ratio": float(ratio.max()), "mean_ratio": float(ratio.mean())}
            rows.append(row)
        return rows

    def tally(self, trained, role: str, held: dict[str, np.ndarray], domains: int) -> np.ndarray:
        """(sums of -log q [N], numbers of target tokens [N]) of the domains."""

        @jax.jit
        def score(params, batch):
            call = functools.partial(trained.nets[role].apply, params)
            labels, mask = targets(batch)
            each = cross_entropy(call(batch["tokens"], **context(batch)), labels)
            mine = lambda i: masked_sum(each, mask & (batch["domain"] == i)[:, None])
            return jnp.array([mine(i) for i in range(domains)]).T

        parts = range(0, len(held["tokens"]), self.batch)
        take = lambda low: {k: jnp.asarray(v[low : low + self.batch]) for k, v in held.items()}
        return sum(np.asarray(score(trained.params[role], take(low)), np.float64) for low in parts)
