"""Samplers of few-step students: `(net, noise, times, key) -> x0`, with `net(x, t[B]) -> Pred` that
has its condition bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key, Shaped

from jaxdistill.core.types import Array, Refused, lookup
from jaxdistill.diffusion.process import Process, expand
from jaxdistill.samplers import ode
from jaxdistill.samplers.ode import Denoise


def falling(times: Sequence[float], top: float) -> bool:
    """Whether `times` fall, all of them above 0 and at most `top`."""
    inside = all(0 < t <= top for t in times)
    return inside and all(a > b for a, b in itertools.pairwise(times))


def first_times(times: tuple[float, ...], steps: int) -> Float[Array, " {steps}"]:
    """The first `steps` of a student's sampling times.

    Raises:
      Refused: where it has fewer.
    """
    if not 1 <= steps <= len(times):
        reason = f"since method.student_times={times}"
        raise Refused(f"steps={steps}: expected 1 to {len(times)}, {reason}")
    return jnp.array(times[:steps])


def renoise(
    process: Process,
    net: Denoise,
    noise: Float[Array, "B ..."],
    times: Shaped[Array, " N"],
    key: Key[Array, ""],
    solver: str = "",
) -> Float[Array, "B ..."]:
    """Consistency and DMD2 sampling: x0 at each of `times`, renoised to the next with fresh noise.

    With a `solver` its step leads to the next time instead, as in `simulate`.

    The chain starts from unit Gaussian `noise`, which stands for a state at times[0].
    """
    xt, t = simulate(process, net, noise, times, key, len(times) - 1, solver)
    return net(xt, t).x0


def simulate(
    process: Process,
    net: Denoise,
    noise: Float[Array, "B ..."],
    times: Shaped[Array, " N"],
    key: Key[Array, ""],
    index: int | Int[Array, ""],
    solver: str = "",
) -> tuple[Float[Array, "B ..."], Float[Array, " B"]]:
    """The state (x_t, t) of a student's sampling chain before its step number `index`.

    Args:
      index: may be traced.
      solver: "" renoises x0 with fresh noise to the next time. Otherwise a step of this solver of
        samplers/ode.py leads there, one that keeps nothing between steps; `key` is then not used.
        "ddim" is Euler's method on rectified flow, whatever the shift.
    """

    def step(i: Array, x: Array) -> Array:
        t = jnp.full(x.shape[:1], times[i])
        if solver:
            return ode.advance(
                solver, process, net, x, t, jnp.full(x.shape[:1], times[i + 1])
            )
        return _renoised(
            process, net, x, t, times[i + 1], jax.random.fold_in(key, i)
        )

    xt = jax.lax.fori_loop(0, index, step, process.start(noise))
    return xt, jnp.full(noise.shape[:1], times[index])


def chain(
    process: Process,
    net: Denoise,
    noise: Float[Array, "B ..."],
    times: Shaped[Array, " N"],
    key: Key[Array, ""],
) -> tuple[Float[Array, "N B ..."], Float[Array, "B ..."]]:
    """A complete renoising chain: its states at `times`, and its result.

    They are those of `simulate` and `renoise`.
    """

    def step(x: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        i, t, r = inputs
        t = jnp.full(x.shape[:1], t)
        return _renoised(process, net, x, t, r, jax.random.fold_in(key, i)), x

    inputs = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    last, states = jax.lax.scan(step, process.start(noise), inputs)
    x0 = net(last, jnp.full(noise.shape[:1], times[-1])).x0
    return jnp.concatenate([states, last[None]]), x0


def _renoised(
    process: Process, net: Denoise, x: Array, t: Array, r: Array, key: Array
) -> Array:
    """x0 at t [B], renoised with fresh noise to r."""
    return process.add_noise(
        net(x, t).x0, jax.random.normal(key, x.shape, x.dtype), r
    )


STYLES = {  # what `jump` gives the network as second time, from the time of the state and the next
    "any": lambda t, s: s,
    "few": lambda t, s: jnp.zeros_like(t),
    "mul": lambda t, s: t,
}


def jump(
    net: Callable,
    noise: Float[Array, "B ..."],
    times: Shaped[Array, " N"] | Shaped[Array, "N B"],
    key: Key[Array, ""] | None = None,
    *,
    style: str = "any",
    fresh: float = 0.0,
    extrapolate: float = 0.0,
) -> Float[Array, "B ..."]:
    """Average-velocity sampling (MeanFlow): x_s = x_t - (t - s) u(x_t, r, t) along `times`.

    Args:
      net: `net(x, t[B], r=r[B]) -> Pred`, whose `v` is the average velocity from r to t.
      times: of the flow, from the first to the last state; one sequence, or one for each sample.
      style: what r is (UCGM, arXiv:2505.07447): "any" the next time, "few" 0 (consistency
        sampling), "mul" t (the flow's ODE).
      fresh: share of the variance of the next state's noise that is drawn anew; 1 is `renoise`.
      extrapolate: from the third step on, the predicted x0 and noise are extrapolated by this
        multiple of their change since the last step. A state at time 0 is a sample, and is not
        extrapolated.

    Raises:
      Refused: on an unknown style.
    """
    second_time = lookup(STYLES, style, "style")

    def step(
        carry: tuple[Array, ...], inputs: tuple[Array, ...]
    ) -> tuple[tuple[Array, ...], None]:
        x, last_x0, last_eps = carry
        i, t, s = inputs
        t = jnp.full(x.shape[:1], t)
        s = jnp.full(x.shape[:1], s)
        pred = net(x, t, r=second_time(t, s))
        if not fresh and not extrapolate:
            return (x - expand(t - s, x) * pred.v, last_x0, last_eps), None
        beyond = expand(jnp.where((i > 1) & (s > 0), extrapolate, 0.0), x)
        x0 = pred.x0 + beyond * (pred.x0 - last_x0)
        eps = pred.eps + beyond * (pred.eps - last_eps)
        if fresh:
            new = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
            eps = (1 - fresh) ** 0.5 * eps + fresh**0.5 * new
        x = (1 - expand(s, x)) * x0 + expand(s, x) * eps
        return (x, pred.x0, pred.eps), None

    zero = jnp.zeros_like(noise)
    inputs = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    (x, _, _), _ = jax.lax.scan(step, (noise, zero, zero), inputs)
    return x


def warped_times(
    steps: int,
    gaps: tuple[float, float] = (0.0, 0.0),
    warp: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Float[Array, " {steps}+1"]:
    """UCGM's grid, from 1 - k(gaps[0]) down to 0.

    The times are even in k^-1(1 - t).

    Args:
      gaps: at the first time, and before 0: the last step, to 0, starts from 1 - k(1 - gaps[1]);
        for gaps[1] = 0 it is a step like the others.
      warp: (a, b, c) of k(u) = (1 - (1 - u^a)^b)^c (Kumaraswamy's distribution). (1, 1, 1) leaves
        the times even.

    Raises:
      Refused: where there is no step, or the gaps leave no time between them.
    """
    first, last = gaps
    if steps < 1 or not (first >= 0 and last >= 0 and first + last < 1):
        expected = "expected at least one step, and gaps of sum below 1"
        raise Refused(f"steps={steps}, gaps={gaps}: {expected}")
    a, b, c = warp
    even = jnp.linspace(first, 1 - last, steps + (last == 0))[:steps]
    return jnp.append(1 - (1 - (1 - even**a) ** b) ** c, 0.0)
