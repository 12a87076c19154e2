"""Losses between hidden features, and centred kernel alignment (00-foundations, section 11).

The teacher's side of a loss is under stop_gradient; CKA is symmetric and leaves it to the caller.
Where the loss is one value per position or sample, that is what is returned. Inside all is float32
(or float64, if given).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array, Refused


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pair(teacher: Array, student: Array) -> tuple[Array, Array]:
    return jax.lax.stop_gradient(_wide(teacher)), _wide(student)


def _root(square: Array) -> Array:
    """Square root with gradient 0 at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _unit(x: Array) -> Array:
    """x over its norm along the last axis; 0 stays 0."""
    norm = _root(jnp.sum(x**2, -1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)


def hidden_mse(teacher: Array, student: Array) -> Array:
    """Mean squared difference of hidden states, [..., D] -> [...] (FitNets, arXiv:1412.6550)."""
    t, s = _pair(teacher, student)
    return jnp.mean((t - s) ** 2, -1)


def cosine_distance(teacher: Array, student: Array) -> Array:
    """1 - cosine, [..., D] -> [...]; invariant to positive scale of either side (DistilBERT,
    arXiv:1910.01108).
    """
    t, s = _pair(teacher, student)
    return 1 - jnp.sum(_unit(t) * _unit(s), -1)


def attention_transfer(teacher: Array, student: Array) -> Array:
    """Mean squared difference of unit attention maps Q = sum_c |A_c|^2, [B H W C] -> [B]
    (arXiv:1612.03928, times beta = 1e3).

    Channels may differ in number. The larger map is average-pooled to the smaller one's size;
    raises Refused where that does not divide it. Invariant to the order of channels and to positive
    scale.
    """
    t, s = _pair(teacher, student)
    size = tuple(min(a, b) for a, b in zip(t.shape[1:3], s.shape[1:3]))
    q = lambda a: _unit(jnp.sum(_pool(a, size) ** 2, -1).reshape(a.shape[0], -1))
    return jnp.mean((q(t) - q(s)) ** 2, -1)


def _pool(x: Array, size: tuple[int, int]) -> Array:
    b, h, w, c = x.shape
    if h % size[0] or w % size[1]:
        raise Refused(
            f"attention map of {h}x{w}: expected a multiple of {size[0]}x{size[1]}, the other network's"
        )
    return jnp.mean(x.reshape(b, size[0], h // size[0], size[1], w // size[1], c), (2, 4))


def _huber(gap: Array) -> Array:
    return jnp.where(jnp.abs(gap) < 1, 0.5 * gap**2, jnp.abs(gap) - 0.5)


def rkd_distance(teacher: Array, student: Array) -> Array:
    """Huber loss between matrices of pairwise distances, each over its mean (RKD, arXiv:1904.05068,
    weight 25).

    [B D] and [B D'] -> scalar, the mean over all B^2 entries as in the authors' code. Invariant to
    rotation, translation and scale of either side.
    """

    def relations(f):
        d = _root(jnp.sum((f[:, None] - f[None]) ** 2, -1))
        count = d.shape[0] * (d.shape[0] - 1)
        mean = jnp.sum(d) / count
        return d / jnp.where(mean > 0, mean, 1.0)

    t, s = _pair(teacher, student)
    return jnp.mean(_huber(relations(s) - relations(t)))


def rkd_angle(teacher: Array, student: Array) -> Array:
    """Huber loss between the cosines at j of all triples (i, j, k) (RKD, weight 50); [B D], [B D']
    -> scalar.
    """

    def relations(f):
        edges = _unit(f[None] - f[:, None])  # [j i D]
        return jnp.einsum("jid,jkd->jik", edges, edges)

    t, s = _pair(teacher, student)
    return jnp.mean(_huber(relations(s) - relations(t)))


def similarity_preserving(teacher: Array, student: Array) -> Array:
    """||G_s - G_t||_F^2 / B^2 of Gram matrices F F^T with unit rows, [B ...] -> scalar
    (arXiv:1907.09682).
    """
    gram = lambda f: _unit(f.reshape(f.shape[0], -1) @ f.reshape(f.shape[0], -1).T)
    t, s = _pair(teacher, student)
    return jnp.mean((gram(t) - gram(s)) ** 2)


def cka(x: Array, y: Array) -> Array:
    """Linear CKA of [n D] and [n D']: ||Yc^T Xc||_F^2 / (||Xc^T Xc||_F ||Yc^T Yc||_F)
    (arXiv:1905.00414); in [0, 1].

    Invariant to orthogonal maps, isotropic scale and shifts of either side; not to general linear
    maps.
    """
    x, y = (_wide(f) - jnp.mean(_wide(f), 0) for f in (x, y))
    cross = lambda a, b: jnp.sum((a.T @ b) ** 2)
    return cross(x, y) / jnp.sqrt(cross(x, x) * cross(y, y))


def unbiased_hsic(x: Array, y: Array) -> Array:
    """Unbiased estimate of HSIC with linear kernels from n >= 4 rows (Song et al., JMLR 2012); mean
    0 if independent.
    """
    n = x.shape[0]
    x, y = (
        _wide(f) - jnp.mean(_wide(f), 0) for f in (x, y)
    )  # leaves the value as it is, and its rounding small
    k, m = ((f @ f.T) * (1 - jnp.eye(n)) for f in (x, y))
    trace = jnp.sum(k * m)
    sums = jnp.sum(k) * jnp.sum(m) / ((n - 1) * (n - 2))
    return (trace + sums - 2 / (n - 2) * jnp.sum(k, 0) @ jnp.sum(m, 0)) / (n * (n - 3))


def minibatch_cka(x: Array, y: Array) -> Array:
    """CKA from batches [batches n D], [batches n D']: unbiased HSICs, each averaged before they are
    divided (arXiv:2010.15327).

    Its expectation does not depend on n, unlike that of `cka`, which rises to 1 as n falls below D.
    """
    mean = lambda a, b: jnp.mean(jax.vmap(unbiased_hsic)(a, b))
    return mean(x, y) / jnp.sqrt(mean(x, x) * mean(y, y))
