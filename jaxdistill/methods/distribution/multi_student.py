"""Multi-Student Diffusion Distillation for Better One-Step Generators (MSD, arXiv:2410.23274).

Conditions are partitioned into cells, and each cell has a one-step student, fake score and
discriminator of its own: latency remains that of one network while capacity grows. Every member is
distilled by an ordinary method, here all at once on stacked weights. Students that are smaller than
the teacher cannot copy its weights; they regress its denoiser first.

Departures: the samples of a batch are shared out equally to the cells, so that a cell of which it
has too few sees some of them twice. Clipping by norm and the handling of gradients that are not
finite concern each member alone; everything else in an optimiser is elementwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import (
    Collect,
    Ctx,
    Method,
    Nets,
    Out,
    Refused,
    Stage,
    stage_lengths,
)
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
    """Teacher score matching (section 4.3): regression of the teacher's x0 on noised data, without
    guidance.
    """

    process: Process = Flow()
    times: Uniform = LogNormalSNR()  # ln sigma ~ N(-1.2, 1.2^2), EDM's
    target: str = "edm"  # how the error is weighted: v | flow | vp | eps | x0 | edm

    needs = {"x": Float[Spec, "B *shape"]}

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        cond = ctx.batch.get("cond")
        t = self.times.draw(self.process, ctx.key("t"), x0.shape[0])
        xt = self.process.add_noise(
            x0, jax.random.normal(ctx.key("eps"), x0.shape), t
        )
        teacher = jax.lax.stop_gradient(net.teacher(xt, t, cond))
        student = net.student(xt, t, cond)
        error = denoising_error(
            self.process, student, teacher.x0, teacher.eps, t, self.target
        )
        return Out(jnp.mean(error))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiStudent(Delegating):
    """Three stages of ordinary methods: tsm, dm and adm. Roles that move are banks of
    `partition.cells` members. A smaller student starts with fresh weights, and its fake score from
    the student.
    """

    # The paper has 4 cells of 250 classes; Quadrant is for text.
    partition: Partition = Consecutive()
    tsm: TSM = TSM()  # teacher score matching, for smaller students
    # Distribution matching. The pairs of its regression are shared by all students. Uncertain: the
    # regression; the paper has weight 0 and critic_steps 5 for Stable Diffusion.
    dm: DiffInstruct = DMD(batches=1000)
    # Adversarial distribution matching, with real data of the cell; the paper's weights are 3e-3
    # and 1e-2, with five critic updates per student update.
    adm: DiffInstruct = DMD2()
    # Relative lengths of the stages of tsm, dm and adm; 0: left out.
    shares: tuple[float, ...] = (0.0, 1.0, 1.0)

    def __post_init__(self):
        if (
            len(self.shares) != 3
            or min(self.shares) < 0
            or not self.shares[1] + self.shares[2]
        ):
            expected = (
                "three numbers, at least 0, of which dm's or adm's is above 0"
            )
            raise Refused(f"method.shares={self.shares}: expected {expected}")
        processes = [host.process for host in self.hosts]
        if any(process != self.process for process in processes):
            raise Refused(
                f"method: tsm, dm and adm have different processes, {processes}"
            )

    @property
    def hosts(self) -> list[Method]:
        """The methods of all stages that are not left out."""
        methods = (self.tsm, self.dm, self.adm)
        return [method for method, share in zip(methods, self.shares) if share]

    @property
    def host(self) -> Method:
        """The last stage's method, whose sampler the students keep."""
        return self.hosts[-1]

    @property
    def inits(self) -> Mapping[str, str | None]:
        inits = {}
        for host in self.hosts:
            inits |= host.inits
        return inits

    @property
    def frozen(self) -> tuple[str, ...]:
        return tuple(
            dict.fromkeys(role for host in self.hosts for role in host.frozen)
        )

    @property
    def needs(self):
        needs = {}
        for host in self.hosts:
            needs |= host.needs
        return needs

    @property
    def cycle(self) -> int:
        return self.adm.cycle

    def settled(self) -> Method:
        return dataclasses.replace(
            self, dm=self.dm.settled(), adm=self.adm.settled()
        )

    def check(self, nets, data) -> None:
        for host in self.hosts:
            host.check(nets, data)

    def stages(self, steps: int) -> tuple[Stage, ...]:
        lengths = stage_lengths(steps, self.shares)
        stages = []
        for method, length in zip((self.tsm, self.dm, self.adm), lengths):
            collect = None
            if isinstance(method, DMD) and method.regression_weight:
                collect = Collect(method.pairs, method.batches)
            members = Members(host=method, partition=self.partition)
            if length:
                stages.append(Stage(members, length, collect=collect))
        return tuple(stages)

    def generator(self, net: Nets, null=None):
        """A router that sends each sample to the student of its condition's cell.

        All students are evaluated on all samples.
        """

        def route(x, t, cond=None, **kwargs):
            return net.student(
                x, t, cond, member=self.partition.assign(cond), **kwargs
            )

        return route
