"""Deterministic solvers of the probability-flow ODE, and DDIM's stochastic relative.

A solver gives a step `(denoise, x, memory, t, s, key, at) -> (x, memory)` from time t to s < t;
`sample` scans it over a grid of times. `denoise(x, t[B]) -> Pred` has condition and guidance bound.
`memory` is what a multistep solver keeps between steps: the last x0, and the last step in lambda.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key, Shaped

from jaxdistill.core.types import Array, Refused, lookup
from jaxdistill.diffusion.process import Flow, Pred, Process, expand

Denoise = Callable[[Array, Array], Pred]
Memory = dict[str, Array]


class At(NamedTuple):
    """The position of a step in its grid of `n` steps."""

    first: Bool[Array, ""]
    last: Bool[Array, ""]
    n: int


Step = Callable[
    [Denoise, Array, Memory, Array, Array, Array, At], tuple[Array, Memory]
]


def sample(
    step: Step,
    denoise: Denoise,
    x: Float[Array, "B ..."],
    times: Shaped[Array, " N"],
    key: Key[Array, ""] | None = None,
    *,
    trajectory: bool = False,
) -> Float[Array, "B ..."] | Float[Array, "N B ..."]:
    """The state at the end of steps along `times`, or with `trajectory` the states at all times."""
    keep = (lambda before, pred, after: after) if trajectory else None
    end, path = _scan(step, denoise, x, times, key, keep)
    return jnp.concatenate([x[None], path]) if trajectory else end


def _scan(
    step: Step,
    denoise: Denoise,
    x: Array,
    times: Array,
    key: Array | None,
    keep: Callable[[Array, Pred, Array], Any] | None,
) -> tuple[Array, Any]:
    """The state after steps along `times`, and what `keep` gives of each, stacked.

    `keep(state before, prediction there, state after)`; None: nothing.
    """
    key = jax.random.key(0) if key is None else key
    n = len(times) - 1

    def body(
        carry: tuple[Array, Memory], inputs: tuple[Array, ...]
    ) -> tuple[Any, Any]:
        i, t, s = inputs
        t = jnp.full(x.shape[:1], t)
        s = jnp.full(x.shape[:1], s)
        at = At(i == 0, i == n - 1, n)
        preds = []

        def recording(x: Array, t: Array) -> Pred:
            preds.append(denoise(x, t))
            return preds[-1]

        after = step(recording, *carry, t, s, jax.random.fold_in(key, i), at)
        return after, None if keep is None else keep(carry[0], preds[0], after[0])

    inputs = (jnp.arange(n), times[:-1], times[1:])
    (end, _), kept = jax.lax.scan(body, (x, _memory(x, x.dtype)), inputs)
    return end, kept


class Recorded(NamedTuple):
    """The path of a solver: its states, and the predictions that made each next one."""

    times: Shaped[Array, " N"]  # of the states
    states: Float[Array, "N B ..."]
    preds: Pred  # at the states, stacked
    end: Float[Array, "B ..."]  # the state after the last step

    def at(self, index: Int[Array, " B"]) -> tuple[Array, Array, Pred]:
        """(state, time [B], prediction) of each sample before a step of its own."""
        samples = jnp.arange(len(index))
        preds = jax.tree.map(lambda leaf: leaf[index, samples], self.preds)
        return self.states[index, samples], self.times[index], preds


def record(
    step: Step,
    denoise: Denoise,
    x: Float[Array, "B ..."],
    times: Shaped[Array, " N"],
    key: Key[Array, ""] | None = None,
) -> Recorded:
    """The path of `sample`: the states before each of its N - 1 steps, and the predictions there.

    `denoise` may be guided, with a scale for each sample (`diffusion.denoiser.guided`). Of solvers
    that evaluate the network more than once a step the first prediction is kept, that at the state.
    """
    keep = lambda before, pred, after: (before, pred)
    end, (states, preds) = _scan(step, denoise, x, times, key, keep)
    return Recorded(times[:-1], states, preds, end)


def _memory(x: Array, dtype: Any) -> Memory:
    return {"x0": jnp.zeros_like(x), "h": jnp.ones(x.shape[:1], dtype)}


def euler(
    denoise: Denoise,
    x: Array,
    memory: Memory,
    t: Array,
    s: Array,
    key: Array,
    at: At,
) -> tuple[Array, Memory]:
    """x + (s - t) v."""
    return x + expand(s - t, x) * denoise(x, t).v, memory


def heun(
    denoise: Denoise,
    x: Array,
    memory: Memory,
    t: Array,
    s: Array,
    key: Array,
    at: At,
) -> tuple[Array, Memory]:
    """Second order: an Euler step, then the mean of the slopes at both ends.

    It evaluates the network twice a step, 2N - 1 times in all: the last step is Euler's, since eps
    is singular at sigma = 0.
    """
    slope = denoise(x, t).v
    ahead = x + expand(s - t, x) * slope

    def corrected() -> Array:
        return x + expand(s - t, x) * 0.5 * (slope + denoise(ahead, s).v)

    return jax.lax.cond(at.last, lambda: ahead, corrected), memory


def ddim(process: Process, eta: float = 0.0) -> Step:
    """Renoises the predicted x0 with the predicted eps, or partly with fresh noise.

    eta = 0 is DDIM, eta = 1 DDPM's posterior.
    """

    def step(
        denoise: Denoise,
        x: Array,
        memory: Memory,
        t: Array,
        s: Array,
        key: Array,
        at: At,
    ) -> tuple[Array, Memory]:
        pred = denoise(x, t)
        alpha_t, sigma_t = process.alpha_sigma(expand(t, x))
        alpha_s, sigma_s = process.alpha_sigma(expand(s, x))
        if eta == 0.0:
            return alpha_s * pred.x0 + sigma_s * pred.eps, memory
        ratio = alpha_t * sigma_s / (alpha_s * sigma_t)
        fresh = eta * sigma_s * jnp.sqrt(jnp.maximum(1 - ratio**2, 0.0))
        kept = jnp.sqrt(jnp.maximum(sigma_s**2 - fresh**2, 0.0))
        noise = jax.random.normal(key, x.shape, x.dtype)
        return alpha_s * pred.x0 + kept * pred.eps + fresh * noise, memory

    return step


def dpmpp_2m(process: Process) -> Step:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2.

    It is of first order at the first step, at the last of fewer than 15, and where a step ends at
    sigma = 0, which is infinitely long in lambda.
    """

    def step(
        denoise: Denoise,
        x: Array,
        memory: Memory,
        t: Array,
        s: Array,
        key: Array,
        at: At,
    ) -> tuple[Array, Memory]:
        x0 = denoise(x, t).x0
        alpha_t, sigma_t = process.alpha_sigma(expand(t, x))
        alpha_s, sigma_s = process.alpha_sigma(expand(s, x))
        h = process.lam(s) - process.lam(t)
        back = expand(0.5 * h / memory["h"], x)
        first_order = at.first | (at.last & (at.n < 15)) | (sigma_s == 0)
        d = jnp.where(first_order, x0, (1 + back) * x0 - back * memory["x0"])
        # -alpha_s (e^{-h} - 1) d with e^{-h} = alpha_t sigma_s / (alpha_s sigma_t), which is finite
        # for sigma_s = 0
        x = sigma_s / sigma_t * x + (alpha_s - alpha_t * sigma_s / sigma_t) * d
        return x, {"x0": x0, "h": h}

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
    x: Float[Array, "B ..."],
    steps: int,
    key: Key[Array, ""] | None = None,
    grid: Shaped[Array, " {steps}+1"] | None = None,
) -> Float[Array, "B ..."]:
    """The state after `steps` steps of the solver called `name`.

    Args:
      grid: times; None: those of the process.

    Raises:
      Refused: on a name that is not in SOLVERS.
    """
    step = lookup(SOLVERS, name, "solver")(process)
    return sample(
        step, denoise, x, process.grid(steps) if grid is None else grid, key
    )


def chain_times(
    name: str,
    process: Process,
    steps: int,
    grid: Shaped[Array, " {steps}+1"] | None = None,
) -> Shaped[Array, " {steps}"]:
    """The times at which a solver evaluates the network, where it only renoises x0 with its own
    eps from one to the next.

    Such solvers are "ddim", and "euler" on rectified flow.

    Args:
      grid: times; None: those of the process.

    Raises:
      Refused: on other solvers, and where the last state is not x0.
    """
    if name != "ddim" and (name != "euler" or process != Flow()):
        raise Refused(f"solver={name}: more than a chain of x0 at fixed times")
    *times, last = process.grid(steps) if grid is None else grid
    level = float(process.alpha_sigma(last)[1])
    if level > 1e-6:
        found = f"{type(process).__name__} ends with noise of level {level:.3g}"
        raise Refused(f"solver={name}: {found}, not at x0")
    return jnp.stack(times)


def advance(
    name: str,
    process: Process,
    denoise: Denoise,
    x: Float[Array, "B ..."],
    t: Float[Array, " B"],
    s: Float[Array, " B"],
) -> Float[Array, "B ..."]:
    """One step of the solver called `name` from times t to s, each sample with its own."""
    step = lookup(SOLVERS, name, "solver")(process)
    at = At(jnp.array(True), jnp.array(False), 1)
    return step(denoise, x, _memory(x, t.dtype), t, s, jax.random.key(0), at)[0]


def straightness(
    denoise: Denoise, x: Float[Array, "B ..."], times: Float[Array, " N"]
) -> Float[Array, ""]:
    """int E ||(x_1 - x_0) - v(x_t, t)||^2 dt along the ODE's own paths, in flow time.

    The paths are Heun's on `times` that fall from 1 to 0; the norm is summed over dimensions. It is
    0 where a single Euler step is exact (rectified flow, arXiv:2209.03003).
    """
    path = sample(heun, denoise, x, times, trajectory=True)

    def velocity(state: tuple[Array, Array]) -> Array:
        x, t = state
        return denoise(x, jnp.full(x.shape[:1], t)).v

    v = jax.lax.map(velocity, (path, times))
    error = jnp.sum((path[:1] - path[-1:] - v) ** 2, axis=range(2, path.ndim))
    lengths = -jnp.diff(times)[:, None]
    return jnp.mean(jnp.sum(lengths * (error[1:] + error[:-1]) / 2, 0))
