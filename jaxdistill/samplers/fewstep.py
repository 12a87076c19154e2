"""Samplers of few-step students: `(net, noise, times, key) -> x0`, `net(x, t[B]) -> Pred` with its condition bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Refused
from jaxdistill.diffusion.process import Process, expand
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


def simulate(process: Process, net: Denoise, noise: Array, times: Array, key: Array, index: Array | int) -> tuple[Array, Array]:
    """The state (x_t [B ...], t [B]) that a renoising chain brings to its step number `index`, which may be traced."""

    def body(i, x):
        x0 = net(x, jnp.full(x.shape[:1], times[i])).x0
        fresh = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        return process.add_noise(x0, fresh, times[i + 1])

    xt = jax.lax.fori_loop(0, index, body, process.start(noise))
    return xt, jnp.full(noise.shape[:1], times[index])


def chain(process: Process, net: Denoise, noise: Array, times: Array, key: Array) -> tuple[Array, Array]:
    """All of a renoising chain: (its states at `times`, [N B ...]; the x0 that it ends with). As `simulate` and `renoise`."""

    def body(x, inp):
        i, t, r = inp
        fresh = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        return process.add_noise(net(x, jnp.full(x.shape[:1], t)).x0, fresh, r), x

    last, states = jax.lax.scan(body, process.start(noise), (jnp.arange(len(times) - 1), times[:-1], times[1:]))
    return jnp.concatenate([states, last[None]]), net(last, jnp.full(noise.shape[:1], times[-1])).x0


def jump(net, noise: Array, times: Array) -> Array:
    """Average-velocity sampling (MeanFlow): x_r = x_t - (t - r) u(x_t, r, t) along `times` [N + 1], flow time.

    `net(x, t[B], r=r[B]) -> Pred` whose `v` is the average velocity from r to t.
    """

    def body(x, inp):
        t, r = (jnp.full(x.shape[:1], s) for s in inp)
        return x - expand(t - r, x) * net(x, t, r=r).v, None

    x, _ = jax.lax.scan(body, noise, (times[:-1], times[1:]))
    return x
