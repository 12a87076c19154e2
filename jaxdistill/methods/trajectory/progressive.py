"""Progressive distillation (arXiv:2202.00512): a student takes in one DDIM step what its teacher takes in two.

Each stage halves the number of steps, and its student is the next stage's teacher. The target is the x0 from which one
DDIM step lands where the teacher's two do, so a perfect student reproduces its teacher exactly.
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

WEIGHTS = {"truncated_snr": weighting.truncated_snr, "snr_plus_one": weighting.vp_velocity}  # of the error of x0, section 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressive(Method):
    process: Process = Flow()
    teacher_steps: int = 32  # DDIM steps of the teacher, a power of two times student_steps
    student_steps: int = 1  # of the last student
    weight: str = "truncated_snr"  # truncated_snr: max(SNR, 1) | snr_plus_one
    guidance: float = 1.0  # of the first teacher

    def __post_init__(self):
        if self.student_steps < 1 or self.halvings < 1 or self.student_steps * 2**self.halvings != self.teacher_steps:
            raise Refused(f"method.teacher_steps={self.teacher_steps}: expected 2, 4, 8, ... times student_steps={self.student_steps}")

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
        make = lambda i, n: dataclasses.replace(self, teacher_steps=2 * n, student_steps=n, guidance=1.0 if i else self.guidance)
        return tuple(Stage(make(i, n), lengths[i], surgery=promote if i else None) for i, n in enumerate(counts))

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        """Algorithm 2, for a student of `student_steps` and a teacher of twice as many."""
        x0, cond, null = ctx.batch["x"], ctx.batch.get("cond"), ctx.batch.get("null_cond")
        low, size = self.process.t_min, (self.process.t_max - self.process.t_min) / self.student_steps
        index = jax.random.randint(ctx.key("t"), x0.shape[:1], 1, self.student_steps + 1)
        t, middle, s = (low + size * (index - part) for part in (0.0, 0.5, 1.0))
        eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
        xt = self.process.add_noise(x0, eps, t)
        teacher = lambda x, t: guided(net.teacher, x, t, cond, null, self.guidance)
        xm = ode.advance("ddim", self.process, teacher, xt, t, middle)
        xs = ode.advance("ddim", self.process, teacher, xm, middle, s)

        (a_t, s_t), (a_s, s_s) = (self.process.alpha_sigma(time) for time in (t, s))
        ratio = expand(s_s / s_t, x0)
        target = jax.lax.stop_gradient((xs - ratio * xt) / (expand(a_s, x0) - ratio * expand(a_t, x0)))
        error = jnp.mean((net.student(xt, t, cond).x0 - target) ** 2, axis=range(1, x0.ndim))
        return Out(jnp.mean(lookup(WEIGHTS, self.weight, "weight")(a_t, s_t) * error))

    def sampling_times(self, steps: int) -> Array:
        return ode.chain_times("ddim", self.process, steps)

    def sample(self, net, noise, cond, key, steps):
        return ode.solve("ddim", self.process, lambda x, t: net(x, t, cond), self.process.start(noise), steps, key)


def promote(nets, params, batch):
    """Surgery: the student becomes the teacher, and goes on from there."""
    if nets["student"].adapts:
        raise Refused("roles.student.lora: a progressively distilled student has full weights, since it becomes a teacher")
    return {**nets, "teacher": nets["student"]}, {**params, "teacher": params["student"]}
