"""Progressive distillation (arXiv:2202.00512): a student takes in one DDIM step what its teacher
takes in two.

Each stage halves the number of steps, and its student is the next stage's teacher. The target is
the x0 from which one DDIM step ends where the teacher's two do, so that a perfect student
reproduces its teacher exactly. All times are of one grid, that on which the process samples in the
first teacher's number of steps.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.needs import Spec
from jaxdistill.core.types import (
    Array,
    Ctx,
    Method,
    Nets,
    Out,
    Refused,
    Stage,
    lookup,
    stage_lengths,
)
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Flow, Process, expand
from jaxdistill.objectives import weighting
from jaxdistill.objectives.numerics import mean_per_sample
from jaxdistill.samplers import ode

WEIGHTS = {  # of the error of x0, section 4
    "truncated_snr": weighting.truncated_snr,
    "snr_plus_one": weighting.vp_velocity,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressive(Method):
    """One stage for each halving of the number of steps."""

    process: Process = Flow()
    # DDIM steps of the teacher: a power of two times student_steps
    teacher_steps: int = 32
    # DDIM steps of the last student
    student_steps: int = 1
    # truncated_snr: max(SNR, 1) | snr_plus_one
    weight: str = "truncated_snr"
    # guidance scale of the first teacher
    guidance: float = 1.0
    # DDIM steps of the first teacher; 0: teacher_steps. `stages` sets it
    first_steps: int = 0

    needs = {"x": Float[Spec, "B *shape"]}
    renoises = False

    def __post_init__(self):
        halves = self.student_steps >= 1 and self.halvings >= 1
        if (
            not halves
            or self.student_steps * 2**self.halvings != self.teacher_steps
        ):
            given = f"method.teacher_steps={self.teacher_steps}"
            expected = f"2, 4, 8, ... times student_steps={self.student_steps}"
            raise Refused(f"{given}: expected {expected}")

    @property
    def halvings(self) -> int:
        return (self.teacher_steps // self.student_steps).bit_length() - 1

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """One for each halving, equally long."""
        stages = []
        for i, length in enumerate(stage_lengths(steps, self.halvings)):
            method = dataclasses.replace(
                self,
                teacher_steps=self.teacher_steps // 2**i,
                student_steps=self.teacher_steps // 2 ** (i + 1),
                guidance=1.0 if i else self.guidance,
                first_steps=self.first_steps or self.teacher_steps,
            )
            stages.append(Stage(method, length, surgery=promote if i else None))
        return tuple(stages)

    def grid(self, steps: int) -> Array:
        """The times of a network of `steps` steps, [steps + 1] from t_max down.

        They are every so many of the first teacher's. Raises Refused where that is not possible.
        """
        all_steps = self.first_steps or self.teacher_steps
        if steps < 1 or all_steps % steps:
            expected = (
                f"expected a divisor of the first teacher's {all_steps} steps"
            )
            raise Refused(
                f"steps={steps}: {expected}, on whose grid all are trained"
            )
        return self.process.grid(all_steps)[:: all_steps // steps]

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """Algorithm 2, for a student of `student_steps` and a teacher of twice as many."""
        x0 = ctx.batch["x"]
        cond = ctx.batch.get("cond")
        null_cond = ctx.batch.get("null_cond")
        index = jax.random.randint(
            ctx.key("t"), x0.shape[:1], 1, self.student_steps + 1
        )
        rising = self.grid(self.teacher_steps)[::-1]
        t = rising[2 * index]
        middle = rising[2 * index - 1]
        s = rising[2 * index - 2]
        eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
        xt = self.process.add_noise(x0, eps, t)
        teacher = lambda x, t: guided(
            net.teacher, x, t, cond, null_cond, self.guidance
        )
        xm = ode.advance("ddim", self.process, teacher, xt, t, middle)
        xs = ode.advance("ddim", self.process, teacher, xm, middle, s)

        alpha_t, sigma_t = self.process.alpha_sigma(t)
        alpha_s, sigma_s = self.process.alpha_sigma(s)
        ratio = expand(sigma_s / sigma_t, x0)
        target = (xs - ratio * xt) / (
            expand(alpha_s, x0) - ratio * expand(alpha_t, x0)
        )
        target = jax.lax.stop_gradient(target)
        error = mean_per_sample((net.student(xt, t, cond).x0 - target) ** 2)
        weight = lookup(WEIGHTS, self.weight, "weight")(alpha_t, sigma_t)
        return Out(jnp.mean(weight * error))

    def sampling_times(self, steps: int) -> Array:
        return ode.chain_times("ddim", self.process, steps, self.grid(steps))

    def sample(self, net, noise, cond, key, steps):
        denoise = lambda x, t: net(x, t, cond)
        start = self.process.start(noise)
        return ode.solve(
            "ddim", self.process, denoise, start, steps, key, self.grid(steps)
        )


def promote(nets, params, batch):
    """Surgery: the student becomes the teacher, and goes on from there."""
    if nets["student"].adapts:
        reason = "since it becomes a teacher"
        raise Refused(
            f"roles.student.lora: a progressively distilled student has full weights, {reason}"
        )
    return {**nets, "teacher": nets["student"]}, {
        **params,
        "teacher": params["student"],
    }
