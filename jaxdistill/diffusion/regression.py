"""Denoising regression: one error, expressed in the target that a paper weighs it in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Shaped

from jaxdistill.core.types import Array, Refused
from jaxdistill.diffusion.process import Pred, Process, expand

TARGETS = ("v", "flow", "vp", "eps", "x0", "edm")


def denoising_error(
    process: Process,
    pred: Pred,
    x0: Shaped[Array, "B ..."],
    eps: Shaped[Array, "B ..."],
    t: Shaped[Array, "*T"],
    target: str,
    sigma_data: float = 0.5,
) -> Shaped[Array, " B"]:
    """Mean squared error of each sample.

    Args:
      target: one of
        - v: the velocity dx_t/dt (flow matching).
        - flow: eps - x0, the velocity of a straight path whatever the time of the process.
        - vp: alpha eps - sigma x0, the "v" of variance preserving processes (progressive
          distillation, arXiv:2202.00512). There it is SNR + 1 times the error of x0, and the error
          of the output of a `VPVelocity` network.
        - eps: the noise (DDPM).
        - x0: the data.
        - edm: x0, weighted with 1 / sigma^2 + 1 / sigma_data^2 for sigma relative to alpha (EDM,
          arXiv:2206.00364; DMD2 on ImageNet).

    Raises:
      Refused: on another target.
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
    process: Process,
    xs: Shaped[Array, "B ..."],
    eps: Shaped[Array, "B ..."],
    s: float | Shaped[Array, "*S"],
    t: float | Shaped[Array, "*T"],
    floor: float = 1e-8,
) -> tuple[Shaped[Array, "B ..."], Shaped[Array, "B ..."], Shaped[Array, "*_"]]:
    """Targets of a denoiser at x_t = alpha_{t|s} x_s + sigma_{t|s} eps, t > s, from x_s alone.

    Given x_t, their means are those of the true x_0 and noise, so that regression on them learns
    the score at t of a distribution of which only samples at s are known (score matching within
    subintervals). At s = 0 they are x_s and eps. Both grow as 1 / sigma_{t|s} for t -> s.

    Args:
      s, t: one time for each sample, or one for all.
      floor: lower bound of sigma_{t|s}^2.

    Returns:
      (x0, eps, sigma_{t|s}).

    Source: Phased DMD, arXiv:2510.27684.
    """
    s = expand(jnp.asarray(s), xs)
    t = expand(jnp.asarray(t), xs)
    alpha_s, sigma_s = process.alpha_sigma(s)
    alpha_t, sigma_t = process.alpha_sigma(t)
    _, sigma = process.kernel(s, t)
    sigma = jnp.maximum(sigma, floor**0.5)
    x0 = xs / alpha_s - alpha_t * sigma_s**2 / (alpha_s**2 * sigma) * eps
    return x0, sigma_t / sigma * eps, sigma


def interval_error(
    process: Process,
    pred: Pred,
    xs: Shaped[Array, "B ..."],
    eps: Shaped[Array, "B ..."],
    s: float | Shaped[Array, "*S"],
    t: Shaped[Array, "*T"],
    target: str = "flow",
    clamp: float = 10.0,
) -> Shaped[Array, " B"]:
    """Error of a denoiser at x_t on `interval_targets`, times min(1, clamp sigma_{t|s}^2).

    With the target "flow" it is the paper's min(1 / sigma_{t|s}^2, 10) |sigma_{t|s} v -
    sigma_{t|s} u|^2 as a mean over dimensions. With an infinite clamp it is not weighted.
    """
    x0, noise, sigma = interval_targets(process, xs, eps, s, t)
    weight = jnp.minimum(1.0, clamp * sigma.reshape(sigma.shape[:1]) ** 2)
    return weight * denoising_error(process, pred, x0, noise, t, target)


def drop_condition(cond: Any, null: Any, keep: Bool[Array, " B"]) -> Any:
    """`cond`, an array or a tree of arrays, where `keep` holds, else the null condition.

    None stays None.
    """
    return jax.tree.map(lambda c, n: jnp.where(expand(keep, c), c, n), cond, null)
