"""Denoising regression: the same error, expressed in the target that a paper weighs it in."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Refused
from jaxdistill.diffusion.process import Pred, Process, expand

TARGETS = ("v", "flow", "vp", "eps", "x0", "edm")


def denoising_error(
    process: Process,
    pred: Pred,
    x0: Array,
    eps: Array,
    t: Array,
    target: str,
    sigma_data: float = 0.5,
) -> Array:
    """Squared error per sample [B], mean over dimensions.

    v: velocity dx_t/dt (flow matching); flow: eps - x0, the velocity of a straight path whatever
    the process's time; vp:
    alpha eps - sigma x0, the "v" of variance preserving processes (progressive distillation,
    arXiv:2202.00512), there SNR + 1 times the error of x0 and the error of a `VPVelocity` network's
    output; eps: DDPM; x0: data; edm: x0 weighted with 1/sigma^2 + 1/sigma_data^2, sigma relative to
    alpha (EDM, arXiv:2206.00364; DMD2 on ImageNet). Raises Refused on another target.
    """
    if target == "v":
        error = pred.v - process.velocity(x0, eps, t)
    elif target == "flow":
        error = (pred.eps - pred.x0) - (eps - x0)
    elif target == "vp":
        a, s = process.alpha_sigma(expand(t, x0))
        error = a * (pred.eps - eps) - s * (pred.x0 - x0)
    elif target == "eps":
        error = pred.eps - eps
    elif target in ("x0", "edm"):
        error = pred.x0 - x0
    else:
        raise Refused(f"target={target!r}: expected one of {', '.join(TARGETS)}")
    loss = jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))
    if target != "edm":
        return loss
    a, s = process.alpha_sigma(t)
    return loss * ((a / s) ** 2 + 1 / sigma_data**2)


def interval_targets(
    process: Process, xs: Array, eps: Array, s: Array, t: Array, floor: float = 1e-8
) -> tuple[Array, Array, Array]:
    """Targets (x0, eps) [B ...] of a denoiser at x_t = alpha_{t|s} x_s + sigma_{t|s} eps, t > s,
    from x_s alone; and sigma_{t|s}.

    Given x_t their means are those of the true x_0 and noise (Phased DMD, arXiv:2510.27684: score
    matching within subintervals), so that regression on them learns the score at t of a law of
    which only samples at s are known. At s = 0 they are x_s and eps. `s`, `t` [B] or scalar. Both
    grow as 1 / sigma_{t|s} for t -> s: its square is held above `floor`.
    """
    s = expand(jnp.asarray(s), xs)
    t = expand(jnp.asarray(t), xs)
    (a_s, s_s), (a_t, s_t), (_, sigma) = (
        process.alpha_sigma(s),
        process.alpha_sigma(t),
        process.kernel(s, t),
    )
    sigma = jnp.maximum(sigma, floor**0.5)
    return xs / a_s - a_t * s_s**2 / (a_s**2 * sigma) * eps, s_t / sigma * eps, sigma


def interval_error(
    process: Process,
    pred: Pred,
    xs: Array,
    eps: Array,
    s: Array,
    t: Array,
    target: str = "flow",
    clamp: float = 10.0,
) -> Array:
    """Error of a denoiser at x_t on `interval_targets`, times min(1, clamp sigma_{t|s}^2): [B].

    With the target "flow" that is the paper's min(1 / sigma_{t|s}^2, 10) |sigma_{t|s} v -
    sigma_{t|s} u|^2, mean over dimensions; an infinite clamp leaves the plain error.
    """
    x0, noise, sigma = interval_targets(process, xs, eps, s, t)
    weight = jnp.minimum(1.0, clamp * sigma.reshape(sigma.shape[:1]) ** 2)
    return weight * denoising_error(process, pred, x0, noise, t, target)


def drop_condition(cond, null, keep: Array):
    """`cond` (an array or a tree of them) where `keep` [B], else the null condition; None stays
    None.
    """
    return jax.tree.map(lambda c, n: jnp.where(expand(keep, c), c, n), cond, null)
