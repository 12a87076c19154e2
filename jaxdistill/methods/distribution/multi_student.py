"""Multi-Student Diffusion Distillation for Better One-Step Generators (MSD, arXiv:2410.23274).

Conditions are partitioned, and each cell gets a one-step student, fake score and discriminator of
its own: latency stays that of one network, capacity grows. Every member is distilled by an ordinary
method, here all at once on stacked weights. Students that are smaller than the teacher first
regress its denoiser, since they cannot copy its weights.

Departures: a batch is dealt out to the cells, so a cell that is short of rows sees some twice;
clipping by norm and gradients that are no numbers concern each member alone, everything else of an
optimiser is elementwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Collect, Ctx, Method, Nets, Out, Refused, Stage, Turn
from jaxdistill.diffusion.process import Flow, Process
from jaxdistill.diffusion.regression import denoising_error
from jaxdistill.diffusion.times import LogNormalSNR, Uniform
from jaxdistill.methods._hosted import Delegating
from jaxdistill.methods.distribution._members import Members
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.dmd import DMD
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.objectives.partition import Consecutive, Partition


@dataclasses.dataclass(frozen=True, kw_only=True)
class TSM(Method):
    """Teacher score matching (section 4.3): the teacher's posterior mean, without guidance, on
    noised data.
    """

    process: Process = Flow()
    times: Uniform = LogNormalSNR()  # ln sigma ~ N(-1.2, 1.2^2), EDM's
    target: str = "edm"  # what the error is weighted as: v | flow | vp | eps | x0 | edm

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        cond = ctx.batch.get("cond")
        t = self.times.draw(self.process, ctx.key("t"), x0.shape[0])
        xt = self.process.add_noise(x0, jax.random.normal(ctx.key("eps"), x0.shape), t)
        teacher = jax.lax.stop_gradient(net.teacher(xt, t, cond))
        return Out(
            jnp.mean(
                denoising_error(
                    self.process, net.student(xt, t, cond), teacher.x0, teacher.eps, t, self.target
                )
            )
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiStudent(Delegating):
    """Roles that move are banks of `partition.cells` members; a smaller student starts fresh, and
    its fake score from it.
    """

    partition: Partition = Consecutive()  # the paper's 4 cells of 250 classes; Quadrant for text
    tsm: TSM = TSM()
    dm: DiffInstruct = DMD(
        batches=1000
    )  # its pairs are all students'; regression uncertain: 0 for Stable Diffusion, critic_steps 5
    adm: DiffInstruct = (
        DMD2()
    )  # with real data of the cell; the paper's weights 3e-3 and 1e-2, five critic updates to one
    shares: tuple[float, ...] = (
        0.0,
        1.0,
        1.0,
    )  # of the steps, for tsm, dm and adm; tsm is for smaller students

    def __post_init__(self):
        if len(self.shares) != 3 or min(self.shares) < 0 or not self.shares[1] + self.shares[2]:
            raise Refused(
                f"method.shares={self.shares}: expected three numbers, at least 0, of which dm's or adm's is above 0"
            )
        if any(host.process != self.process for host in self.hosts):
            raise Refused(
                f"method: tsm, dm and adm have different processes, {[host.process for host in self.hosts]}"
            )

    hosts = property(
        lambda self: [
            host for host, share in zip((self.tsm, self.dm, self.adm), self.shares) if share
        ]
    )
    inits = property(
        lambda self: {role: source for host in self.hosts for role, source in host.inits.items()}
    )
    frozen = property(
        lambda self: tuple(dict.fromkeys(role for host in self.hosts for role in host.frozen))
    )
    host = property(lambda self: self.hosts[-1])  # whose sampler the students keep

    def check(self, nets, data) -> None:
        for host in self.hosts:
            host.check(nets, data)

    def stages(self, steps: int) -> tuple[Stage, ...]:
        ends = [round(steps * sum(self.shares[:i]) / sum(self.shares)) for i in range(4)]
        hosts = [
            (host, b - a)
            for host, a, b in zip((self.tsm, self.dm, self.adm), ends, ends[1:])
            if b > a
        ]
        collect = lambda host: (
            Collect(host.pairs, host.batches) if getattr(host, "regression_weight", 0) else None
        )
        return tuple(
            Stage(Members(host=host, partition=self.partition), n, collect=collect(host))
            for host, n in hosts
        )

    def generator(self, net: Nets) -> Callable:
        """The router: every sample by the student of its condition's cell, at the cost of all
        students on each.
        """
        return lambda x, t, cond=None, **kw: net.student(
            x, t, cond, member=self.partition.assign(cond), **kw
        )
