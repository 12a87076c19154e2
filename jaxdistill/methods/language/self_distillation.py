"""Even your Teacher Needs Guidance: ground-truth targets dampen regularisation in self-distillation
(arXiv:2102.13088).

A model is distilled into an identical one, again and again, each on a mix of the labels (alpha) and
of what the one before predicts (1 - alpha). Without labels the regularisation adds up and the fit
collapses; with them it tends to one with ridge lambda / alpha. objectives/ridge.py has the kernel
case in closed form; here is the deep one: mean squared error of the softmax, and its estimate of
the best alpha from two predictors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.core.types import (
    Array,
    Batch,
    Collect,
    Ctx,
    Method,
    Metrics,
    Nets,
    Out,
    Refused,
    Stage,
    Turn,
)
from jaxdistill.objectives.ridge import best_alpha_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfDistillation(Method):
    """Batches: x, cond int [B] the labels, and where there are any, heldout [B] 1 on samples not to
    be fitted.
    """

    alpha: float = (
        0.6  # weight of the labels (other papers weigh the teacher); the paper's code: 0.6
    )
    rounds: int = 5  # models one after another, the first without a teacher; the paper's code: 5
    batches: int = 100  # that a round stores with its teacher's predictions
    penalty: float = 1e-4  # of the sum of the weights' L2 norms, not squared as in the paper's code

    inits = {"student": None}
    frozen = ()
    ema = ()

    def __post_init__(self):
        if self.rounds < 1 or not 0 <= self.alpha <= 1:
            raise Refused(
                f"method.rounds={self.rounds}, alpha={self.alpha}: expected a positive integer and 0 to 1"
            )

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """One for each model, equally long."""
        lengths = [(steps + i) // self.rounds for i in reversed(range(self.rounds))]
        later = dict(surgery=self.promote, collect=Collect(self.predictions, self.batches))
        return tuple(
            Stage(self, length, **(later if i else {})) for i, length in enumerate(lengths)
        )

    def promote(self, nets, params, batch):
        """Surgery: the model becomes the teacher, with its final weights, and the next begins anew."""
        return renamed(nets, params, "teacher")

    def predictions(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch with y_{tau-1}, the teacher's softmax."""
        return {**ctx.batch, "soft": jax.nn.softmax(net.teacher(ctx.batch["x"]))}

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """alpha MSE(f, y) + (1 - alpha) MSE(f, y_{tau-1}) + penalty sum |theta_l|, mean over
        classes.
        """
        batch = ctx.batch
        probs = jax.nn.softmax(net.student(ctx.batch["x"]))
        labels = jax.nn.one_hot(batch["cond"], probs.shape[-1])
        fitted = 1 - batch["heldout"] if "heldout" in batch else jnp.ones(len(probs))
        error = lambda target: jnp.mean((probs - target) ** 2, -1)
        alpha, memory, metrics = self.weight(labels, ctx) if "soft" in batch else (1.0, {}, {})
        each = alpha * error(labels) + (
            (1 - alpha) * error(batch["soft"]) if "soft" in batch else 0.0
        )
        total = jnp.sum(each * fitted)
        count = jnp.sum(fitted)
        right = jnp.sum((probs.argmax(-1) == batch["cond"]) * fitted)
        return Out(
            total + self.penalty * count * net.student(method="norms"),
            {"accuracy": right, **metrics},
            memory,
            count,
        )

    def weight(self, labels: Array, ctx: Ctx) -> tuple[Any, dict[str, Array], Metrics]:
        """(alpha, memory, metrics) of a round with a teacher."""
        return self.alpha, {}, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimatedAlpha(SelfDistillation):
    """Chooses alpha in every round (eq. 7): a first student is fitted to the teacher alone (g), the
    very first model (f1) stands for labels alone; on the held-out samples, over all batches seen so
    far, alpha = <u - g, f1 - g> / |f1 - g|^2, clipped to [0, 1]. One more training a round in place
    of a grid.
    """

    def stages(self, steps):
        """The first model, then for each round the pure student and the real one; all equally long."""
        count = 2 * self.rounds - 1
        lengths = [(steps + i) // count for i in reversed(range(count))]
        pure = SelfDistillation(
            alpha=0.0, rounds=self.rounds, batches=self.batches, penalty=self.penalty
        )
        make = lambda i: Stage(
            pure if i % 2 else self,
            lengths[i],
            self.promote if i % 2 else self.keep_pure,
            Collect(self.predictions if i % 2 else self.three_predictions, self.batches),
        )
        return (Stage(self, lengths[0]), *(make(i) for i in range(1, count)))

    def memory(self) -> dict[str, Any]:
        return {"above": jnp.zeros(()), "below": jnp.zeros(())}

    def promote(self, nets, params, batch):
        if "first" not in params:
            nets = {**nets, "first": nets["student"]}
            params = {**params, "first": params["student"]}
        return renamed(nets, params, "teacher")

    def keep_pure(self, nets, params, batch):
        """Surgery: the student of the teacher alone is kept as g."""
        return renamed(nets, params, "pure")

    def three_predictions(self, net: Nets, ctx: Ctx) -> Batch:
        law = lambda role: jax.nn.softmax(getattr(net, role)(ctx.batch["x"]))
        return {**ctx.batch, "soft": law("teacher"), "first": law("first"), "pure": law("pure")}

    def weight(self, labels, ctx):
        if "heldout" not in ctx.batch:
            raise Refused(
                "data: no samples are held out, on which alpha could be estimated (batch field 'heldout')"
            )
        held = ctx.batch["heldout"][:, None]
        sums = best_alpha_sums(
            *(held * law for law in (labels, ctx.batch["first"], ctx.batch["pure"]))
        )
        above = ctx.memory["above"] + sums[0]
        below = ctx.memory["below"] + sums[1]
        alpha = jnp.clip(above / jnp.maximum(below, 1e-12), 0.0, 1.0)
        return alpha, {"above": above, "below": below}, {"alpha": (alpha, jnp.ones(()))}


def renamed(nets, params, role: str):
    """`role` takes the student's network and weights; the student will begin with fresh ones."""
    rest = {name: p for name, p in params.items() if name != "student"}
    return {**nets, role: nets["student"]}, {**rest, role: params["student"]}
