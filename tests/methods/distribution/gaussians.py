"""One-dimensional Gaussians with exact networks, and expectations over them by quadrature.

x_0 = M + C z is the student's sample, x_t = ALPHA x_0 + SIGMA eps.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.diffusion.process import Flow, Process, expand
from jaxdistill.diffusion.times import Uniform

M = 0.4
C = 0.6
ALPHA = 0.8
SIGMA = 0.7
# rectified flow at t = .6, for methods whose `match` is looked at by `pulled`
AT = dict(
    process=Flow(), match_times=Uniform(low=0.6, high=0.6), student_times=(1.0,)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Process):
    """(ALPHA, t): g^2 / 2 = t."""

    def alpha_sigma(self, t):
        return jnp.full_like(t, ALPHA), t


def log_density(x, mean, var):
    return -0.5 * (x - mean) ** 2 / var - 0.5 * jnp.log(2 * jnp.pi * var)


def networks(process, q_var, m=M, c=C):
    """Exact teacher of q_t = N(0, q_var) (already noised), exact fake score and discriminator of
    the student's law.
    """

    def denoised(x, t, mean, var, **kw):
        a, s = process.alpha_sigma(expand(t, x))
        return process.from_x0((x - s**2 * (x - mean) / var) / a, x, t, **kw)

    def spread(x, t):
        a, s = process.alpha_sigma(expand(t, x))
        return a * m, (a * c) ** 2 + s**2

    q = lambda x, t: q_var(expand(t, x)) if callable(q_var) else q_var
    return SimpleNamespace(
        teacher=lambda x, t, cond=None: denoised(x, t, 0.0, q(x, t)),
        fake=lambda x, t, cond=None, taps=(): denoised(
            x, t, *spread(x, t), features=((x, expand(t, x)),)
        ),
        disc=lambda features, t, cond: (
            log_density(features[0][0], 0.0, q(*features[0]))
            - log_density(features[0][0], *spread(*features[0]))
        )[:, 0],
    )


@functools.cache
def grid(n=72):
    """(z [n^2 1], eps, weights [n^2]) of two independent normal variables."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    z, eps = (a.reshape(-1, 1) for a in np.meshgrid(x, x))
    return z, eps, np.outer(w, w).reshape(-1) / w.sum() ** 2


def pulled(method, plain):
    """The gradient of `match` in each entry of a sample; `plain` is the fixture of that name."""
    net, ctx, x0 = plain[:3]
    return jax.grad(lambda x: method.match(net, ctx, x)[0])(x0) * x0.size
