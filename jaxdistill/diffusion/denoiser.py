"""From a raw network to a `Pred`: what its output means, how its inputs are scaled, and which
process it was trained on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from jaxdistill.core.types import Array, Refused
from jaxdistill.diffusion.process import (
    Flow,
    Pred,
    Process,
    Trig,
    expand,
    magnitude,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Velocity:
    """The output is dx_t/dt in the network's own process. Base of all parameterisations."""

    time_scale: float = 1.0  # the network is given time_scale * t

    def inputs(
        self, process: Process, x: Shaped[Array, "B ..."], t: Shaped[Array, "*T"]
    ) -> tuple[Shaped[Array, "B ..."], Shaped[Array, "*T"]]:
        """The network's inputs for (x_t, t)."""
        return x, self.time_scale * t

    def pred(
        self,
        process: Process,
        raw: Shaped[Array, "B ..."],
        x: Shaped[Array, "B ..."],
        t: Shaped[Array, "*T"],
        features: tuple[Any, ...] = (),
    ) -> Pred:
        """The prediction that the network's output stands for."""
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
    """EDM preconditioning on the EDM process: D = c_skip x + c_out F(c_in x, c_noise).

    Source: arXiv:2206.00364, table 1.
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
    """EDM preconditioning shifted so that x0 = x at sigma_min, whatever the output.

    Source: arXiv:2303.01469, appendix C.
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
    """TrigFlow: the input is x / sigma_data, the velocity sigma_data F (arXiv:2410.11081)."""

    def inputs(self, process: Trig, x, t):
        return x / process.sigma_data, self.time_scale * t

    def pred(self, process, raw, x, t, features=()):
        return process.from_v(process.sigma_data * raw, x, t, raw, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """How a network's output is read: its parameterisation, and the process it was trained on.

    `wrap(call, process)` turns `(x, t, cond, **kw) -> raw | (raw, features)` into `(x, t, cond,
    **kw) -> Pred` for a caller who works in `process`. Where the two processes differ, the network
    is evaluated at the time of equal signal-to-noise ratio on the rescaled sample (schedule
    equivalence), and its x0 and eps hold unchanged. Beyond the ends of its own process it is
    evaluated at the end. A second time `r` (networks of average velocities) is mapped like `t`.
    Times may be negative, the twins of |t| (TwinFlow, arXiv:2512.05150): the network is given their
    sign, and everything else is computed at |t|.
    """

    param: Velocity = Velocity()
    native: Process = Flow()
    # a network with one time input is given t - fold r in place of (t, r): TwinFlow's LoRA has 0.5;
    # 0: the network has an input for r
    fold: float = 0.0

    def own_time(
        self, process: Process, t: Shaped[Array, "*T"]
    ) -> Shaped[Array, "*T"]:
        """The network's time of equal signal-to-noise ratio as t >= 0 of `process`, within its
        ends.
        """
        return jnp.clip(
            self.native.time(process.angle(t)), self.native.t_min, self.native.t_max
        )

    def own_scale(
        self, process: Process, t: Shaped[Array, "*T"]
    ) -> Shaped[Array, "*T"]:
        """The factor that makes a state of `process` at t >= 0 one of the network's process at
        `own_time`.
        """

        def size(process: Process, t: Array) -> Array:
            return jnp.sqrt(sum(c**2 for c in process.alpha_sigma(t)))

        return size(self.native, self.own_time(process, t)) / size(process, t)

    def signed_own_time(self, process: Process, t: Array) -> Array:
        """`own_time` of |t|, with the sign of t."""
        own = self.own_time(process, magnitude(t))
        return jnp.where(t < 0, -own, own)

    def wrap(self, call: Callable, process: Process) -> Callable[..., Pred]:
        """A network's call as a denoiser of `process`; see the class."""
        foreign = process != self.native

        def denoise(
            x: Shaped[Array, "B ..."],
            t: Shaped[Array, "*T"],
            cond: Any = None,
            *,
            r: Shaped[Array, "*T"] | None = None,
            **kw: Any,
        ) -> Pred:
            own_x = x
            own_t = t
            own_r = r
            if foreign:
                own_t = self.signed_own_time(process, t)
                own_r = None if r is None else self.signed_own_time(process, r)
                own_x = x * expand(self.own_scale(process, magnitude(t)), x)
            x_in, t_in = self.param.inputs(self.native, own_x, own_t)
            if r is not None:
                r_in = self.param.inputs(self.native, own_x, own_r)[1]
                if self.fold:
                    t_in = t_in - self.fold * r_in
                else:
                    kw["r"] = r_in
            out = call(x_in, t_in, cond, **kw)
            raw, features = out if isinstance(out, tuple) else (out, ())
            pred = self.param.pred(
                self.native, raw, own_x, magnitude(own_t), features
            )
            if not foreign:
                return pred
            _, _, da, ds = process.coefs(expand(magnitude(t), x))
            return dataclasses.replace(pred, v=da * pred.x0 + ds * pred.eps)

        return denoise


def by_time(
    nets: Sequence[Callable], bounds: Sequence[float], *, shared: bool = False
) -> Callable:
    """One denoiser of several experts: the first for t >= bounds[0], the second for the times below
    that and >= bounds[1], and so on.

    Args:
      bounds: falling times, one fewer than networks.
      shared: whether all samples of a batch have the same time. Then only one expert is evaluated;
        otherwise every network is evaluated on the full batch, and each sample takes the answer of
        its expert.

    Raises:
      Refused: where the bounds do not fit.
    """
    falling = all(a > b for a, b in zip(bounds, bounds[1:]))
    if len(bounds) != len(nets) - 1 or not falling:
        expected = f"{len(nets) - 1} falling times between {len(nets)} networks"
        raise Refused(f"bounds={tuple(bounds)}: expected {expected}")
    if len(nets) == 1:
        return nets[0]

    def routed(x: Array, t: Array, cond: Any = None, **kw: Any) -> Pred:
        index = jnp.sum(t < expand(jnp.asarray(bounds, t.dtype), t[None]), 0)
        if shared:
            branches = [functools.partial(net, **kw) for net in nets]
            return jax.lax.switch(index[0], branches, x, t, cond)

        def chosen(*leaves: Array) -> Array:
            out = leaves[0]
            for i in range(1, len(nets)):
                out = jnp.where(expand(index == i, out), leaves[i], out)
            return out

        return jax.tree.map(chosen, *[net(x, t, cond, **kw) for net in nets])

    return routed


def guided(
    net: Callable[..., Pred],
    x: Shaped[Array, "B ..."],
    t: Shaped[Array, " B"],
    cond: Any,
    null: Any,
    scale: float | Float[Array, "*S"],
    **kw: Any,
) -> Pred:
    """Classifier-free guidance, null + scale (cond - null) in every field of the prediction.

    Scale 1 is the conditional prediction, 0 the unconditional one; it may differ between samples.
    Both branches are one call on a batch of twice the size.
    """
    if isinstance(scale, (int, float)) and scale == 1.0:
        return net(x, t, cond, **kw)
    n = x.shape[0]
    double = functools.partial(jax.tree.map, lambda a, b: jnp.concatenate([a, b]))
    both = net(double(x, x), double(t, t), double(cond, null), **kw)

    def extrapolated(leaf: Array) -> Array:
        with_cond = leaf[:n]
        with_null = leaf[n:]
        scales = jnp.broadcast_to(jnp.asarray(scale, leaf.dtype), (n,))
        return with_null + expand(scales, with_cond) * (with_cond - with_null)

    return jax.tree.map(extrapolated, both)
