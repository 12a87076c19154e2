"""Deterministic solvers of the probability-flow ODE, and DDIM's stochastic relative.

A step is `(denoise, x, memory, t, s, key, at) -> (x, memory)` from time t to s < t; `sample` scans
it over a grid. `denoise(x, t[B]) -> Pred` has condition and guidance already bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Refused, lookup
from jaxdistill.diffusion.process import Flow, Pred, Process, expand

Denoise = Callable[[Array, Array], Pred]


class At(NamedTuple):
    """Where a step stands in its grid of `n` steps."""

    first: Array  # bool []
    last: Array  # bool []
    n: int


def sample(
    step,
    denoise: Denoise,
    x: Array,
    times: Array,
    key: Array | None = None,
    *,
    trajectory: bool = False,
) -> Array:
    """Runs `step` along `times` [N + 1]; returns the end [B ...], or with `trajectory` all states
    [N + 1, B ...].
    """
    key = jax.random.key(0) if key is None else key
    n = len(times) - 1

    def body(carry, inp):
        i, t, s = inp
        t = jnp.full(x.shape[:1], t)
        s = jnp.full(x.shape[:1], s)
        carry = step(denoise, *carry, t, s, jax.random.fold_in(key, i), At(i == 0, i == n - 1, n))
        return carry, carry[0] if trajectory else None

    memory = {"x0": jnp.zeros_like(x), "h": jnp.ones(x.shape[:1], x.dtype)}
    (end, _), path = jax.lax.scan(body, (x, memory), (jnp.arange(n), times[:-1], times[1:]))
    return jnp.concatenate([x[None], path]) if trajectory else end


def euler(denoise, x, memory, t, s, key, at):
    """x + (s - t) v."""
    return x + expand(s - t, x) * denoise(x, t).v, memory


def heun(denoise, x, memory, t, s, key, at):
    """Second order: Euler, then the mean of both slopes. Two evaluations a step, 2N - 1 in all: the
    last step is plain Euler, since eps is singular at sigma = 0.
    """
    slope = denoise(x, t).v
    ahead = x + expand(s - t, x) * slope
    mean = lambda: x + expand(s - t, x) * 0.5 * (slope + denoise(ahead, s).v)
    return jax.lax.cond(at.last, lambda: ahead, mean), memory


def ddim(process: Process, eta: float = 0.0):
    """Re-noises the predicted x0 with the predicted eps (eta = 0), or partly with fresh noise (eta
    = 1: DDPM's posterior).
    """

    def step(denoise, x, memory, t, s, key, at):
        pred = denoise(x, t)
        (a_t, s_t), (a_s, s_s) = (
            process.alpha_sigma(expand(t, x)),
            process.alpha_sigma(expand(s, x)),
        )
        if eta == 0.0:
            return a_s * pred.x0 + s_s * pred.eps, memory
        fresh = eta * s_s * jnp.sqrt(jnp.maximum(1 - (a_t * s_s / (a_s * s_t)) ** 2, 0.0))
        kept = jnp.sqrt(jnp.maximum(s_s**2 - fresh**2, 0.0))
        return a_s * pred.x0 + kept * pred.eps + fresh * jax.random.normal(
            key, x.shape, x.dtype
        ), memory

    return step


def dpmpp_2m(process: Process):
    """DPM-Solver++(2M), arXiv:2211.01095 algorithm 2.

    First order at the first step, at the last of fewer than 15, and where it ends at sigma = 0 (an
    endless step in lambda).
    """

    def step(denoise, x, memory, t, s, key, at):
        x0 = denoise(x, t).x0
        (a_t, s_t), (a_s, s_s) = (
            process.alpha_sigma(expand(t, x)),
            process.alpha_sigma(expand(s, x)),
        )
        h = process.lam(s) - process.lam(t)
        back = expand(0.5 * h / memory["h"], x)
        first_order = at.first | (at.last & (at.n < 15)) | (s_s == 0)
        d = jnp.where(first_order, x0, (1 + back) * x0 - back * memory["x0"])
        # -a_s (e^{-h} - 1) d with e^{-h} = a_t s_s / (a_s s_t), so that sigma_s = 0 is finite
        return s_s / s_t * x + (a_s - a_t * s_s / s_t) * d, {"x0": x0, "h": h}

    return step


Solver = Literal["euler", "heun", "ddim", "dpmpp_2m"]  # a key of SOLVERS
SOLVERS = {
    "euler": lambda process: euler,
    "heun": lambda process: heun,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
}


@functools.partial(jax.named_call, name="solve")
def solve(
    name: str,
    process: Process,
    denoise: Denoise,
    x: Array,
    steps: int,
    key=None,
    grid: Array | None = None,
) -> Array:
    """`steps` steps of the solver called `name` (a key of SOLVERS) along the process's grid, or
    another one [steps + 1].

    Raises Refused on another name.
    """
    return sample(
        lookup(SOLVERS, name, "solver")(process),
        denoise,
        x,
        process.grid(steps) if grid is None else grid,
        key,
    )


def chain_times(name: str, process: Process, steps: int, grid: Array | None = None) -> Array:
    """The times [steps] at which a solver asks the network, where it only re-noises x0 with its own
    eps from one to the next:
    "ddim", and on rectified flow "euler"; on the process's grid, or another one [steps + 1]. Raises
    Refused on the others, and where the last state is not x0.
    """
    if name != "ddim" and (name != "euler" or process != Flow()):
        raise Refused(f"solver={name}: more than a chain of x0 at fixed times")
    *times, last = process.grid(steps) if grid is None else grid
    if (level := float(process.alpha_sigma(last)[1])) > 1e-6:
        raise Refused(
            f"solver={name}: {type(process).__name__} ends with noise of level {level:.3g}, not at x0"
        )
    return jnp.stack(times)


def advance(name: str, process: Process, denoise: Denoise, x: Array, t: Array, s: Array) -> Array:
    """One step of the solver called `name` from times t [B] to s [B], which may differ between
    samples.
    """
    memory = {"x0": jnp.zeros_like(x), "h": jnp.ones_like(t)}
    at = At(jnp.array(True), jnp.array(False), 1)
    return lookup(SOLVERS, name, "solver")(process)(
        denoise, x, memory, t, s, jax.random.key(0), at
    )[0]


def straightness(denoise: Denoise, x: Array, times: Array) -> Array:
    """int E ||(x_1 - x_0) - v(x_t, t)||^2 dt along the ODE's own paths, Heun's on `times` [N + 1]
    that fall from 1 to 0 []:
    0 where a single Euler step is exact (rectified flow, arXiv:2209.03003). Summed over dimensions,
    flow time.
    """
    path = sample(heun, denoise, x, times, trajectory=True)
    v = jax.lax.map(
        lambda state: denoise(state[0], jnp.full(x.shape[:1], state[1])).v, (path, times)
    )
    error = jnp.sum((path[:1] - path[-1:] - v) ** 2, axis=range(2, path.ndim))
    return jnp.mean(jnp.sum(-jnp.diff(times)[:, None] * (error[1:] + error[:-1]) / 2, 0))
