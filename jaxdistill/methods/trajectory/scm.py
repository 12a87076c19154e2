"""sCM - Simplified, stabilised and scaled continuous-time consistency models (arXiv:2410.11081).

The consistency function f(x, t) = cos t x - sin t sigma_d F(x, t) is constant along the
probability-flow ODE, so its total derivative, one JVP, is the error: F is pushed along the tangent
g = cos t df/dt, normalised, and warmed up from plain velocity regression. Any network serves: F =
velocity / sigma_d of its prediction, read in the trigonometric process.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdistill.core.fields import Natural
from jaxdistill.core.needs import Spec
from jaxdistill.core.types import Array, Ctx, Nets, Out, Refused, Turn, lookup
from jaxdistill.diffusion.denoiser import guided
from jaxdistill.diffusion.process import Trig, expand
from jaxdistill.diffusion.tangent import DERIVATIVES
from jaxdistill.diffusion.times import LogNormalSNR, Uniform
from jaxdistill.methods._fewstep import FewStep
from jaxdistill.objectives import consistency


@dataclasses.dataclass(frozen=True, kw_only=True)
class SCT(FewStep):
    """Consistency training, without a teacher: dx/dt is the velocity of the sample's own path."""

    process: Trig = Trig(sigma_data=0.5)
    # distribution of t, by sigma_d tan t
    times: Uniform = LogNormalSNR(mean=-1.0, std=1.4)
    # steps over which the tangent's second part grows to its full weight
    tangent_warmup: Natural = 10_000
    # c of the normalised tangent g / (rms(g) + c)
    tangent_c: float = 0.1
    # times of sampling, falling; N steps use the first N
    student_times: tuple[float, ...] = (math.pi / 2, 1.1)
    # jvp | central, for networks whose kernels have no JVP
    derivative: str = "jvp"

    needs = {"x": Float[Spec, "B *shape"]}
    inits = {"student": None, "weight": None}
    frozen = ()

    def __post_init__(self):
        super().__post_init__()
        if self.tangent_warmup < 1:
            given = f"method.tangent_warmup={self.tangent_warmup}"
            raise Refused(f"{given}: expected a positive integer")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student", "weight"), self.loss),)

    def velocity(self, net: Nets, ctx: Ctx, xt: Array, t: Array, v: Array) -> Array:
        """dx/dt at x_t, from the velocity `v` of the sample's own path."""
        return v

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        cond = ctx.batch.get("cond")
        t = self.times.draw(self.process, ctx.key("t"), x0.shape[0])
        eps = jax.random.normal(ctx.key("eps"), x0.shape, x0.dtype)
        xt = self.process.add_noise(x0, eps, t)
        v = self.velocity(net, ctx, xt, t, self.process.velocity(x0, eps, t))

        sd = self.process.sigma_data
        warm = jnp.minimum(1.0, ctx.step / self.tangent_warmup)
        cos = jnp.cos(expand(t, xt))
        sin = jnp.sin(expand(t, xt))
        student = lambda x, t: net.student(x, t, cond).v / sd
        derivative = lookup(DERIVATIVES, self.derivative, "derivative")
        direction = (cos * sin * v, jnp.cos(t) * jnp.sin(t))
        f, df = derivative(student, (xt, t), direction)  # df = cos t sin t dF/dt
        # algorithm 1
        g = -(cos**2) * (sd * f - v) - warm * (cos * sin * xt + sd * df)
        g = consistency.normalise_tangent(g, self.tangent_c)

        error = consistency.tangent_surrogate(f, g) / math.prod(x0.shape[1:])
        prior = 1 / (sd * jnp.tan(t))
        w = net.weight(t)
        loss = jnp.mean(jnp.exp(w) * prior * error - w)  # eq. 8
        return Out(loss, {"tangent": jnp.mean(error)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SCM(SCT):
    """Consistency distillation: dx/dt is the teacher's, guided."""

    # guidance scale of the teacher
    guidance: float = 1.0

    inits = {"student": "teacher", "weight": None}
    frozen = ("teacher",)

    def velocity(self, net, ctx, xt, t, v):
        cond = ctx.batch.get("cond")
        null_cond = ctx.batch.get("null_cond")
        return guided(net.teacher, xt, t, cond, null_cond, self.guidance).v
