"""Closed forms for data N(mean, std^2 I), as networks that losses can call, and three steps of the
real train step.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.types import Ctx
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.process import Flow, Pred, Process, expand
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import TimeWeight
from tools.first_steps import first_steps


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Exact answers in `process` (00-foundations, section 4)."""

    process: Process = Flow()
    mean: float = 0.7
    std: float = 0.4

    def spread(self, t):
        a, s = self.process.alpha_sigma(t)
        return a, s, (a * self.std) ** 2 + s**2

    def flow(self, x, t, r):
        """x_r on the ODE trajectory through x_t."""
        (a, _, from_), (b, _, to) = (
            self.spread(expand(t, x)),
            self.spread(expand(r, x)),
        )
        return b * self.mean + jnp.sqrt(to / from_) * (x - a * self.mean)

    def denoise(self, x, t, cond=None, **kw):
        """E[x0 | x_t]: the teacher."""
        a, s, spread = self.spread(expand(t, x))
        offset = x - a * self.mean
        x0 = self.mean + a * self.std**2 / spread * offset
        eps = s / spread * offset
        v = self.process.velocity(x0, eps, t)
        return Pred(x0, eps, v, v)

    def consistent(self, x, t, cond=None, **kw):
        """The consistency function as x0, with the velocity that says so."""
        return self.process.from_x0(
            self.flow(x, t, jnp.full_like(t, self.process.t_min)), x, t
        )

    def average(self, x, t, cond=None, *, r):
        """The average velocity from r to t, and at r = t its limit."""
        gap = expand(t - r, x)
        safe = jnp.where(gap == 0, 1.0, gap)
        v = jnp.where(
            gap == 0, self.denoise(x, t).v, (x - self.flow(x, t, r)) / safe
        )
        return self.process.from_v(v, x, t)

    def draw(self, n, dim=2, seed=0):
        return jnp.asarray(
            self.mean
            + self.std * np.random.default_rng(seed).standard_normal((n, dim))
        )


@pytest.fixture
def gaussian():
    return Gaussian


@pytest.fixture
def context():
    """context(x, step=0, **more) -> Ctx with a batch."""

    def make(x, step=0, seed=0, **more):
        return Ctx({"x": x, **more}, jax.random.key(seed), jnp.asarray(step), {})

    return make


@pytest.fixture
def three_steps():
    """three_steps(method, second_time=False, **batch) runs the engine's step on tiny MLPs; exactly
    what should move does.
    """

    def run(method, second_time=False, **batch):
        wrap = functools.partial(Denoiser().wrap, process=method.process)
        mlp = lambda **kw: make_net(MLP(width=8, depth=1, **kw), wrap=wrap)
        nets = {
            "student": mlp(second_time=second_time),
            "teacher": mlp(),
            "weight": make_net(TimeWeight(width=8)),
        }
        nets = {
            role: nets.get(role) or mlp()
            for role in (*method.inits, *method.frozen)
        }
        start = {role: nets[role].init(jax.random.key(7)) for role in method.frozen}
        batch = {
            "x": jnp.asarray(
                np.random.default_rng(0).standard_normal((8, 2)), jnp.float32
            ),
            **batch,
        }
        states, metrics = first_steps(
            method, nets, optax.adam(1e-3), start, batch, 3
        )
        assert all(np.isfinite(v) for row in metrics for v in row.values()), metrics
        before, after = (
            (state.params, state.frozen) for state in (states[0], states[-1])
        )
        moved = lambda a, b: any(
            not np.array_equal(x, y)
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
        for role in method.inits:
            assert moved(before[0][role], after[0][role]), role
        assert not moved(before[1], after[1])
        return states[-1]

    return run
