"""Flash-DMD's second stage - distillation joint with reinforcement learning (arXiv:2511.20549).

At a noisy step of the student's chain several next states are drawn; a reward that judges noisy
states names the best and the worst, and a DPO loss on the transition, against the first stage's
student, prefers the one to the other. Five such updates alternate with one of distillation
(flash_dmd.py), which keeps the student on the data.

Choices where the paper is silent: k, beta, and the transition's variance, which is that of the
student's sampler.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Batch, Ctx, Nets, Out, Stage, Turn, lookup
from jaxdistill.diffusion.process import expand
from jaxdistill.methods.distribution.flash_dmd import FlashDMD
from jaxdistill.objectives import preference
from jaxdistill.samplers.fewstep import simulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashDMDRL(FlashDMD):
    """Both stages: distillation, then preference updates alternating with it. `reward(x_t, t, cond)
    -> [B]` judges noisy states;
    `reference` (init="student") is the first stage's student.
    """

    rl_share: float = 2 / 3  # of the engine steps, for the second stage; the paper's 1 k + 2 k
    rl_steps: int = 5  # preference updates to one of distillation
    explore_steps: tuple[int, ...] = (0, 1)  # transitions i -> i + 1 of the chain that are explored
    candidates: int = 4  # k, uncertain
    beta: float = (
        1.0  # of the margin; uncertain: so that beta x margin spreads by about 1. With "mean" 5000
    )
    margin: str = "sum"  # sum | mean: over the entries of a sample

    frozen = (*FlashDMD.frozen, "reference", "reward")

    def __post_init__(self):
        super().__post_init__()
        self.check_steps("explore_steps", len(self.student_times) - 1)
        lookup(preference.MARGINS, self.margin, "method.margin")

    @property
    def turns(self) -> tuple[Turn, ...]:
        cycle = self.rl_steps + self.critic_steps
        later = lambda turn: (
            lambda step: step % cycle >= self.rl_steps and turn.when(step % cycle - self.rl_steps)
        )
        explore = Turn(
            ("student",),
            self.preference_loss,
            when=lambda step: step % cycle < self.rl_steps,
            gather=self.explore,
        )
        return (*(dataclasses.replace(turn, when=later(turn)) for turn in super().turns), explore)

    def stages(self, steps: int) -> tuple[Stage, ...]:
        first = FlashDMD(**{f.name: getattr(self, f.name) for f in dataclasses.fields(FlashDMD)})
        joint = min(round(self.rl_share * steps), steps - 1)
        return (Stage(first, steps - joint), Stage(self, joint, surgery=keep_reference))

    def explore(self, net: Nets, ctx: Ctx) -> Batch:
        """From one noisy state, `candidates` next ones; of each sample's the reward's favourite and
        its last.
        """
        denoise, noise, times = self.denoise_chain(net, ctx)
        index = self.one_of(ctx, self.explore_steps)
        rows = jnp.arange(noise.shape[0])
        xt, t = simulate(self.process, denoise, noise, times, ctx.key("chain"), index)
        x0 = denoise(xt, t).x0
        r = jnp.full(rows.shape, times[index + 1])

        def candidate(key):
            z = self.process.add_noise(x0, jax.random.normal(key, x0.shape), r)
            return z, net.reward(z, r, ctx.batch.get("cond"))

        z, reward = jax.lax.map(
            candidate, jax.random.split(ctx.key("candidates"), self.candidates)
        )  # [k B ...], [k B]
        best = jnp.argmax(reward, 0)
        worst = jnp.argmin(reward, 0)
        pair = {
            "winner": z[best, rows],
            "loser": z[worst, rows],
            "apart": reward[best, rows] > reward[worst, rows],
        }
        return {**ctx.batch, **pair, "xt": xt, "t": t, "r": r, "reward": jnp.mean(reward, 0)}

    def preference_loss(self, net: Nets, ctx: Ctx) -> Out:
        """DPO on the transition N(alpha_r G(x_t, t), sigma_r^2 I); pairs of equal reward are left
        out.
        """
        batch, (alpha, sigma) = ctx.batch, self.process.alpha_sigma(ctx.batch["r"])
        mean = lambda call: (
            expand(alpha, batch["xt"]) * call(batch["xt"], batch["t"], batch.get("cond")).x0
        )
        means = (mean(net.student), mean(net.reference))
        pair = (batch["winner"], batch["loser"])
        loss, margin = preference.dpo_transition_loss(*means, *pair, sigma, self.beta, self.margin)
        kept = lambda values: jnp.sum(jnp.where(batch["apart"], values, 0.0))
        seen = {"reward": (jnp.sum(batch["reward"]), jnp.float32(len(margin)))}
        return Out(
            kept(loss),
            {"preference": kept(loss), "margin_square": kept(margin**2), **seen},
            count=jnp.sum(batch["apart"]),
        )


def keep_reference(nets, params, batch):
    """Surgery: the first stage's student stays as it is, as the reference."""
    return {**nets, "reference": nets["student"]}, {**params, "reference": params["student"]}
