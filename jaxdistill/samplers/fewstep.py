"""Samplers of few-step students: `(net, noise, times, key) -> x0`, `net(x, t[B]) -> Pred` with its condition bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Refused
from jaxdistill.diffusion.process import Process, expand
from jaxdistill.samplers import ode
from jaxdistill.samplers.ode import Denoise


def first_times(times: tuple[float, ...], steps: int) -> Array:
    """The first `steps` of a student's sampling times, [steps]. Raises Refused where it has fewer."""
    if not 1 <= steps <= len(times):
        raise Refused(f"steps={steps}: expected 1 to {len(times)}, since method.student_times={times}")
    return jnp.array(times[:steps])


def renoise(process: Process, net: Denoise, noise: Array, times: Array, key: Array) -> Array:
    """Consistency / DMD2 sampling: predict x0 at each of `times` [N], re-noise it with fresh noise to the next.

    `noise` [B ...] is unit Gaussian; the chain starts from pure noise, seen as a state at times[0].
    """
    xt, t = simulate(process, net, noise, times, key, len(times) - 1)
    return net(xt, t).x0


def simulate(
    process: Process, net: Denoise, noise: Array, times: Array, key: Array, index: Array | int, solver: str = ""
) -> tuple[Array, Array]:
    """The state (x_t [B ...], t [B]) that a student's chain brings to its step number `index`, which may be traced.

    From one time to the next it re-noises its x0 with fresh noise; or takes the step of a `solver` of samplers/ode.py without
    memory, in which case `key` is not read. "ddim" is Euler's on rectified flow, whatever the shift.
    """

    def body(i, x):
        t = jnp.full(x.shape[:1], times[i])
        if solver:
            return ode.advance(solver, process, net, x, t, jnp.full(x.shape[:1], times[i + 1]))
        x0 = net(x, t).x0
        fresh = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        return process.add_noise(x0, fresh, times[i + 1])

    xt = jax.lax.fori_loop(0, index, body, process.start(noise))
    return xt, jnp.full(noise.shape[:1], times[index])


def jump(net, noise: Array, times: Array) -> Array:
    """Average-velocity sampling (MeanFlow): x_r = x_t - (t - r) u(x_t, r, t) along `times` [N + 1], flow time.

    `net(x, t[B], r=r[B]) -> Pred` whose `v` is the average velocity from r to t.
    """

    def body(x, inp):
        t, r = (jnp.full(x.shape[:1], s) for s in inp)
        return x - expand(t - r, x) * net(x, t, r=r).v, None

    x, _ = jax.lax.scan(body, noise, (times[:-1], times[1:]))
    return x
