"""Efficient Diffusion Distillation via Embedding Loss (arXiv:2604.22379): a term that any host
method takes along.

The student's samples and real data are embedded by networks with random weights, drawn anew at
every step, and the maximum mean discrepancy of the two embedded batches joins the host's loss.
Nothing more is trained, no pairs are stored, and real data lets the student pass its teacher. The
samples are those that the host's own loss makes: the x0 of its student's last call.

Kernel, networks, weight and batch sizes are not published: the defaults are those of data-set
condensation by random networks, and each is a field. A label joins the first layer of a random
network rather than its features, because a linear kernel on concatenated features compares nothing
jointly.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from jaxdistill.core.fields import Natural
from jaxdistill.core.types import Array, Batch, Ctx, Method, Nets, Out, Turn
from jaxdistill.methods._hosted import Hosted, tap
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.models.vision.random_features import arch, random_feature_net
from jaxdistill.objectives.augment import Paired
from jaxdistill.objectives.mmd import mmd2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingLoss(Hosted):
    host: Method = (
        DMD2()
    )  # any whose student's loss reads the x0 of a prediction, shaped like the data
    # norm of the loss's gradient in the samples, relative to the host's at the start; 0: the host
    weight: float = 0.3
    # student updates that those norms are averaged over, without the loss; 0: `weight` is absolute
    calibration: Natural = 10
    archs: tuple[str, ...] = (
        "convnet-2",
        "convnet-3",
        "convnet-4",
        "resnet",
        "plain-3",
    )  # drawn from; points take ("mlp",)
    nets: int = 2  # random networks per step
    blocks: int = 1  # of each, from the last, whose features are compared
    redraw: int = (
        1  # student updates between new networks; a fixed network leaves a null space to overfit
    )
    kernel: str = "linear"  # linear | rbf
    estimator: str = "u"  # u | v; the biased V-statistic narrows the samples a little
    real_per_fake: int = (
        1  # real samples per generated one: the host then sees every n-th of the batch
    )
    labelled: bool = False  # compares joint laws of sample and cond
    augment: Paired = Paired()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The host's, then one for each that moves the student, which measures while the weight is
        found.
        """
        turns = [self.joined(turn) if self.makers(turn) else turn for turn in self.host.turns]
        turns = [
            dataclasses.replace(turn, gather=self.gathering(given))
            for turn, given in zip(turns, self.host.turns)
        ]
        measured = [self.measuring(turn) for turn in self.host.turns if self.makers(turn)]
        return (*turns, *(measured if self.calibration and self.weight else []))

    def first(self, turn: Turn) -> list[int]:
        """The first `calibration` steps of a turn."""
        return list(itertools.islice(filter(turn.when, range(1 << 20)), self.calibration))

    def joined(self, turn: Turn) -> Turn:
        """The host's turn with the embedding loss added after calibration."""

        def loss(net: Nets, ctx: Ctx) -> Out:
            tapped, seen = tap(net, self.makers(turn))
            out, (psi, memory) = turn.loss(tapped, ctx), self.networks(ctx)
            value = self.embedding(psi, ctx, seen[-1])
            host, own, _ = ctx.memory["embedding_norms"]
            scale = self.weight * (host / jnp.maximum(own, 1e-12) if self.calibration else 1.0)
            late = ctx.step > self.first(turn)[-1] if self.calibration and self.weight else True
            added = jnp.where(late, scale, 0.0) * value * (1 if out.count is None else out.count)
            return out._replace(
                loss=out.loss + added,
                metrics={**out.metrics, "embedding": value},
                memory={**out.memory, **memory},
            )

        return dataclasses.replace(turn, loss=loss)

    def measuring(self, turn: Turn) -> Turn:
        """Sums the norms of both gradients in the samples over the first updates."""

        def loss(net: Nets, ctx: Ctx) -> Out:
            def host(move):
                tapped, seen = tap(net, self.makers(turn), move)
                out = turn.loss(tapped, ctx)
                return out.loss / (1 if out.count is None else out.count), seen[-1]

            grad, x0 = jax.grad(host, has_aux=True)(jnp.zeros_like(ctx.batch["x"]))
            own = jax.grad(lambda x: self.embedding(self.networks(ctx)[0], ctx, x))(x0)
            norms = jnp.stack([jnp.linalg.norm(grad), jnp.linalg.norm(own), jnp.ones(())])
            return Out(
                jnp.zeros(()),
                {"host": norms[0], "embedding": norms[1]},
                {"embedding_norms": ctx.memory["embedding_norms"] + norms},
            )

        when = lambda step: turn.when(step) and step in self.first(turn)
        return dataclasses.replace(
            turn, moves=(), loss=loss, when=when, gather=self.gathering(turn), after=None
        )

    def gathering(self, turn: Turn):
        def gather(net: Nets, ctx: Ctx) -> Batch:
            """The host's batch, and the real samples that it is compared with."""
            part = dataclasses.replace(
                ctx, batch=jax.tree.map(lambda x: x[:: self.real_per_fake], dict(ctx.batch))
            )
            batch = turn.gather(net, part) if turn.gather else part.batch
            return {**batch, **{f"real_{k}": ctx.batch[k] for k in ("x", "cond") if k in ctx.batch}}

        return gather

    def networks(self, ctx: Ctx) -> tuple[Array, dict]:
        """(The key that the current random networks are drawn from, what to remember of it.)"""
        held = ctx.memory["embedding_key"]
        age = ctx.memory["embedding_age"]
        key = jnp.where(age >= self.redraw, jax.random.key_data(ctx.key("psi")), held)
        return key, {
            "embedding_key": key,
            "embedding_age": jnp.where(age >= self.redraw, 1, age + 1),
        }

    def embedding(self, psi: Array, ctx: Ctx, x0: Array) -> Array:
        """MMD^2 between real samples and x0, the mean over random networks and their blocks."""
        key = jax.random.wrap_key_data(psi)
        labels = (None, None)
        real, fake = self.augment(
            ctx.key("augment"), jax.lax.stop_gradient(ctx.batch["real_x"]), x0
        )
        if self.labelled:
            labels = ctx.batch["real_cond"], ctx.batch["cond"]

        def one(i, name):
            net = random_feature_net(jax.random.fold_in(key, i), arch(name))
            pairs = [*zip(net(real, labels[0]), net(fake, labels[1]))][-self.blocks :]
            return sum(mmd2(a, b, self.kernel, self.estimator) for a, b in pairs) / len(pairs)

        pick = jax.random.randint(
            jax.random.fold_in(key, self.nets), (self.nets,), 0, len(self.archs)
        )
        values = [
            jax.lax.switch(pick[i], [lambda i=i, name=name: one(i, name) for name in self.archs])
            for i in range(self.nets)
        ]
        return sum(values) / self.nets

    def memory(self):
        data = jnp.zeros_like(jax.random.key_data(jax.random.key(0)))
        own = {
            "embedding_norms": jnp.zeros(3),
            "embedding_key": data,
            "embedding_age": jnp.int32(self.redraw),
        }
        return {**self.host.memory(), **own}
