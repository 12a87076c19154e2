"""Progressive distillation (arXiv:2202.00512): a student takes in one DDIM step what its teacher
takes in two.

Each stage halves the number of steps, and its student is the next stage's teacher. The target is
the x0 from which one DDIM step lands where the teacher's two do, so a perfect student reproduces
its teacher exactly. All take their times from one grid, that on which the process samples in the
first teacher's steps.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Ctx, Method, Nets, Out, Refused, Stage, Turn, lookup
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Flow, Process, expand
from jaxdistill.objectives import weighting
from jaxdistill.samplers import ode

WEIGHTS = {
    "truncated_snr": weighting.truncated_snr,
    "snr_plus_one": weighting.vp_velocity,
}  # of the error of x0, section 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressive(Method):
    process: Process = Flow()
    teacher_steps: int = 32  # DDIM steps of the teacher, a power of two times student_steps
    student_steps: int = 1  # of the last student
    weight: str = "truncated_snr"  # truncated_snr: max(SNR, 1) | snr_plus_one
    guidance: float = 1.0  # of the first teacher
    first_steps: int = 0  # of the first teacher; `stages` sets it. 0: teacher_steps

    def __post_init__(self):
        if (
            self.student_steps < 1
            or self.halvings < 1
            or self.student_steps * 2**self.halvings != self.teacher_steps
        ):
            raise Refused(
                f"method.teacher_steps={self.teacher_steps}: expected 2, 4, 8, ... times student_steps={self.student_steps}"
            )

    @property
    def halvings(self) -> int:
        return (self.teacher_steps // self.student_steps).bit_length() - 1

    renoises = False

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def stages(self, steps):
        """One for each halving, equally long."""
        counts = [self.student_steps * 2**i for i in reversed(range(self.halvings))]
        lengths = [(steps + i) // len(counts) for i in reversed(range(len(counts)))]
        later = lambda i: dict(
            guidance=1.0 if i else self.guidance, first_steps=self.first_steps or self.teacher_steps
        )
        make = lambda i, n: dataclasses.replace(
            self, teacher_steps=2 * n, student_steps=n, **later(i)
        )
        return tuple(
            Stage(make(i, n), lengths[i], surgery=promote if i else None)
            for i, n in enumerate(counts)
        )

    def grid(self, steps: int) -> Array:
        """The times of a network of `steps` steps, [steps + 1] from t_max down: every so many of
        the first teacher's.

        Raises Refused where its steps are no part of them.
        """
        whole = self.first_steps or self.teacher_steps
        if steps < 1 or whole % steps:
            raise Refused(
                f"steps={steps}: expected a divisor of the first teacher's {whole} steps, on whose grid all are trained"
            )
        return self.process.grid(whole)[:: whole // steps]

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """Algorithm 2, for a student of `student_steps` and a teacher of twice as many."""
        x0 = ctx.batch["x"]
        cond = ctx.batch.get("cond")
        null = ctx.batch.get("null_cond")
        index = jax.random.randint(ctx.key("t"), x0.shape[:1], 1, self.student_steps + 1)
        t, middle, s = (self.grid(self.teacher_steps)[::-1][2 * index - half] for half in (0, 1, 2))
        eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
        xt = self.process.add_noise(x0, eps, t)
        teacher = lambda x, t: guided(net.teacher, x, t, cond, null, self.guidance)
        xm = ode.advance("ddim", self.process, teacher, xt, t, middle)
        xs = ode.advance("ddim", self.process, teacher, xm, middle, s)

        (a_t, s_t), (a_s, s_s) = (self.process.alpha_sigma(time) for time in (t, s))
        ratio = expand(s_s / s_t, x0)
        target = jax.lax.stop_gradient(
            (xs - ratio * xt) / (expand(a_s, x0) - ratio * expand(a_t, x0))
        )
        error = jnp.mean((net.student(xt, t, cond).x0 - target) ** 2, axis=range(1, x0.ndim))
        return Out(jnp.mean(lookup(WEIGHTS, self.weight, "weight")(a_t, s_t) * error))

    def sampling_times(self, steps: int) -> Array:
        return ode.chain_times("ddim", self.process, steps, self.grid(steps))

    def sample(self, net, noise, cond, key, steps):
        denoise = lambda x, t: net(x, t, cond)
        return ode.solve(
            "ddim", self.process, denoise, self.process.start(noise), steps, key, self.grid(steps)
        )


def promote(nets, params, batch):
    """Surgery: the student becomes the teacher, and goes on from there."""
    if nets["student"].adapts:
        raise Refused(
            "roles.student.lora: a progressively distilled student has full weights, since it becomes a teacher"
        )
    return {**nets, "teacher": nets["student"]}, {**params, "teacher": params["student"]}
