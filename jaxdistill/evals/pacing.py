"""Monitors of students that are taught by pass rates: forgetting, and the gradients' agreement."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxdistill.core.net import Net
from jaxdistill.core.sharding import gathered
from jaxdistill.core.step import bind
from jaxdistill.core.types import Batch, Ctx, Nets, Params, Refused
from jaxdistill.data.abilities import ChecksAnswers
from jaxdistill.data.base import Dataset
from jaxdistill.evals.base import Trained
from jaxdistill.evals.text import Models, TextEval


@runtime_checkable
class MeasuresPassRates(Protocol):
    """A method that teaches problems by the student's pass rates."""

    def measure(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch with pass rates."""

    def is_on_policy(self, step: int) -> bool:
        """Whether the student learns from its own responses at a step."""

    def rollout(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch with the student's own responses."""

    def snr(
        self, nets: Mapping[str, Net], params: Any, batch: Batch, bins: int
    ) -> tuple:
        """(signal-to-noise ratio of the gradients by pass rate [bins], ...)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacedEval(TextEval):
    """`TextEval` with two monitors of PACED (arXiv:2603.11178) in the student's row.

    On the data set `general`:
      general_perplexity
      general_accuracy    where that data set can tell right answers.
      forgetting          nats per token that the student has lost there since its first weights.
      accuracy_lost       accuracy of the first weights minus the student's.
    A student that began with random weights has nothing to forget, and lacks the last two.

    On `problems` training problems:
      snr_0, snr_1, ...   signal-to-noise ratio of their gradients by pass rate, in `bins` equal
                          parts of [0, 1]. Parts with fewer than two problems are left out.
    """

    # Data set in the student's tokens whose held-out samples the student should not forget.
    general: Dataset | None = None
    # training problems that the student's last stage is asked about; 0: none
    problems: int = 0
    bins: int = 5

    def check(self, data):
        super().check(data)
        if self.general is None:
            return
        super().check(self.general)
        self.general.check()
        general = self.general.vocab_size
        own = data.vocab_size
        if general is not None and own is not None and general > own:
            raise Refused(
                f"evaluation.general: {general} tokens, the training data has {own}; "
                "expected the same tokens"
            )

    def table(self, roles, data):
        more: tuple[str, ...] = ()
        if self.general is not None:
            more += (
                "general_perplexity",
                "general_accuracy",
                "forgetting",
                "accuracy_lost",
            )
        if self.problems > 0:
            more += ("snr_*",)
        table = super().table(roles, data)
        for label in table:
            if label.startswith("student@"):
                table[label] += more
        return table

    def rows(self, trained):
        rows = super().rows(trained)
        for row in rows:
            if row["name"] == "student":
                row |= self.remembered(trained) | self.agreement(trained)
        return rows

    def remembered(self, trained: Trained) -> dict[str, float]:
        """The student's metrics on the general data, and what it has lost there."""
        if self.general is None:
            return {}
        now = self._general(trained.nets["student"], trained.params["student"])
        row = {
            f"general_{name}": now[name]
            for name in ("perplexity", "accuracy")
            if name in now
        }
        first = first_weights(trained)
        if first is None:
            return row
        before = self._general(*first)
        row["forgetting"] = math.log(now["perplexity"] / before["perplexity"])
        if "accuracy" in now:
            row["accuracy_lost"] = before["accuracy"] - now["accuracy"]
        return row

    def _general(self, net: Net, params: Params) -> dict[str, float]:
        """The metrics of a network on the general data."""
        if not isinstance(self.general, ChecksAnswers):
            # Without its configuration a network is not asked to write.
            net = dataclasses.replace(net, config=None)
        models = Models({"student": net}, {"student": params}, self.general)
        return self.scores(models, "student", self.general.evaluation(self.samples))

    def agreement(self, trained: Trained) -> dict[str, float]:
        """Signal-to-noise ratio by pass rate, on responses as the last stage learns from them."""
        if not self.problems:
            return {}
        experiment = trained.experiment
        method = experiment.method.stages(experiment.settings.steps)[-1].method
        if not isinstance(method, MeasuresPassRates):
            raise Refused(
                f"evaluation.problems={self.problems}: {type(method).__name__} has no pass rates, "
                "expected 0"
            )
        made = jax.jit(functools.partial(_measured, method, trained.nets))
        batches = experiment.data.loader()
        key = jax.random.key(self.seed)
        parts = []
        for i in range(math.ceil(self.problems / experiment.data.batch_size)):
            batch = made(trained.params, next(batches), jax.random.fold_in(key, i))
            parts.append(gathered(batch))
        problems = {}
        for name in parts[0]:
            problems[name] = np.concatenate([part[name] for part in parts])[
                : self.problems
            ]

        @jax.jit
        def probe(params, batch):
            return method.snr(trained.nets, params, batch, self.bins)[0]

        found = gathered(probe(trained.params, problems))
        return {
            f"snr_{i}": float(value)
            for i, value in enumerate(found)
            if np.isfinite(value)
        }


def _measured(
    method: MeasuresPassRates,
    nets: Mapping[str, Net],
    params: Any,
    batch: Any,
    key: Any,
) -> Any:
    """The batch with pass rates.

    It has the student's own responses where the stage learns from these.
    """
    ctx = Ctx(batch, key, np.int32(0), {})
    made = method.measure(bind(nets, params), ctx)
    if not method.is_on_policy(0):
        return made
    return method.rollout(bind(nets, params), dataclasses.replace(ctx, batch=made))


def first_weights(trained: Trained) -> tuple[Net, Params] | None:
    """(network, weights) of the student before its first step; None where they were random."""
    experiment = trained.experiment
    net = trained.nets["student"]
    given = experiment.warm_starts()
    for role in ("student", net.adapts, experiment.source("student")):
        if role in given:
            return trained.nets[role], given[role]
    return None
