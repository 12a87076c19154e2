"""GRPO - Group relative policy optimisation (DeepSeekMath, arXiv:2402.03300).

To each prompt the policy writes a group of responses, and a response is worth as much as its reward
stands above the group's mean, in the group's standard deviations: no value network. Policy updates
are PPO's, clipped in the ratio to the policy that wrote, with an estimate of the KL to a reference
policy in the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Params, Refused, Turn, lookup
from jaxdistill.methods.language._rollout import Writing, share, written
from jaxdistill.models.language.lm import common_vocabulary, same_vocabulary
from jaxdistill.objectives import policy
from jaxdistill.objectives.divergence import sequence_mean
from jaxdistill.objectives.reward import Exact


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(Writing):
    """A step takes data.batch_size prompts and moves the student once. The policy that writes, role
    `old`, is the student as it was after the last of every `updates` steps: these are the
    mini-batches of one large roll-out.
    """

    reward: Any = Exact()  # of objectives.reward
    group: int = 8  # responses to a prompt; the paper's 64
    updates: int = 1  # of the student before it becomes `old` again; the paper's 1
    clip_low: float = 0.2  # the ratio may fall to 1 - clip_low; 0.2 is PPO's
    clip_high: float = 0.2  # and rise to 1 + clip_high
    kl_weight: float = (
        0.04  # of the KL to the reference; the paper's 0.04; 0: no reference is loaded
    )
    kl_kind: str = "k3"  # k1 | k2 | k3: its estimator; the paper's k3
    # the groups' standard deviation is over group - ddof; 0: of the population, 1: of a sample, as
    # in TRL
    ddof: int = 0
    std_eps: float = 1e-6  # beside it in the advantage's denominator; TRL's 1e-4

    inits = {"student": None, "old": "student"}
    ema = ()
    anchor = "reference"  # the role that the KL is to
    greedy = False

    def __post_init__(self):
        super().__post_init__()
        lookup(policy.KL_ESTIMATORS, self.kl_kind, "method.kl_kind")
        if self.group < 2 or self.updates < 1:
            raise Refused(
                f"method.group={self.group}, method.updates={self.updates}: expected at least 2 and 1"
            )
        if self.ddof not in (0, 1) or not self.std_eps > 0:
            raise Refused(
                f"method.ddof={self.ddof}, method.std_eps={self.std_eps}: expected 0 or 1, and a number above 0"
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        return (self.anchor,) if self.kl_weight else ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss, gather=self.rollout, after=self.sync),)

    def check(self, nets, data) -> None:
        same_vocabulary(self, nets)

    def rollout(self, net: Nets, ctx: Ctx) -> Batch:
        """Groups of responses of the old policy; with them reward, failed, advantage [B] and every
        role's log-probs [B T-1].
        """
        batch = self.write(net.old, ctx, "write", self.group, common_vocabulary(net))
        score, failed = self.reward(batch)
        scored = {
            f"log_{role}": self.log_probs(getattr(net, role), batch)
            for role in ("old", *self.frozen)
        }
        advantage = policy.group_advantages(score, self.group, eps=self.std_eps, ddof=self.ddof)
        return {**batch, **scored, "reward": score, "failed": failed, "advantage": advantage}

    def sync(self, weights: Mapping[str, Params], step: Array) -> dict[str, Params]:
        last = (step + 1) % self.updates == 0
        return {
            "old": jax.tree.map(
                lambda new, old: jnp.where(last, new, old), weights["student"], weights["old"]
            )
        }

    def log_ratio(self, log_q: Array, batch: Batch) -> Array:
        """log of the ratio that is clipped, [B T-1]."""
        return log_q - batch["log_old"]

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        batch = ctx.batch
        mask = written(ctx.batch)
        log_q = self.log_probs(net.student, batch)
        log_ratio = jnp.where(mask, self.log_ratio(log_q, batch), 0.0)
        per_token = policy.clipped_surrogate(
            log_ratio, batch["advantage"][:, None], self.clip_low, self.clip_high
        )
        ratio = jnp.exp(log_ratio)
        metrics = {
            "reward": jnp.sum(batch["reward"]),
            "failed": jnp.sum(batch["failed"]),
            "length": jnp.sum(mask),
            "flat": jnp.sum(batch["advantage"] == 0),  # share of responses that teach nothing
            "clipped": share((ratio > 1 + self.clip_high) | (ratio < 1 - self.clip_low), mask),
        }
        if self.kl_weight:
            kl = policy.KL_ESTIMATORS[self.kl_kind](
                jnp.where(mask, batch[f"log_{self.anchor}"], log_q), log_q
            )
            per_token = per_token + self.kl_weight * kl
            metrics["kl"] = jnp.sum(sequence_mean(kl, mask))
        return Out(
            jnp.sum(sequence_mean(per_token, mask)), metrics, count=jnp.float32(len(mask))
        )  # eq. 3
