"""What students that are taught by pass rates are watched for: what they forget, and how far their
problems' gradients agree.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from jaxdistill.core.sharding import gathered
from jaxdistill.core.step import bind
from jaxdistill.core.types import Batch, Ctx, Refused
from jaxdistill.data.base import Dataset
from jaxdistill.evals.text import TextEval


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacedEval(TextEval):
    """`TextEval` with two monitors of PACED (arXiv:2603.11178) in the student's row.

    Of `general`: general_perplexity; forgetting, nats a token that the student has lost there since
    its first weights; and where that data set can tell right answers, general_accuracy and
    accuracy_lost, that of the first weights minus it. A student that began with random weights has
    nothing to forget, hence only the first of each. Of `problems`: snr_0, snr_1, ..., signal to
    noise of the gradients of training problems by pass rate, in `bins` equal parts of [0, 1]; parts
    with fewer than two problems are left out.
    """

    # spec(...) of a data set in the student's tokens, whose held-out samples it should not forget
    general: Any = None
    problems: int = 0  # training problems that the student's last stage is asked about; 0: none
    bins: int = 5

    def __post_init__(self):
        if self.problems < 0 or self.bins < 1:
            raise Refused(
                f"evaluation.problems={self.problems}, bins={self.bins}: expected at least 0 and 1"
            )
        if self.general is not None and not isinstance(self.general, Dataset):
            raise Refused(f"evaluation.general={type(self.general).__name__}: expected a data set")

    def check(self, data):
        super().check(data)
        if self.general is None:
            return
        super().check(self.general)
        self.general.check()
        sizes = self.general.vocab_size, data.vocab_size
        if None not in sizes and sizes[0] > sizes[1]:
            raise Refused(
                f"evaluation.general: {sizes[0]} tokens, the training data has {sizes[1]}; expected the same tokens"
            )

    def table(self, roles, data):
        own = ("general_perplexity", "general_accuracy", "forgetting", "accuracy_lost") * (
            self.general is not None
        )
        own += ("snr_*",) * (self.problems > 0)
        given = super().table(roles, data)
        return {
            label: names + own if label.startswith("student@") else names
            for label, names in given.items()
        }

    def rows(self, trained):
        rows = super().rows(trained)
        for row in rows:
            if row["name"] == "student":
                row |= self.remembered(trained) | self.agreement(trained)
        return rows

    def remembered(self, trained) -> dict[str, float]:
        """The student's figures on the general data, and what it has lost there."""
        if self.general is None:
            return {}
        now = self._general(trained.nets["student"], trained.params["student"])
        row = {f"general_{name}": now[name] for name in ("perplexity", "accuracy") if name in now}
        first = first_weights(trained)
        if first is None:
            return row
        before = self._general(*first)
        row["forgetting"] = math.log(now["perplexity"] / before["perplexity"])
        if "accuracy" in now:
            row["accuracy_lost"] = before["accuracy"] - now["accuracy"]
        return row

    def _general(self, net, params) -> dict[str, float]:
        if not hasattr(self.general, "correct"):
            net = dataclasses.replace(
                net, config=None
            )  # a network of no known kind is not asked to write
        view = SimpleNamespace(
            nets={"student": net},
            params={"student": params},
            experiment=SimpleNamespace(data=self.general),
        )
        return self._row(view, "student", self.general.evaluation(self.samples))

    def agreement(self, trained) -> dict[str, float]:
        """Signal to noise by pass rate, on responses of the kind that the last stage learns from."""
        if not self.problems:
            return {}
        method = trained.experiment.method.stages(trained.experiment.settings.steps)[-1].method
        if not hasattr(method, "snr"):
            raise Refused(
                f"evaluation.problems={self.problems}: {type(method).__name__} has no pass rates, expected 0"
            )
        made = jax.jit(functools.partial(_measured, method, trained.nets))
        batches = trained.experiment.data.loader()
        key = jax.random.key(self.seed)
        count = math.ceil(self.problems / trained.experiment.data.batch_size)
        parts = [
            gathered(made(trained.params, next(batches), jax.random.fold_in(key, i)))
            for i in range(count)
        ]
        problems = {
            name: np.concatenate([part[name] for part in parts])[: self.problems]
            for name in parts[0]
        }
        probe = jax.jit(lambda params, batch: method.snr(trained.nets, params, batch, self.bins)[0])
        found = gathered(probe(trained.params, problems))
        return {f"snr_{i}": float(value) for i, value in enumerate(found) if np.isfinite(value)}


def _measured(method: Any, nets: Any, params: Any, batch: Batch, key: jax.Array) -> Batch:
    """The batch with pass rates, and with the student's own responses where the stage learns from
    these.
    """
    ctx = Ctx(batch, key, np.int32(0), {})
    made = method.measure(bind(nets, params), ctx)
    if not method.is_on_policy(0):
        return made
    return method.rollout(bind(nets, params), dataclasses.replace(ctx, batch=made))


def first_weights(trained) -> tuple[Any, Any] | None:
    """(network, weights) of the student before its first step; None where they were random."""
    experiment = trained.experiment
    net = trained.nets["student"]
    given = experiment.warm_starts()
    role = next(
        (name for name in ("student", net.adapts, experiment.source("student")) if name in given),
        None,
    )
    return None if role is None else (trained.nets[role], given[role])
