"""Evaluation of language models domain by domain."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data.abilities import HasDomains
from jaxdistill.evals.base import Evaluation, Trained, judged
from jaxdistill.evals.language import perplexity
from jaxdistill.models.language.lm import context, targets
from jaxdistill.objectives.divergence import cross_entropy, masked_sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainEval(Evaluation):
    """Held-out perplexity of teacher and student on each domain and over all.

    Where there is a teacher, also the largest and the mean ratio to its perplexities, `max_ratio`
    and `mean_ratio`.
    """

    samples: int = 1000
    batch: int = 100

    needs = (HasDomains,)

    def table(self, roles, data):
        each = tuple(f"perplexity_{name}" for name in data.parts)
        metrics = ("perplexity", "max_ratio", "mean_ratio", *each)
        return {f"{role}@1": metrics for role in judged(roles)}

    def rows(self, trained: Trained) -> list[dict[str, Any]]:
        """The table; `nfe` counts evaluations per token."""
        data = trained.experiment.data
        held_out = data.evaluation(self.samples)
        names = list(data.parts)
        sums = {}
        for role in judged(trained.params):
            sums[role] = self.tally(trained, role, held_out, len(names))
        rows = []
        for role, (nll, count) in sums.items():
            each = _perplexities(nll, count)
            row = {
                "name": role,
                "nfe": 1,
                "perplexity": perplexity(nll.sum(), count.sum()),
            }
            row |= {
                f"perplexity_{name}": float(value)
                for name, value in zip(names, each)
            }
            if "teacher" in sums:
                ratio = each / _perplexities(*sums["teacher"])
                row |= {
                    "max_ratio": float(ratio.max()),
                    "mean_ratio": float(ratio.mean()),
                }
            rows.append(row)
        return rows

    def tally(
        self,
        trained: Trained,
        role: str,
        held_out: dict[str, np.ndarray],
        domains: int,
    ) -> np.ndarray:
        """Sums of -log q and numbers of target tokens of every domain: [2 domains]."""

        @jax.jit
        def score(params, batch):
            net = functools.partial(trained.nets[role].apply, params)
            labels, mask = targets(batch)
            nll = cross_entropy(net(batch["tokens"], **context(batch)), labels)
            sums = []
            for domain in range(domains):
                inside = (batch["domain"] == domain)[:, None]
                sums.append(masked_sum(nll, mask & inside))
            return jnp.array(sums).T

        total = 0
        for low in range(0, len(held_out["tokens"]), self.batch):
            part = {
                k: jnp.asarray(v[low : low + self.batch])
                for k, v in held_out.items()
            }
            total = total + np.asarray(
                score(trained.params[role], part), np.float64
            )
        return total


def _perplexities(nll: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The perplexity of each domain."""
    return np.array([perplexity(*pair) for pair in zip(nll, count)])
