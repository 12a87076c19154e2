"""Efficient Diffusion Distillation via Embedding Loss (arXiv:2604.22379): a term that is
added to the student's loss of any host method.

The student's samples and real data are embedded by networks with random weights, drawn anew at
every step, and the squared maximum mean discrepancy (MMD) of the two embedded batches is added to
the host's loss. The term needs no discriminator and no pairs of noise and sample, and real data let
the student surpass its teacher. The samples are those that the host's loss makes: the last x0 that
its student predicts.

The paper's kernel, networks, weight and batch sizes are not published. The defaults are those of
data-set condensation by random networks, and each of them is a field. A label is an input of the
first layer of a random network, not concatenated to its features: a linear kernel on concatenated
features would compare samples and labels separately.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxdistill.core.fields import Natural
from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Batch, Ctx, Method, Nets, Out, Turn
from jaxdistill.methods._hosted import Hosted, record_samples
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.models.vision.random_features import arch, random_feature_net
from jaxdistill.objectives.augment import Paired
from jaxdistill.objectives.mmd import mmd2

# The first `calibration` updates of a turn are looked for among so many steps of training.
SEARCHED = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingLoss(Hosted):
    """A host method whose student's loss has the embedding loss added, with a calibrated weight."""

    # Any method whose student's loss reads the x0 of a prediction, shaped like the data.
    host: Method = DMD2()
    # Norm of the embedding loss's gradient with respect to the samples, relative to that of the
    # host's loss at the start of training; 0: the host alone.
    weight: float = 0.3
    # Student updates over which the two norms are averaged. The embedding loss is added after
    # them.
    # 0: no calibration, `weight` multiplies the embedding loss itself.
    calibration: Natural = 10
    # Architectures that each random network is drawn from; ("mlp",) for points.
    archs: tuple[str, ...] = (
        "convnet-2",
        "convnet-3",
        "convnet-4",
        "resnet",
        "plain-3",
    )
    nets: int = 2  # number of random networks per step
    blocks: int = 1  # last blocks of each network whose features are compared
    # Evaluations of the loss between new networks: student updates, or micro-batches if gradients
    # are accumulated. With a fixed network, errors that it cannot see would accumulate.
    redraw: int = 1
    kernel: str = "linear"  # of the MMD: linear | rbf
    # u: unbiased | v: biased, lowers the samples' diversity a little
    estimator: str = "u"
    # Real samples per generated one. The host then sees every n-th sample of the batch.
    real_per_fake: int = 1
    # compares the joint distributions of samples and labels `cond`
    labelled: bool = False
    # one random draw, for all real and generated samples
    augment: Paired = Paired()

    @property
    def needs(self):
        own = {"x": Float[Spec, "B *shape"]}
        if self.labelled:
            own["cond"] = Int[Spec, " B"]
        return {**self.host.needs, **own}

    @property
    def calibrates(self) -> bool:
        return bool(self.calibration and self.weight)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The host's turns, with the embedding loss in those that move the student.

        During calibration each of the latter has a second turn that measures the gradients.
        """
        turns = []
        measuring = []
        for turn in self.host.turns:
            gather = functools.partial(self.gather, turn)
            # Roles that the turn moves and that make samples; none in a critic's turn.
            if not self.sampling_roles(turn):
                turns.append(dataclasses.replace(turn, gather=gather))
                continue
            loss = functools.partial(self.student_loss, turn)
            turns.append(dataclasses.replace(turn, loss=loss, gather=gather))
            if self.calibrates:
                loss = functools.partial(self.measure_norms, turn)
                when = functools.partial(self.is_calibrating, turn)
                measuring.append(Turn((), loss, when=when, gather=gather))
        return (*turns, *measuring)

    def calibration_steps(self, turn: Turn) -> list[int]:
        """The steps of a turn's first `calibration` updates."""
        taken = filter(turn.when, range(SEARCHED))
        return list(itertools.islice(taken, self.calibration))

    def is_calibrating(self, turn: Turn, step: int) -> bool:
        return turn.when(step) and step in self.calibration_steps(turn)

    def gather(self, turn: Turn, net: Nets, ctx: Ctx) -> Batch:
        """The host's batch, and the real samples that its student's samples are compared with."""
        batch = jax.tree.map(lambda x: x[:: self.real_per_fake], dict(ctx.batch))
        if turn.gather:
            batch = turn.gather(net, dataclasses.replace(ctx, batch=batch))
        real = {
            f"real_{key}": ctx.batch[key]
            for key in ("x", "cond")
            if key in ctx.batch
        }
        return {**batch, **real}

    def student_loss(self, turn: Turn, net: Nets, ctx: Ctx) -> Out:
        """The host's loss plus the embedding loss of the same samples."""
        recorded, samples = record_samples(net, self.sampling_roles(turn))
        out = turn.loss(recorded, ctx)
        network_seed, memory = self.draw_networks(ctx)
        embedding = self.embedding_loss(network_seed, ctx, samples[-1])
        # The embedding loss is a mean. If the host returns a count, its loss and metrics are sums,
        # which the engine divides by that count.
        count = 1 if out.count is None else out.count
        return out._replace(
            loss=out.loss + self.scale(turn, ctx) * embedding * count,
            metrics={**out.metrics, "embedding": embedding * count},
            memory={**out.memory, **memory},
        )

    def scale(self, turn: Turn, ctx: Ctx) -> Array | float:
        """The factor of the embedding loss: 0 until its weight is calibrated."""
        if not self.calibrates:
            return self.weight
        # Sums of the gradients' norms: of the host's loss, and of the embedding loss.
        host, own, _ = ctx.memory["embedding_norms"]
        calibrated = ctx.step > self.calibration_steps(turn)[-1]
        return jnp.where(
            calibrated, self.weight * (host / jnp.maximum(own, 1e-12)), 0.0
        )

    def measure_norms(self, turn: Turn, net: Nets, ctx: Ctx) -> Out:
        """Adds to the memory the norms of both losses' gradients with respect to the samples.

        `record_samples` adds `shift` to every x0 that the student predicts, so that the gradient
        in `shift` is that in the samples.
        """

        def host_loss(shift: Array) -> tuple[Array, Array]:
            recorded, samples = record_samples(
                net, self.sampling_roles(turn), shift
            )
            out = turn.loss(recorded, ctx)
            count = 1 if out.count is None else out.count
            return out.loss / count, samples[-1]

        no_shift = jnp.zeros_like(ctx.batch["x"])
        host_gradient, x0 = jax.grad(host_loss, has_aux=True)(no_shift)
        network_seed, _ = self.draw_networks(ctx)
        own_gradient = jax.grad(
            lambda x: self.embedding_loss(network_seed, ctx, x)
        )(x0)
        host = jnp.linalg.norm(host_gradient)
        own = jnp.linalg.norm(own_gradient)
        sums = ctx.memory["embedding_norms"] + jnp.stack([host, own, jnp.ones(())])
        metrics = {"host": host, "embedding": own}
        return Out(jnp.zeros(()), metrics, {"embedding_norms": sums})

    def draw_networks(self, ctx: Ctx) -> tuple[Array, dict[str, Array]]:
        """(network_seed, memory): the key data that all random networks are drawn from.

        It is drawn anew every `redraw` calls. The memory is passed from one micro-batch to the
        next, so that with accumulate=n the age counts micro-batches, n per update.
        """
        age = ctx.memory["embedding_age"]
        outdated = age >= self.redraw
        new = jax.random.key_data(ctx.key("psi"))
        network_seed = jnp.where(outdated, new, ctx.memory["embedding_key"])
        age = jnp.where(outdated, 1, age + 1)
        return network_seed, {"embedding_key": network_seed, "embedding_age": age}

    def embedding_loss(self, network_seed: Array, ctx: Ctx, x0: Array) -> Array:
        """E_psi MMD^2(psi(real), psi(x0)): the mean over random networks."""
        key = jax.random.wrap_key_data(network_seed)
        real = jax.lax.stop_gradient(ctx.batch["real_x"])
        real, fake = self.augment(ctx.key("augment"), real, x0)
        # Network i has the key of index i; the architectures have the index after the last network.
        arch_key = jax.random.fold_in(key, self.nets)
        drawn = jax.random.randint(arch_key, (self.nets,), 0, len(self.archs))
        values = []
        for i in range(self.nets):
            key_i = jax.random.fold_in(key, i)
            compare = functools.partial(self.discrepancy, key_i, ctx, real, fake)
            branches = [functools.partial(compare, name) for name in self.archs]
            values.append(jax.lax.switch(drawn[i], branches))
        return sum(values) / self.nets

    def discrepancy(
        self, key: Array, ctx: Ctx, real: Array, fake: Array, name: str
    ) -> Array:
        """MMD^2 under one random network of architecture `name`, the mean over its last blocks."""
        network = random_feature_net(key, arch(name))
        real_label = ctx.batch["real_cond"] if self.labelled else None
        fake_label = ctx.batch["cond"] if self.labelled else None
        real_features = network(real, real_label)[-self.blocks :]
        fake_features = network(fake, fake_label)[-self.blocks :]
        values = []
        for a, b in zip(real_features, fake_features):
            values.append(mmd2(a, b, self.kernel, self.estimator))
        return sum(values) / len(values)

    def memory(self):
        """The state of the loss.

        embedding_norms: sums of the gradients' norms of the host's loss and of the embedding loss,
            and the number of measurements.
        embedding_key: key data that the current random networks are drawn from.
        embedding_age: number of calls that have used this key.
        """
        own = {
            "embedding_norms": jnp.zeros(3),
            "embedding_key": jnp.zeros_like(jax.random.key_data(jax.random.key(0))),
            "embedding_age": jnp.int32(self.redraw),
        }
        return {**self.host.memory(), **own}
