"""Noising processes x_t = alpha(t) x_0 + sigma(t) eps, eps ~ N(0, I), and predictions of a denoiser
about x_t.

A process is a pair (alpha, sigma); derivatives come from forward-mode differentiation. The
states of two processes differ by a map of times and a scale. Each process therefore provides
`time`, the inverse of its `angle` = atan2(sigma, alpha): equal angles are equal noise levels, which
maps times between processes. The angle is finite at both ends, unlike the log-SNR.

Times are given per sample, [B], or as a scalar; `expand` gives them the axes of a sample.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Shaped

from jaxdistill.core.types import Array


def expand(
    t: Shaped[Array, "*T"], x: Shaped[Array, "*_"]
) -> Shaped[Array, "*T ..."]:
    """Appends axes to `t` until it broadcasts against `x`."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def magnitude(t: Shaped[Array, "*T"]) -> Shaped[Array, "*T"]:
    """|t|, with derivative 1 at 0: the noise level of a signed time.

    Times are negative only in TwinFlow, for the flow that ends in the student's own samples.
    """
    return jnp.where(t < 0, -t, t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pred:
    """One prediction in every parameterisation, for the process that the caller works in.

    jit removes the fields that are not used. All but `features` are affine in the network's output,
    so guidance may extrapolate any of them.
    """

    x0: Array
    eps: Array
    v: Array  # generic velocity dx_t/dt = alpha' x0 + sigma' eps
    raw: Array  # the network's own output
    features: tuple[Any, ...] = ()  # activations of the layers asked for by `taps`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """Base of all processes.

    A subclass gives `alpha_sigma`, and `time`, the inverse of `angle`, on `t_min`..`t_max`.
    """

    def alpha_sigma(
        self, t: Shaped[Array, "*T"]
    ) -> tuple[Shaped[Array, "*T"], Shaped[Array, "*T"]]:
        """alpha(t) and sigma(t)."""
        raise NotImplementedError

    def time(self, angle: Shaped[Array, "*T"]) -> Shaped[Array, "*T"]:
        """Inverse of `angle`."""
        raise NotImplementedError

    @property
    def t_min(self) -> float:
        """Smallest time at which the network is called."""
        return 0.0

    @property
    def t_max(self) -> float:
        """Pure noise (or as near as the schedule comes)."""
        return 1.0

    def grid(self, steps: int) -> Shaped[Array, " {steps}+1"]:
        """The usual times of a sampler with `steps` steps, from t_max to the end.

        The network is evaluated at all but the last time. In this base class they are evenly spaced
        from t_max down to t_min.
        """
        return jnp.linspace(self.t_max, self.t_min, steps + 1)

    def coefs(
        self, t: Shaped[Array, "*T"]
    ) -> tuple[
        Shaped[Array, "*T"],
        Shaped[Array, "*T"],
        Shaped[Array, "*T"],
        Shaped[Array, "*T"],
    ]:
        """alpha, sigma, d alpha/dt, d sigma/dt."""
        (a, s), (da, ds) = jax.jvp(self.alpha_sigma, (t,), (jnp.ones_like(t),))
        return a, s, da, ds

    def angle(self, t: Shaped[Array, "*T"]) -> Shaped[Array, "*T"]:
        """atan2(sigma, alpha) in [0, pi/2], increasing in t."""
        a, s = self.alpha_sigma(t)
        return jnp.arctan2(s, a)

    def lam(self, t: Shaped[Array, "*T"]) -> Shaped[Array, "*T"]:
        """Half log-SNR, log(alpha / sigma)."""
        a, s = self.alpha_sigma(t)
        # Rounding may make alpha negative at t_max (cos(pi/2) in float32): lambda is then -inf, not
        # nan.
        return jnp.log(jnp.maximum(a, 0.0)) - jnp.log(s)

    def time_of_lam(self, lam: Shaped[Array, "*T"]) -> Shaped[Array, "*T"]:
        """Inverse of `lam`."""
        return self.time(jnp.arctan2(jnp.exp(-lam), jnp.ones_like(lam)))

    def add_noise(
        self,
        x0: Shaped[Array, "*_"],
        eps: Shaped[Array, "*_"],
        t: float | Shaped[Array, "*T"],
    ) -> Shaped[Array, "*_"]:
        """x_t = alpha x0 + sigma eps."""
        a, s = self.alpha_sigma(expand(jnp.asarray(t), x0))
        return a * x0 + s * eps

    def start(self, noise: Shaped[Array, "*_"]) -> Shaped[Array, "*_"]:
        """Unit Gaussian noise as a state at t_max."""
        return self.add_noise(
            jnp.zeros_like(noise), noise, jnp.asarray(self.t_max, noise.dtype)
        )

    def may_start_at(self, t: float) -> bool:
        """True if a network may be given the result of `start` as a state at time t.

        This holds for every t in processes whose states have about the same size at all times.
        """
        return True

    def velocity(
        self,
        x0: Shaped[Array, "*_"],
        eps: Shaped[Array, "*_"],
        t: Shaped[Array, "*T"],
    ) -> Shaped[Array, "*_"]:
        """dx_t/dt for fixed x0 and eps."""
        _, _, da, ds = self.coefs(expand(t, x0))
        return da * x0 + ds * eps

    def score(self, pred: Pred, t: Shaped[Array, "*T"]) -> Shaped[Array, "*_"]:
        """grad log p_t(x_t) = -eps / sigma."""
        return -pred.eps / self.alpha_sigma(expand(t, pred.eps))[1]

    def kernel(
        self, t: Shaped[Array, "*T"], r: Shaped[Array, "*R"]
    ) -> tuple[Shaped[Array, "*_"], Shaped[Array, "*_"]]:
        """(alpha_{r|t}, sigma_{r|t}) of the forward kernel from t to r > t, towards more noise.

        x_r | x_t ~ N(alpha_{r|t} x_t, sigma_{r|t}^2).
        """
        alpha_t, sigma_t = self.alpha_sigma(t)
        alpha_r, sigma_r = self.alpha_sigma(r)
        ratio = alpha_r / alpha_t
        variance = (sigma_r - ratio * sigma_t) * (sigma_r + ratio * sigma_t)
        return ratio, jnp.sqrt(jnp.maximum(variance, 0.0))

    def transition(
        self,
        xt: Shaped[Array, "*_"],
        noise: Shaped[Array, "*_"],
        t: Shaped[Array, "*T"],
        r: Shaped[Array, "*R"],
    ) -> Shaped[Array, "*_"]:
        """A draw of x_r | x_t for r > t, from the forward kernel."""
        ratio, sigma = self.kernel(expand(t, xt), expand(r, xt))
        return ratio * xt + sigma * noise

    def from_x0(
        self,
        x0: Shaped[Array, "*_"],
        xt: Shaped[Array, "*_"],
        t: Shaped[Array, "*T"],
        raw: Array | None = None,
        features: tuple[Any, ...] = (),
    ) -> Pred:
        """All parameterisations from a prediction of x0; singular where sigma = 0."""
        a, s, da, ds = self.coefs(expand(t, xt))
        eps = (xt - a * x0) / s
        return Pred(
            x0, eps, da * x0 + ds * eps, x0 if raw is None else raw, features
        )

    def from_eps(
        self,
        eps: Shaped[Array, "*_"],
        xt: Shaped[Array, "*_"],
        t: Shaped[Array, "*T"],
        raw: Array | None = None,
        features: tuple[Any, ...] = (),
    ) -> Pred:
        """All parameterisations from a prediction of eps; singular where alpha = 0."""
        a, s, da, ds = self.coefs(expand(t, xt))
        x0 = (xt - s * eps) / a
        return Pred(
            x0, eps, da * x0 + ds * eps, eps if raw is None else raw, features
        )

    def from_v(
        self,
        v: Shaped[Array, "*_"],
        xt: Shaped[Array, "*_"],
        t: Shaped[Array, "*T"],
        raw: Array | None = None,
        features: tuple[Any, ...] = (),
    ) -> Pred:
        """All parameterisations from a velocity: solves [a s; a' s'] [x0 eps] = [x_t v]."""
        a, s, da, ds = self.coefs(expand(t, xt))
        det = a * ds - s * da
        x0 = (ds * xt - s * v) / det
        eps = (a * v - da * xt) / det
        return Pred(x0, eps, v, v if raw is None else raw, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow(Process):
    """Rectified flow: (1 - t', t') on [0, 1] with t' = shift t / (1 + (shift - 1) t).

    t = 1 is noise.
    """

    # Moves the half log-SNR by -log(shift). 1: no shift; SD3 at 1024 pixels: 3; video: 5 to 12
    shift: float = 1.0

    def alpha_sigma(self, t):
        warped = self.shift * t / (1 + (self.shift - 1) * t)
        return 1 - warped, warped

    def time(self, angle):
        warped = jnp.sin(angle) / (jnp.cos(angle) + jnp.sin(angle))
        return warped / (self.shift - (self.shift - 1) * warped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trig(Process):
    """TrigFlow (sCM, arXiv:2410.11081): (cos t, sigma_data sin t) on [0, pi/2].

    The velocity is sigma_data F, with F the network of sCM.
    """

    sigma_data: float = 0.5

    @property
    def t_max(self):
        return float(np.pi / 2)

    def alpha_sigma(self, t):
        return jnp.cos(t), self.sigma_data * jnp.sin(t)

    def time(self, angle):
        return jnp.arctan2(jnp.sin(angle), self.sigma_data * jnp.cos(angle))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM(Process):
    """Variance exploding with t = sigma (EDM, arXiv:2206.00364): (1, t)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def t_min(self):
        return self.sigma_min

    @property
    def t_max(self):
        return self.sigma_max

    def grid(self, steps):
        """`steps` noise levels from sigma_max to sigma_min, then 0 (eq. 5 with rho = 7)."""
        top = self.sigma_max ** (1 / 7)
        bottom = self.sigma_min ** (1 / 7)
        fraction = jnp.arange(steps) / max(steps - 1, 1)
        levels = (top + fraction * (bottom - top)) ** 7
        return jnp.append(levels, 0.0)

    def may_start_at(self, t):
        """A state has the size of its noise, so t must be at least half of sigma_max."""
        return t >= self.sigma_max / 2

    def alpha_sigma(self, t):
        return jnp.ones_like(t), t

    def time(self, angle):
        return jnp.sin(angle) / jnp.maximum(jnp.cos(angle), 1e-6)


class VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1: a state has the norm of unit noise if the data have unit variance.

    Hence sampling starts from unit noise, and not from sigma times such noise, although some
    processes of this kind end at alpha > 0 (Stable Diffusion's at 0.068).
    """

    def start(self, noise):
        return noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class VP(VariancePreserving):
    """Linear beta(t) (score SDE): alpha = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    @property
    def t_min(self):
        return 1e-5

    def alpha_sigma(self, t):
        log_alpha = (
            -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2
        )
        return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))

    def time(self, angle):
        log_alpha = -0.5 * jnp.log1p(jnp.tan(angle) ** 2)
        slope = self.beta_max - self.beta_min
        # The positive root t of slope t^2 / 4 + beta_min t / 2 + log_alpha = 0, in the form without
        # the cancellation of sqrt(...) - beta_min at small t.
        root = jnp.sqrt(self.beta_min**2 - 4 * slope * log_alpha)
        return -4 * log_alpha / (root + self.beta_min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineVP(VariancePreserving):
    """Cosine schedule: alpha = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s))."""

    offset: float = 0.008

    @property
    def t_min(self):
        return 1e-4

    @property
    def first_phase(self) -> float:
        """The cosine's argument at t = 0."""
        return float(np.pi / 2 * self.offset / (1 + self.offset))

    def alpha_sigma(self, t):
        phase = jnp.pi / 2 * (t + self.offset) / (1 + self.offset)
        alpha = jnp.cos(phase) / np.cos(self.first_phase)
        # 1 - alpha from cos(a) - cos(b) = 2 sin((a + b)/2) sin((b - a)/2) with a = first_phase and
        # b = phase, which keeps its precision near t = 0
        sin_mean = jnp.sin((phase + self.first_phase) / 2)
        sin_half_difference = jnp.sin(jnp.pi / 4 * t / (1 + self.offset))
        one_minus_alpha = (
            2 * sin_mean * sin_half_difference / np.cos(self.first_phase)
        )
        return alpha, jnp.sqrt(one_minus_alpha * (1 + alpha))

    def time(self, angle):
        cos = np.cos(self.first_phase)
        sin = np.sin(self.first_phase)
        # cos(phase) = cos(first_phase) cos(angle), hence
        # sin(phase)^2 = sin(first_phase)^2 + (cos(first_phase) sin(angle))^2.
        # Unlike arccos, arctan2 of the two is precise at small angles.
        phase = jnp.arctan2(
            jnp.sqrt(sin**2 + (cos * jnp.sin(angle)) ** 2), cos * jnp.cos(angle)
        )
        return (phase - self.first_phase) * 2 / jnp.pi * (1 + self.offset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(VariancePreserving):
    """Discrete betas as a process in continuous time.

    Time t in [0, 1] is the index (steps - 1) t; angles are interpolated between the indices.

    Defaults are DDPM's linear betas; Stable Diffusion has `scaled=True, beta_min=0.00085,
    beta_max=0.012`.
    """

    beta_min: float = 1e-4
    beta_max: float = 0.02
    steps: int = 1000
    scaled: bool = False  # betas linear in their square root

    @property
    def betas(self) -> Float64[np.ndarray, " {self.steps}"]:
        """The betas of all steps."""
        power = 0.5 if self.scaled else 1.0
        return np.linspace(
            self.beta_min**power, self.beta_max**power, self.steps
        ) ** (1 / power)

    @property
    def angles(self) -> Float64[np.ndarray, " {self.steps}"]:
        """atan2(sigma, alpha) at each index."""
        return np.arccos(np.sqrt(np.cumprod(1 - self.betas)))

    def alpha_sigma(self, t):
        indices = jnp.arange(self.steps, dtype=t.dtype)
        angle = jnp.interp(
            t * (self.steps - 1), indices, jnp.asarray(self.angles, t.dtype)
        )
        return jnp.cos(angle), jnp.sin(angle)

    def time(self, angle):
        table = jnp.asarray(self.angles, angle.dtype)
        indices = jnp.arange(self.steps, dtype=angle.dtype)
        return jnp.interp(angle, table, indices) / (self.steps - 1)
