"""Samplers of few-step students: `(net, noise, times, key) -> x0`, `net(x, t[B]) -> Pred` with its condition bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array
from jaxdistill.diffusion.process import Process, expand
from jaxdistill.samplers.ode import Denoise


def renoise(process: Process, net: Denoise, noise: Array, times: Array, key: Array) -> Array:
    """Consistency / DMD2 sampling: predict x0 at each of `times` [N], re-noise it with fresh noise to the next.

    `noise` is unit Gaussian; times[0] is where the chain starts.
    """
    x0 = renoise_chain(process, net, noise, times, key)
    return x0[-1]


def renoise_chain(process: Process, net: Denoise, noise: Array, times: Array, key: Array) -> Array:
    """All predictions [N, B ...] of the chain, for back-simulation and roll-outs."""

    def body(x, inp):
        i, t, s = inp
        x0 = net(x, jnp.full(x.shape[:1], t)).x0
        fresh = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        return process.add_noise(x0, fresh, jnp.full(x.shape[:1], s)), x0

    n = len(times)
    start = process.add_noise(jnp.zeros_like(noise), noise, times[:1].repeat(noise.shape[0]))
    _, path = jax.lax.scan(body, start, (jnp.arange(n), times, jnp.append(times[1:], times[-1])))
    return path


def jump(net, noise: Array, times: Array) -> Array:
    """Average-velocity sampling (MeanFlow): x_r = x_t - (t - r) u(x_t, r, t) along `times` [N + 1], flow time.

    `net(x, t[B], r=r[B]) -> Pred` whose `v` is the average velocity from r to t.
    """

    def body(x, inp):
        t, r = (jnp.full(x.shape[:1], s) for s in inp)
        return x - expand(t - r, x) * net(x, t, r=r).v, None

    x, _ = jax.lax.scan(body, noise, (times[:-1], times[1:]))
    return x
