"""GRPO - Group relative policy optimisation (DeepSeekMath, arXiv:2402.03300).

The policy samples a group of responses to each prompt. The advantage of a response is its reward
minus the group's mean, in the group's standard deviations; there is no value network. Policy
updates are PPO's, clipped in the ratio to the policy that sampled, with an estimate of the KL to a
reference policy in the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.types import (
    Array,
    Batch,
    Ctx,
    Nets,
    Out,
    Params,
    Refused,
    Turn,
    lookup,
)
from jaxdistill.methods.language._rollout import (
    Writing,
    response_mask,
    share_of_tokens,
)
from jaxdistill.models.language.lm import common_vocabulary, same_vocabulary
from jaxdistill.objectives import policy
from jaxdistill.objectives.divergence import sequence_mean
from jaxdistill.objectives.reward import Exact


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(Writing):
    """A step takes data.batch_size prompts and makes one update of the student.

    The policy that samples, role `old`, becomes the student after the last of every `updates`
    steps: these are the mini-batches of one large roll-out.
    """

    # of the responses; a class of objectives.reward
    reward: Any = Exact()
    # responses to a prompt; the paper's 64
    group: int = 8
    # updates of the student before it becomes `old` again; the paper's 1
    updates: int = 1
    # the ratio is clipped to 1 - clip_low and 1 + clip_high; 0.2 is PPO's
    clip_low: float = 0.2
    clip_high: float = 0.2
    # weight of the KL to the reference; the paper's 0.04; 0: no reference is loaded
    kl_weight: float = 0.04
    # estimator of the KL: k1 | k2 | k3; the paper's k3
    kl_kind: str = "k3"
    # the groups' standard deviation divides by group - ddof; 0: population, 1: sample, as in TRL
    ddof: int = 0
    # added to the standard deviation in the advantage's denominator; TRL's 1e-4
    std_eps: float = 1e-6

    inits = {"student": None, "old": "student"}
    ema = ()
    anchor = "reference"  # role of the policy that the KL is to
    greedy = False

    def __post_init__(self):
        super().__post_init__()
        lookup(policy.KL_ESTIMATORS, self.kl_kind, "method.kl_kind")
        if self.group < 2 or self.updates < 1:
            given = f"method.group={self.group}, method.updates={self.updates}"
            raise Refused(f"{given}: expected at least 2 and 1")
        if self.ddof not in (0, 1) or not self.std_eps > 0:
            given = f"method.ddof={self.ddof}, method.std_eps={self.std_eps}"
            raise Refused(f"{given}: expected 0 or 1, and a number above 0")

    @property
    def frozen(self) -> tuple[str, ...]:
        return (self.anchor,) if self.kl_weight else ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(("student",), self.loss, gather=self.rollout, after=self.sync),
        )

    def check(self, nets, data) -> None:
        same_vocabulary(self, nets)

    def rollout(self, net: Nets, ctx: Ctx) -> Batch:
        """Groups of responses of the old policy, with what the loss needs of them.

        These are reward, failed and advantage [B], and the log-probabilities of the old policy and
        of every frozen one, log_<role> [B T-1].
        """
        batch = self.write(
            net.old, ctx, "write", self.group, common_vocabulary(net)
        )
        reward, failed = self.reward(batch)
        advantage = policy.group_advantages(
            reward, self.group, eps=self.std_eps, ddof=self.ddof
        )
        batch = {
            **batch,
            "reward": reward,
            "failed": failed,
            "advantage": advantage,
        }
        for role in ("old", *self.frozen):
            batch[f"log_{role}"] = self.log_probs(getattr(net, role), batch)
        return batch

    def sync(self, weights: Mapping[str, Params], step: Array) -> dict[str, Params]:
        """`old` becomes the student after every `updates` steps."""
        last = (step + 1) % self.updates == 0
        choose = lambda student, old: jnp.where(last, student, old)
        return {"old": jax.tree.map(choose, weights["student"], weights["old"])}

    def log_ratio(
        self, log_q: Float[Array, "*N"], batch: Batch
    ) -> Float[Array, "*N"]:
        """log of the ratio that is clipped."""
        return log_q - batch["log_old"]

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """Eq. 3: a mean over the tokens of each response, then over responses."""
        batch = ctx.batch
        mask = response_mask(batch)
        log_q = self.log_probs(net.student, batch)
        log_ratio = jnp.where(mask, self.log_ratio(log_q, batch), 0.0)
        per_token = policy.clipped_surrogate(
            log_ratio, batch["advantage"][:, None], self.clip_low, self.clip_high
        )
        ratio = jnp.exp(log_ratio)
        clipped = (ratio > 1 + self.clip_high) | (ratio < 1 - self.clip_low)
        metrics = {
            "reward": jnp.sum(batch["reward"]),
            "failed": jnp.sum(batch["failed"]),
            "length": jnp.sum(mask),
            "flat": jnp.sum(
                batch["advantage"] == 0
            ),  # responses without a gradient
            "clipped": share_of_tokens(clipped, mask),
        }
        if self.kl_weight:
            log_anchor = jnp.where(mask, batch[f"log_{self.anchor}"], log_q)
            kl = policy.KL_ESTIMATORS[self.kl_kind](log_anchor, log_q)
            per_token = per_token + self.kl_weight * kl
            metrics["kl"] = jnp.sum(sequence_mean(kl, mask))
        loss = jnp.sum(sequence_mean(per_token, mask))
        return Out(loss, metrics, count=jnp.float32(len(mask)))
