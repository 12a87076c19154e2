"""Samplers of few-step students: `(net, noise, times, key) -> x0`, `net(x, t[B]) -> Pred` with its
condition bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Refused, lookup
from jaxdistill.diffusion.process import Process, expand
from jaxdistill.samplers import ode
from jaxdistill.samplers.ode import Denoise


def falling(times: Sequence[float], top: float) -> bool:
    """Whether `times` fall, all of them above 0 and at most `top`."""
    return all(0 < t <= top for t in times) and all(a > b for a, b in itertools.pairwise(times))


def first_times(times: tuple[float, ...], steps: int) -> Array:
    """The first `steps` of a student's sampling times, [steps]. Raises Refused where it has fewer."""
    if not 1 <= steps <= len(times):
        raise Refused(
            f"steps={steps}: expected 1 to {len(times)}, since method.student_times={times}"
        )
    return jnp.array(times[:steps])


def renoise(
    process: Process, net: Denoise, noise: Array, times: Array, key: Array, solver: str = ""
) -> Array:
    """Consistency / DMD2 sampling: predict x0 at each of `times` [N], re-noise it with fresh noise
    to the next, or take the step of a `solver` there (see `simulate`).

    `noise` [B ...] is unit Gaussian; the chain starts from pure noise, seen as a state at times[0].
    """
    xt, t = simulate(process, net, noise, times, key, len(times) - 1, solver)
    return net(xt, t).x0


def simulate(
    process: Process,
    net: Denoise,
    noise: Array,
    times: Array,
    key: Array,
    index: Array | int,
    solver: str = "",
) -> tuple[Array, Array]:
    """The state (x_t [B ...], t [B]) that a student's chain brings to its step number `index`,
    which may be traced.

    From one time to the next it re-noises its x0 with fresh noise; or takes the step of a `solver`
    of samplers/ode.py without memory, in which case `key` is not read. "ddim" is Euler's on
    rectified flow, whatever the shift.
    """

    def body(i, x):
        t = jnp.full(x.shape[:1], times[i])
        if solver:
            return ode.advance(solver, process, net, x, t, jnp.full(x.shape[:1], times[i + 1]))
        return _again(process, net, x, t, times[i + 1], jax.random.fold_in(key, i))

    xt = jax.lax.fori_loop(0, index, body, process.start(noise))
    return xt, jnp.full(noise.shape[:1], times[index])


def _again(process: Process, net: Denoise, x: Array, t: Array, r: Array, key: Array) -> Array:
    """x0 at t [B], re-noised with fresh noise to r."""
    return process.add_noise(net(x, t).x0, jax.random.normal(key, x.shape, x.dtype), r)


def chain(
    process: Process, net: Denoise, noise: Array, times: Array, key: Array
) -> tuple[Array, Array]:
    """All of a renoising chain: (its states at `times`, [N B ...]; the x0 that it ends with). As
    `simulate` and `renoise`.
    """

    def body(x, inp):
        i, t, r = inp
        return _again(process, net, x, jnp.full(x.shape[:1], t), r, jax.random.fold_in(key, i)), x

    last, states = jax.lax.scan(
        body, process.start(noise), (jnp.arange(len(times) - 1), times[:-1], times[1:])
    )
    return jnp.concatenate([states, last[None]]), net(last, jnp.full(noise.shape[:1], times[-1])).x0


AIMS = {"any": lambda t, s: s, "few": lambda t, s: jnp.zeros_like(t), "mul": lambda t, s: t}


def jump(
    net,
    noise: Array,
    times: Array,
    key: Array | None = None,
    *,
    style: str = "any",
    fresh: float = 0.0,
    extrapolate: float = 0.0,
) -> Array:
    """Average-velocity sampling (MeanFlow): x_s = x_t - (t - s) u(x_t, r, t) along `times` [N + 1]
    or [N + 1, B], flow time.

    `net(x, t[B], r=r[B]) -> Pred` whose `v` is the average velocity from r to t. The `style` says
    what r is (UCGM, arXiv:2505.07447): "any" the next time, "few" 0 (consistency sampling), "mul" t
    (the flow's ODE). A share `fresh` of the variance of the next state's noise is drawn anew (1 is
    `renoise`), and from the third step on its x0 and noise go beyond what is predicted by
    `extrapolate` times their change since the last step; a state at 0 is a sample, and is as
    predicted. Raises Refused on an unknown style.
    """
    aim = lookup(AIMS, style, "style")

    def body(carry, inp):
        x, *last = carry
        i, t, s = inp
        t = jnp.full(x.shape[:1], t)
        s = jnp.full(x.shape[:1], s)
        pred = net(x, t, r=aim(t, s))
        if not fresh and not extrapolate:
            return (x - expand(t - s, x) * pred.v, *last), None
        beyond = expand(jnp.where((i > 1) & (s > 0), extrapolate, 0.0), x)
        x0, eps = (p + beyond * (p - q) for p, q in zip((pred.x0, pred.eps), last))
        if fresh:
            anew = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
            eps = (1 - fresh) ** 0.5 * eps + fresh**0.5 * anew
        return ((1 - expand(s, x)) * x0 + expand(s, x) * eps, pred.x0, pred.eps), None

    zero = jnp.zeros_like(noise)
    (x, *_), _ = jax.lax.scan(
        body, (noise, zero, zero), (jnp.arange(len(times) - 1), times[:-1], times[1:])
    )
    return x


def warped_times(
    steps: int,
    gaps: tuple[float, float] = (0.0, 0.0),
    warp: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Array:
    """UCGM's grid, [steps + 1] from 1 - k(gaps[0]) down to 0: even in k^-1(1 - t), k(u) = (1 - (1 -
    u^a)^b)^c for warp (a, b, c) (Kumaraswamy's law; 1, 1, 1 is no warp). The last jump to 0 is made
    from 1 - k(1 - gaps[1]), for gaps[1] = 0 from a step like the others. Raises Refused where there
    is no step, or a gap is none.
    """
    first, last = gaps
    if steps < 1 or not (first >= 0 and last >= 0 and first + last < 1):
        raise Refused(
            f"steps={steps}, gaps={gaps}: expected at least one step, and gaps of sum below 1"
        )
    a, b, c = warp
    even = jnp.linspace(first, 1 - last, steps + (last == 0))[:steps]
    return jnp.append(1 - (1 - (1 - even**a) ** b) ** c, 0.0)
