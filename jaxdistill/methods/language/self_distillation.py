"""Even your Teacher Needs Guidance: ground-truth targets dampen regularisation in self-distillation
(arXiv:2102.13088).

A model is distilled into an identical one, again and again, each on a mix of the labels (weight
alpha) and of the predictions of the one before (1 - alpha). Without labels the regularisation adds
up and the fit collapses; with them it tends to a fit with ridge lambda / alpha. objectives/ridge.py
has the kernel case in closed form. Here is the deep one: mean squared error of the softmax, and the
paper's estimate of the best alpha from two predictors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxdistill.core.needs import Spec
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
    stage_lengths,
)
from jaxdistill.objectives.ridge import best_alpha_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfDistillation(Method):
    """A batch may have heldout [B], 1 at samples that are not to be fitted."""

    # weight of the labels (other papers weigh the teacher); 0.6 in the paper's code
    alpha: float = 0.6
    # models one after another, the first without a teacher; 5 in the paper's code
    rounds: int = 5
    # batches that a round stores with the predictions of its teacher
    batches: int = 100
    # weight of the sum of the weights' L2 norms, which the paper's code does not square
    penalty: float = 1e-4

    needs = {"x": Float[Spec, "B *shape"], "cond": Int[Spec, " B"]}
    inits = {"student": None}
    frozen = ()
    ema = ()

    def __post_init__(self):
        if self.rounds < 1 or not 0 <= self.alpha <= 1:
            given = f"method.rounds={self.rounds}, alpha={self.alpha}"
            raise Refused(f"{given}: expected a positive integer and 0 to 1")

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """One for each model, equally long."""
        first, *later = stage_lengths(steps, self.rounds)
        collect = Collect(self.predictions, self.batches)
        later = [Stage(self, length, self.promote, collect) for length in later]
        return (Stage(self, first), *later)

    def promote(self, nets, params, batch):
        """Surgery: the model becomes the teacher, with its final weights, and a new one starts."""
        return student_becomes("teacher", nets, params)

    def predictions(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch with y_{tau-1}, the teacher's softmax."""
        return {**ctx.batch, "soft": jax.nn.softmax(net.teacher(ctx.batch["x"]))}

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """alpha MSE(f, y) + (1 - alpha) MSE(f, y_{tau-1}) + penalty sum |theta_l|.

        MSE is a mean over classes; the first model has no teacher, and alpha = 1.
        """
        batch = ctx.batch
        f = jax.nn.softmax(net.student(batch["x"]))
        y = jax.nn.one_hot(batch["cond"], f.shape[-1])
        fitted = 1 - batch["heldout"] if "heldout" in batch else jnp.ones(len(f))
        memory = {}
        metrics = {"accuracy": jnp.sum((f.argmax(-1) == batch["cond"]) * fitted)}
        each = mean_squared_error(f, y)
        if "soft" in batch:
            alpha, memory, more = self.label_weight(y, ctx)
            each = alpha * each + (1 - alpha) * mean_squared_error(f, batch["soft"])
            metrics |= more
        total = jnp.sum(each * fitted)
        count = jnp.sum(fitted)
        total = total + self.penalty * count * net.student(method="norms")
        return Out(total, metrics, memory, count)

    def label_weight(
        self, labels: Float[Array, "B C"], ctx: Ctx
    ) -> tuple[Any, dict[str, Array], Metrics]:
        """(alpha, memory, metrics) of a round with a teacher."""
        return self.alpha, {}, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimatedAlpha(SelfDistillation):
    """Estimates alpha in every round (eq. 7), with one more training a round in place of a grid.

    A first student of the round is fitted to the teacher alone (g); the very first model (f1)
    stands for the labels alone. Over the held-out samples of all batches so far, with labels u,
    alpha = <u - g, f1 - g> / |f1 - g|^2, clipped to [0, 1].
    """

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """The first model; then in each round the pure student g and the real one. Equally long."""
        lengths = stage_lengths(steps, 2 * self.rounds - 1)
        pure = SelfDistillation(
            alpha=0.0,
            rounds=self.rounds,
            batches=self.batches,
            penalty=self.penalty,
        )
        for_pure = Collect(self.predictions, self.batches)
        for_real = Collect(self.three_predictions, self.batches)
        stages = [Stage(self, lengths[0])]
        for i in range(1, len(lengths), 2):
            stages.append(Stage(pure, lengths[i], self.promote, for_pure))
            stages.append(Stage(self, lengths[i + 1], self.keep_pure, for_real))
        return tuple(stages)

    def memory(self) -> dict[str, Any]:
        """Numerator and denominator of alpha, summed over batches."""
        return {"above": jnp.zeros(()), "below": jnp.zeros(())}

    def promote(self, nets, params, batch):
        """Surgery: the model becomes the teacher; the very first one is also kept, as `first`."""
        if "first" not in params:
            nets = {**nets, "first": nets["student"]}
            params = {**params, "first": params["student"]}
        return student_becomes("teacher", nets, params)

    def keep_pure(self, nets, params, batch):
        """Surgery: the student of the teacher alone is kept as `pure`."""
        return student_becomes("pure", nets, params)

    def three_predictions(self, net: Nets, ctx: Ctx) -> Batch:
        """The batch with the softmax of the teacher, of f1 and of g."""
        x = ctx.batch["x"]
        predictions = {
            "soft": jax.nn.softmax(net.teacher(x)),
            "first": jax.nn.softmax(net.first(x)),
            "pure": jax.nn.softmax(net.pure(x)),
        }
        return {**ctx.batch, **predictions}

    def label_weight(self, labels, ctx):
        batch = ctx.batch
        if "heldout" not in batch:
            what = "no samples are held out, on which alpha could be estimated"
            raise Refused(f"data: {what} (batch field 'heldout')")
        heldout = batch["heldout"][:, None]
        u = heldout * labels
        f1 = heldout * batch["first"]
        g = heldout * batch["pure"]
        above, below = best_alpha_sums(u, f1, g)
        above = ctx.memory["above"] + above
        below = ctx.memory["below"] + below
        alpha = jnp.clip(above / jnp.maximum(below, 1e-12), 0.0, 1.0)
        return (
            alpha,
            {"above": above, "below": below},
            {"alpha": (alpha, jnp.ones(()))},
        )


def mean_squared_error(
    predicted: Float[Array, "B C"], target: Float[Array, "B C"]
) -> Float[Array, " B"]:
    return jnp.mean((predicted - target) ** 2, -1)


def student_becomes(role: str, nets, params):
    """`role` takes the student's network and weights; the student starts with fresh ones."""
    rest = {name: p for name, p in params.items() if name != "student"}
    return {**nets, role: nets["student"]}, {**rest, role: params["student"]}
