"""From a raw network to a `Pred`: what its output means, what its inputs want, and which process it
was trained on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Refused
from jaxdistill.diffusion.process import Flow, Pred, Process, Trig, expand, magnitude


@dataclasses.dataclass(frozen=True, kw_only=True)
class Velocity:
    """The output is dx_t/dt in the network's own process. Base of all parameterisations."""

    time_scale: float = 1.0  # the network is fed time_scale * t

    def inputs(self, process: Process, x: Array, t: Array) -> tuple[Array, Array]:
        """What the network is fed for (x_t, t)."""
        return x, self.time_scale * t

    def pred(self, process: Process, raw: Array, x: Array, t: Array, features=()) -> Pred:
        """What its output says."""
        return process.from_v(raw, x, t, raw, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Velocity):
    """The output is x0."""

    def pred(self, process, raw, x, t, features=()):
        return process.from_x0(raw, x, t, raw, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(Velocity):
    """The output is eps."""

    def pred(self, process, raw, x, t, features=()):
        return process.from_eps(raw, x, t, raw, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VPVelocity(Velocity):
    """The output is alpha eps - sigma x0, on a variance preserving process."""

    def pred(self, process, raw, x, t, features=()):
        a, s, da, ds = process.coefs(expand(t, x))
        x0 = a * x - s * raw
        eps = s * x + a * raw
        return Pred(x0, eps, da * x0 + ds * eps, raw, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMPrecond(Velocity):
    """EDM preconditioning, table 1 of arXiv:2206.00364, on the EDM process: D = c_skip x + c_out
    F(c_in x, c_noise).
    """

    sigma_data: float = 0.5

    def inputs(self, process, x, t):
        c_in = 1 / jnp.sqrt(expand(t, x) ** 2 + self.sigma_data**2)
        return c_in * x, jnp.log(t) / 4

    def pred(self, process, raw, x, t, features=()):
        s = expand(t, x)
        sd = self.sigma_data
        c_skip = sd**2 / (s**2 + sd**2)
        c_out = s * sd / jnp.sqrt(s**2 + sd**2)
        return process.from_x0(c_skip * x + c_out * raw, x, t, raw, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyPrecond(EDMPrecond):
    """EDM preconditioning shifted so that x0 = x at sigma_min, whatever the output
    (arXiv:2303.01469, appendix C).
    """

    def pred(self, process, raw, x, t, features=()):
        s = expand(t, x)
        sd = self.sigma_data
        gap = expand(t, x) - process.t_min
        c_skip = sd**2 / (gap**2 + sd**2)
        c_out = gap * sd / jnp.sqrt(s**2 + sd**2)
        return process.from_x0(c_skip * x + c_out * raw, x, t, raw, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrigPrecond(Velocity):
    """TrigFlow: the network sees x / sigma_data, the velocity is sigma_data F (arXiv:2410.11081)."""

    def inputs(self, process: Trig, x, t):
        return x / process.sigma_data, self.time_scale * t

    def pred(self, process, raw, x, t, features=()):
        return process.from_v(process.sigma_data * raw, x, t, raw, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """How a network is read: its parameterisation and the process it was trained on.

    `wrap(call, process)` turns `(x, t, cond, **kw) -> raw | (raw, features)` into `(x, t, cond, **kw)
    -> Pred` for a
    caller who works in `process`. Where the two processes differ, the network is queried at the
    time of equal signal-to-noise ratio on the rescaled sample (schedule equivalence), and its x0
    and eps are read unchanged. Beyond the ends of its own process it is queried at the end. A
    second time `r` (average-velocity networks) is warped like `t`. Times may be negative, the twins
    of |t| (TwinFlow, arXiv:2512.05150): the network is fed their sign, and everything else is
    computed at |t|.
    """

    param: Velocity = Velocity()
    native: Process = Flow()
    # networks of one time are fed t - fold r in place of (t, r): TwinFlow's LoRA 0.5; 0: r goes in
    # by itself
    fold: float = 0.0

    def own_time(self, process: Process, t: Array) -> Array:
        """The network's time, within its ends, of equal signal-to-noise ratio as t >= 0 of
        `process`.
        """
        return jnp.clip(self.native.time(process.angle(t)), self.native.t_min, self.native.t_max)

    def own_scale(self, process: Process, t: Array) -> Array:
        """What a state of `process` at t >= 0 is multiplied by to be one of the network's process
        at that time.
        """
        size = lambda p, t: jnp.sqrt(sum(c**2 for c in p.alpha_sigma(t)))
        return size(self.native, self.own_time(process, t)) / size(process, t)

    def wrap(self, call, process: Process):
        def denoise(x: Array, t: Array, cond=None, *, r: Array | None = None, **kw) -> Pred:
            xn = x
            tn = t
            rn = r
            if process != self.native:
                own = lambda t: self.own_time(process, magnitude(t))
                warp = lambda t: jnp.where(t < 0, -own(t), own(t))
                tn = warp(t)
                rn = None if r is None else warp(r)
                xn = x * expand(self.own_scale(process, magnitude(t)), x)
            x_in, t_in = self.param.inputs(self.native, xn, tn)
            if r is not None:
                r_in = self.param.inputs(self.native, xn, rn)[1]
                t_in, kw = (t_in - self.fold * r_in, kw) if self.fold else (t_in, {**kw, "r": r_in})
            out = call(x_in, t_in, cond, **kw)
            raw, features = out if isinstance(out, tuple) else (out, ())
            pred = self.param.pred(self.native, raw, xn, magnitude(tn), features)
            if process == self.native:
                return pred
            _, _, da, ds = process.coefs(expand(magnitude(t), x))
            return dataclasses.replace(pred, v=da * pred.x0 + ds * pred.eps)

        return denoise


def by_time(nets: Sequence[Callable], bounds: Sequence[float], *, shared: bool = False) -> Callable:
    """One denoiser of several experts: the first serves t >= bounds[0], the second what is below
    and >= bounds[1], and so on.

    `bounds`, one fewer than networks, fall. With times of its own for each sample, every network
    runs on the whole batch and each sample takes its expert's answer. With `shared` the batch has
    one time, and only its expert runs. Raises Refused where the bounds do not fit.
    """
    if len(bounds) != len(nets) - 1 or any(b >= a for a, b in zip(bounds, bounds[1:])):
        raise Refused(
            f"bounds={tuple(bounds)}: expected {len(nets) - 1} falling times between {len(nets)} networks"
        )
    if len(nets) == 1:
        return nets[0]

    def routed(x: Array, t: Array, cond=None, **kw) -> Pred:
        index = jnp.sum(t < expand(jnp.asarray(bounds, t.dtype), t[None]), 0)
        if shared:
            return jax.lax.switch(
                index[0], [functools.partial(net, **kw) for net in nets], x, t, cond
            )
        answers = [net(x, t, cond, **kw) for net in nets]
        mine = lambda *leaves: functools.reduce(
            lambda out, i: jnp.where(expand(index == i, out), leaves[i], out),
            range(1, len(nets)),
            leaves[0],
        )
        return jax.tree.map(mine, *answers)

    return routed


def guided(net, x: Array, t: Array, cond, null, scale: float, **kw) -> Pred:
    """Classifier-free guidance: null + scale (cond - null) in every field; scale 1 is conditional,
    0 unconditional.

    Both branches run as one call on a batch of twice the size.
    """
    if isinstance(scale, (int, float)) and scale == 1.0:
        return net(x, t, cond, **kw)
    double = lambda a, b: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), a, b)
    both = net(double(x, x), double(t, t), double(cond, null), **kw)
    n = x.shape[0]
    w = lambda leaf: expand(jnp.broadcast_to(jnp.asarray(scale, leaf.dtype), (n,)), leaf[:n])
    return jax.tree.map(lambda p: p[n:] + w(p) * (p[:n] - p[n:]), both)
