"""Denoising regression: the same error, expressed in the target that a paper weighs it in."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Refused
from jaxdistill.diffusion.process import Pred, Process, expand

TARGETS = ("v", "eps", "x0", "edm")


def denoising_error(process: Process, pred: Pred, x0: Array, eps: Array, t: Array, target: str, sigma_data: float = 0.5) -> Array:
    """Squared error per sample [B], mean over dimensions.

    v: velocity (flow matching); eps: DDPM; x0: data; edm: x0 weighted with 1/sigma^2 + 1/sigma_data^2, sigma relative
    to alpha (EDM, arXiv:2206.00364; DMD2 on ImageNet). Raises Refused on another target.
    """
    if target == "v":
        error = pred.v - process.velocity(x0, eps, t)
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


def drop_condition(cond, null, keep: Array):
    """`cond` (an array or a tree of them) where `keep` [B], else the null condition; None stays None."""
    return jax.tree.map(lambda c, n: jnp.where(expand(keep, c), c, n), cond, null)
