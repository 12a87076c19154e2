"""Flash-DMD's second stage - distillation joint with reinforcement learning (arXiv:2511.20549).

At a noisy step of the student's sampling chain several next states are drawn. A reward that judges
noisy states finds the best and the worst of them, and a DPO loss on the transition prefers the
former to the latter, relative to the student of the first stage. Five such updates alternate with
one of distillation (flash_dmd.py), which keeps the student on the data.

Choices where the paper is silent: k, beta, and the variance of the transition, which is that of the
student's sampler.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Stage, Turn, lookup
from jaxdistill.diffusion.process import expand
from jaxdistill.methods.distribution.flash_dmd import FlashDMD
from jaxdistill.objectives import preference
from jaxdistill.samplers.fewstep import simulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashDMDRL(FlashDMD):
    """Both stages: distillation, then preference updates that alternate with it.

    The frozen role `reward(x_t, t, cond) -> [B]` judges noisy states; `reference` (init="student")
    is the student of the first stage.
    """

    # of the engine steps, for the second stage; the paper's 1 k + 2 k
    rl_share: float = 2 / 3
    rl_steps: int = 5  # preference updates per update of distillation
    # transitions i -> i + 1 of the chain that are explored
    explore_steps: tuple[int, ...] = (
        0,
        1,
    )
    candidates: int = 4  # k, next states that are drawn; uncertain
    # Of the margin. Uncertain: chosen so that beta x margin spreads by about 1; 5000 for "mean".
    beta: float = 1.0
    # sum | mean: how squared errors are added up over a sample's entries
    margin: str = "sum"

    frozen = (*FlashDMD.frozen, "reference", "reward")

    def __post_init__(self):
        super().__post_init__()
        self.check_steps("explore_steps", len(self.student_times) - 1)
        lookup(preference.MARGINS, self.margin, "method.margin")

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Of every rl_steps + critic_steps steps, the first ones explore and the last ones
        distil.
        """
        turns = []
        for turn in super().turns:
            when = functools.partial(self.distils, turn)
            turns.append(dataclasses.replace(turn, when=when))
        explore = Turn(
            ("student",),
            self.preference_loss,
            when=self.explores,
            gather=self.explore,
        )
        return (*turns, explore)

    def explores(self, step: int) -> bool:
        return step % (self.rl_steps + self.critic_steps) < self.rl_steps

    def distils(self, turn: Turn, step: int) -> bool:
        """Whether a turn of distillation is taken."""
        within = step % (self.rl_steps + self.critic_steps)
        return within >= self.rl_steps and turn.when(within - self.rl_steps)

    def stages(self, steps: int) -> tuple[Stage, ...]:
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(FlashDMD)
        }
        joint = min(round(self.rl_share * steps), steps - 1)
        return (
            Stage(FlashDMD(**fields), steps - joint),
            Stage(self, joint, surgery=keep_reference),
        )

    def explore(self, net: Nets, ctx: Ctx) -> Batch:
        """Adds a noisy state x_t, and of `candidates` next states at time r those with the highest
        and the lowest reward.
        """
        denoise, noise, times = self.sampling_chain(net, ctx)
        index = self.draw_step(ctx, self.explore_steps)
        xt, t = simulate(
            self.process, denoise, noise, times, ctx.key("chain"), index
        )
        x0 = denoise(xt, t).x0
        samples = jnp.arange(noise.shape[0])
        r = jnp.full(samples.shape, times[index + 1])

        def candidate(key: Array) -> tuple[Array, Array]:
            xr = self.process.add_noise(x0, jax.random.normal(key, x0.shape), r)
            return xr, net.reward(xr, r, ctx.batch.get("cond"))

        keys = jax.random.split(ctx.key("candidates"), self.candidates)
        xr, reward = jax.lax.map(candidate, keys)  # [k B ...], [k B]
        best = jnp.argmax(reward, 0)
        worst = jnp.argmin(reward, 0)
        pair = {
            "winner": xr[best, samples],
            "loser": xr[worst, samples],
            "apart": reward[best, samples] > reward[worst, samples],
        }
        return {
            **ctx.batch,
            **pair,
            "xt": xt,
            "t": t,
            "r": r,
            "reward": jnp.mean(reward, 0),
        }

    def preference_loss(self, net: Nets, ctx: Ctx) -> Out:
        """DPO on the transition N(alpha_r G(x_t, t), sigma_r^2 I); pairs of equal reward are left
        out.
        """
        batch = ctx.batch
        alpha, sigma = self.process.alpha_sigma(batch["r"])

        def mean(generator) -> Array:
            x0 = generator(batch["xt"], batch["t"], batch.get("cond")).x0
            return expand(alpha, batch["xt"]) * x0

        loss, margin = preference.dpo_transition_loss(
            mean(net.student),
            mean(net.reference),
            batch["winner"],
            batch["loser"],
            sigma,
            self.beta,
            self.margin,
        )
        total = lambda values: jnp.sum(jnp.where(batch["apart"], values, 0.0))
        metrics = {
            "preference": total(loss),
            "margin_square": total(margin**2),
            "reward": (jnp.sum(batch["reward"]), jnp.float32(len(margin))),
        }
        return Out(total(loss), metrics, count=jnp.sum(batch["apart"]))


def keep_reference(nets, params, batch):
    """Surgery: the first stage's student stays as it is, as the reference."""
    return {**nets, "reference": nets["student"]}, {
        **params,
        "reference": params["student"],
    }
