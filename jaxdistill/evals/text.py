"""Evaluation of language models on held-out text and on their own continuations."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from jaxdistill.core.net import Net
from jaxdistill.core.sharding import gathered
from jaxdistill.core.types import Params, Refused
from jaxdistill.data.abilities import (
    ChecksAnswers,
    HasTokenizer,
    WritesText,
    text_end,
)
from jaxdistill.data.base import Dataset
from jaxdistill.evals.base import Evaluation, Trained, judged
from jaxdistill.evals.language import perplexity, token_kl, top1_agreement
from jaxdistill.models.language.lm import common_vocabulary, context, targets
from jaxdistill.objectives.divergence import ReverseKL, cross_entropy, masked_sum
from jaxdistill.samplers.text import generate

Samples = dict[str, np.ndarray]  # arrays [B ...] under the keys of a batch


@runtime_checkable
class Layered(Protocol):
    """The configuration of a model of layers, whose keys and values can be cached.

    Exact teachers have none, and so write no text.
    """

    depth: int


@dataclasses.dataclass(frozen=True)
class Models:
    """The networks that a table row is computed from, and the data set that they are judged on."""

    nets: Mapping[str, Net]
    params: Mapping[str, Params]
    data: Dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEval(Evaluation):
    """Teacher and student on held-out text and on their own continuations.

    The metrics of a row:
      perplexity          of the held-out targets.
      kl, reverse_kl      divergence from the teacher on these targets, in both directions.
      agreement           share of these targets where the most likely token is the teacher's.
      rollout_kl, rollout_reverse_kl   the divergences on the student's own continuations; the
                          difference from those on held-out text is the exposure gap.
      accuracy            share of greedy answers that are right, where the data set can tell.
      tokens_per_second   of writing continuations.

    A teacher with its own tokenizer (data.two_tokenizers) is scored on its own tokens, with the
    perplexity per token of the student. Its distribution is not compared with the student's.
    """

    samples: int = 512
    batch: int = 128
    # Tokens of a prompt, where the data has no prompts of its own. Of texts that are not longer,
    # all but the last token are the prompt.
    prompt_length: int = 16
    seed: int = 0

    metrics: ClassVar[tuple[str, ...]] = (
        "perplexity",
        "kl",
        "agreement",
        "reverse_kl",
        "rollout_kl",
        "rollout_reverse_kl",
        "accuracy",
        "tokens_per_second",
    )

    def check(self, data):
        super().check(data)
        first = data.one_sample()
        if "tokens" not in first:
            raise Refused(
                f"evaluation: {type(self).__name__} needs `tokens`, the data has {', '.join(first)}"
            )

    def table(self, roles, data):
        return {f"{role}@1": self.metrics for role in judged(roles)}

    def rows(self, trained: Trained) -> list[dict[str, Any]]:
        """The table; `nfe` counts evaluations per token."""
        models = Models(trained.nets, trained.params, trained.experiment.data)
        held_out = models.data.evaluation(self.samples)
        rows = []
        for role in judged(trained.params):
            rows.append(
                {"name": role, "nfe": 1, **self.scores(models, role, held_out)}
            )
        return rows

    def scores(
        self, models: Models, role: str, held_out: Samples
    ) -> dict[str, float]:
        """The metrics of one network on held-out samples."""
        compared = "teacher" in models.params and "teacher_tokens" not in held_out
        count = held_out["mask"][:, 1:].sum()
        if role == "teacher" and not compared:
            held_out = _teachers(held_out)
        score = _scorer(models, role, compared)
        sums = _total(score, models.params, held_out, self.batch)
        nll, _ = sums.pop("nll")
        row = {"perplexity": perplexity(nll, count)}
        row |= {name: total / n for name, (total, n) in sums.items()}
        if not isinstance(models.nets[role].config, Layered):
            return row
        own, speed = self.continuations(models, role, held_out)
        if compared and role == "student":
            sums = _total(score, models.params, own, self.batch)
            for name in ("kl", "reverse_kl"):
                total, n = sums[name]
                row[f"rollout_{name}"] = total / n
        if isinstance(models.data, ChecksAnswers):
            row["accuracy"] = float(np.mean(models.data.correct(own["tokens"])))
        row["tokens_per_second"] = speed
        return row

    def write(
        self, trained: Trained, role: str, held_out: Samples
    ) -> tuple[Samples, float]:
        """`continuations` of one network of a run."""
        models = Models(trained.nets, trained.params, trained.experiment.data)
        return self.continuations(models, role, held_out)

    def continuations(
        self, models: Models, role: str, held_out: Samples
    ) -> tuple[Samples, float]:
        """What a network writes after the prompts of held-out samples.

        It writes the most likely tokens where answers are checked, else it samples.

        Returns:
            tokens int [B T], with a mask float32 [B T] on what the network wrote; and the tokens
            written per second, after compilation.
        """
        net = models.nets[role]
        length = held_out["tokens"].shape[1]
        eos, pad = text_end(models.data)
        prompts = held_out.get("prompt")
        if prompts is None:
            prompts = held_out["tokens"][:, : min(self.prompt_length, length - 1)]
        masks = held_out.get("prompt_mask", np.ones(prompts.shape, bool))
        temperature = 0.0 if isinstance(models.data, ChecksAnswers) else 1.0
        # Ids that not every network has are never written, where both read the same tokens.
        same = "teacher_tokens" not in models.data.spec()
        vocab = common_vocabulary(models.nets) if same else 0

        @jax.jit
        def run(params, prompt, mask, i):
            key = jax.random.fold_in(jax.random.key(self.seed), i)
            bound = functools.partial(net.apply, params)
            return generate(
                bound,
                prompt,
                length,
                key,
                prompt_mask=mask,
                temperature=temperature,
                eos=eos,
                pad=pad,
                vocab=vocab,
            )

        tokens = []
        written = []
        seconds = 0.0
        made = 0
        for i, low in enumerate(range(0, len(prompts), self.batch)):
            prompt = prompts[low : low + self.batch]
            mask = masks[low : low + self.batch]
            started = time.perf_counter()
            out, valid = jax.block_until_ready(
                run(models.params[role], prompt, mask, np.int32(i))
            )
            # The first batch includes compilation; it counts where it is the only one.
            if i or len(prompts) <= self.batch:
                seconds = seconds + time.perf_counter() - started
                made = made + out[:, prompts.shape[1] :].size
            tokens.append(gathered(out))
            written.append(gathered(valid))
        after_prompt = np.arange(length) >= prompts.shape[1]
        mask = np.concatenate(written).astype(np.float32) * after_prompt
        return {"tokens": np.concatenate(tokens), "mask": mask}, made / seconds

    def texts(self, trained: Trained, n: int = 4) -> dict[str, list[str]]:
        """Role -> the texts of what it writes after the first `n` held-out prompts."""
        data = trained.experiment.data
        held_out = data.evaluation(n)
        decode = _decoder(data)
        roles = (
            ("student",) if "teacher_tokens" in held_out else judged(trained.params)
        )
        found = {}
        for role in roles:
            if role in trained.params and isinstance(
                trained.nets[role].config, Layered
            ):
                own, _ = self.write(trained, role, held_out)
                found[role] = [decode(tokens) for tokens in own["tokens"]]
        return found


def _decoder(data: Dataset) -> Callable[[np.ndarray], str]:
    """The function from the tokens of a sample [T] to text; to their ids where nothing decodes."""
    if isinstance(data, WritesText):
        return data.text
    if isinstance(data, HasTokenizer):
        return data.codec.decode
    return lambda tokens: " ".join(map(str, tokens))


def _teachers(samples: Samples) -> Samples:
    """The arrays of the teacher's side, under the names of the student's."""
    prefix = "teacher_"
    return {
        k.removeprefix(prefix): v
        for k, v in samples.items()
        if k.startswith(prefix)
    }


def _scorer(models: Models, role: str, compared: bool) -> Callable:
    """A jitted function (weights by role, batch) -> metric -> (sum, number of targets).

    `compared`: whether the network is compared with the teacher.
    """
    nets = models.nets

    @jax.jit
    def score(params, batch):
        labels, mask = targets(batch)
        where = context(batch)
        logits = nets[role].apply(params[role], batch["tokens"], **where)
        sums = {"nll": masked_sum(cross_entropy(logits, labels), mask)}
        if compared:
            teacher = nets["teacher"].apply(
                params["teacher"], batch["tokens"], **where
            )
            sums["kl"] = token_kl(teacher, logits, mask)
            sums["agreement"] = top1_agreement(teacher, logits, mask)
            sums["reverse_kl"] = token_kl(teacher, logits, mask, ReverseKL())
        return sums

    return score


def _total(
    score: Callable, params: Mapping[str, Params], samples: Samples, batch: int
) -> dict[str, tuple[float, float]]:
    """Sums and counts of `score` over all samples, `batch` at a time."""
    totals: dict[str, np.ndarray] = {}
    for low in range(0, len(samples["tokens"]), batch):
        part = {k: v[low : low + batch] for k, v in samples.items()}
        for name, pair in gathered(score(params, part)).items():
            totals[name] = totals.get(name, 0.0) + np.array(pair, np.float64)
    return {
        name: (float(total), float(count))
        for name, (total, count) in totals.items()
    }
