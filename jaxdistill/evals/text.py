"""Evaluation of language models on held-out text and on what they write themselves."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, ClassVar

import jax
import numpy as np

from jaxdistill.core.sharding import gathered
from jaxdistill.core.types import Refused
from jaxdistill.evals.base import Evaluation
from jaxdistill.evals.language import perplexity, token_kl, top1_agreement
from jaxdistill.models.language.lm import common_vocabulary, context, targets
from jaxdistill.objectives.divergence import cross_entropy, masked_sum
from jaxdistill.samplers.text import generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEval(Evaluation):
    """Rows for teacher and student: perplexity of held-out targets; KL to the teacher on them and
    on the student's own continuations (their difference is the exposure gap), in both directions;
    share of greedy answers that are right, where the data set can tell (`data.correct`). A teacher
    with a tokenizer of its own (data.two_tokenizers) is scored on its own tokens, its perplexity
    per token of the student's; laws are then not compared.
    """

    samples: int = 512
    batch: int = 128
    # of the continuations, where the data has no prompts of its own; of shorter rows all but a
    # token
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
        if "tokens" not in data.one_sample():
            raise Refused(
                f"evaluation: {type(self).__name__} needs `tokens`, the data has {', '.join(data.one_sample())}"
            )

    def table(self, roles, data):
        return {f"{role}@1": self.metrics for role in ("teacher", "student") if role in roles}

    def rows(self, trained) -> list[dict[str, Any]]:
        """[{"name", "nfe" (per token), metric: value, ...}]"""
        roles = [role for role in ("teacher", "student") if role in trained.params]
        held = trained.experiment.data.evaluation(self.samples)
        return [{"name": role, "nfe": 1, **self._row(trained, role, held)} for role in roles]

    def _row(self, trained, role: str, held: dict[str, np.ndarray]) -> dict[str, float]:
        nets = trained.nets
        params = trained.params
        data = trained.experiment.data
        has_teacher = "teacher" in params and "teacher_tokens" not in held
        number = held["mask"][:, 1:].sum()
        if role == "teacher" and not has_teacher:
            held = {
                k.removeprefix("teacher_"): v for k, v in held.items() if k.startswith("teacher_")
            }

        @jax.jit
        def score(params, batch):
            bound = {
                r: functools.partial(nets[r].apply, params[r])
                for r in (role, *(["teacher"] if has_teacher else []))
            }
            (labels, mask), where = targets(batch), context(batch)
            logits = bound[role](batch["tokens"], **where)
            sums = {"nll": masked_sum(cross_entropy(logits, labels), mask)}
            if has_teacher:
                teacher = bound["teacher"](batch["tokens"], **where)
                sums |= {
                    "kl": token_kl(teacher, logits, mask),
                    "agreement": top1_agreement(teacher, logits, mask),
                }
                sums["reverse_kl"] = token_kl(teacher, logits, mask, "reverse_kl")
            return sums

        held_out = _total(score, params, held, self.batch)
        row = {"perplexity": perplexity(held_out.pop("nll")[0], number)}
        row |= {name: total / count for name, (total, count) in held_out.items()}
        if hasattr(nets[role].config, "depth"):  # an exact law has no cache to write with
            own, speed = self.write(trained, role, held)
            if has_teacher and role == "student":
                mine = _total(score, params, own, self.batch)
                row |= {
                    f"rollout_{name}": mine[name][0] / mine[name][1]
                    for name in ("kl", "reverse_kl")
                }
            if hasattr(data, "correct"):
                row["accuracy"] = float(np.mean(data.correct(own["tokens"])))
            row["tokens_per_second"] = speed
        return row

    def write(
        self, trained, role: str, held: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], float]:
        """(tokens with a mask on what was written, tokens per second): greedy where answers are
        checked, else sampled.
        """
        net = trained.nets[role]
        data = trained.experiment.data
        length = held["tokens"].shape[1]
        eos = getattr(data, "eos", ())
        prompts = (
            held["prompt"]
            if "prompt" in held
            else held["tokens"][:, : min(self.prompt_length, length - 1)]
        )
        masks = held.get("prompt_mask", np.ones(prompts.shape, bool))
        temperature = 0.0 if hasattr(data, "correct") else 1.0
        vocab = 0 if "teacher_tokens" in data.spec() else common_vocabulary(trained.nets)

        @jax.jit
        def run(params, prompt, mask, i):
            key = jax.random.fold_in(jax.random.key(self.seed), i)
            bound = functools.partial(net.apply, params)
            how = dict(temperature=temperature, eos=eos, pad=getattr(data, "pad", 0), vocab=vocab)
            return generate(bound, prompt, length, key, prompt_mask=mask, **how)

        tokens = []
        alive = []
        seconds = 0.0
        made = 0
        for i, low in enumerate(range(0, len(prompts), self.batch)):
            part = (prompts[low : low + self.batch], masks[low : low + self.batch])
            started = time.perf_counter()
            out, valid = jax.block_until_ready(run(trained.params[role], *part, np.int32(i)))
            if i or len(prompts) <= self.batch:
                seconds = seconds + time.perf_counter() - started
                made = made + out[:, prompts.shape[1] :].size
            tokens.append(gathered(out))
            alive.append(gathered(valid))
        mask = np.concatenate(alive).astype(np.float32) * (np.arange(length) >= prompts.shape[1])
        return {"tokens": np.concatenate(tokens), "mask": mask}, made / seconds

    def texts(self, trained, n: int = 4) -> dict[str, list[str]]:
        """role -> what it writes after the first held-out prompts, where the data set can decode
        tokens.
        """
        data = trained.experiment.data
        held = data.evaluation(n)
        decode = (
            data.text
            if hasattr(data, "text")
            else data.codec.decode
            if hasattr(data, "codec")
            else lambda row: " ".join(map(str, row))
        )
        who = ("student",) if "teacher_tokens" in held else ("teacher", "student")
        roles = [r for r in who if r in trained.params and hasattr(trained.nets[r].config, "depth")]
        return {
            role: [decode(row) for row in self.write(trained, role, held)[0]["tokens"]]
            for role in roles
        }


def _total(
    score, params, rows: dict[str, np.ndarray], batch: int
) -> dict[str, tuple[float, float]]:
    """Sums and counts over all rows, `batch` at a time."""
    totals: dict[str, np.ndarray] = {}
    for low in range(0, len(rows["tokens"]), batch):
        part = {k: v[low : low + batch] for k, v in rows.items()}
        for name, pair in gathered(score(params, part)).items():
            totals[name] = totals.get(name, 0.0) + np.array(pair, np.float64)
    return {name: (float(total), float(count)) for name, (total, count) in totals.items()}
