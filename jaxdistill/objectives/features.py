"""Losses between hidden features, and centred kernel alignment (CKA).

The teacher's side of a loss is under stop_gradient; CKA is symmetric and leaves that to the caller.
Everything is computed in float32, or in float64 where that is given.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from jaxdistill.core.types import Array, Refused
from jaxdistill.objectives.numerics import root, teacher_and_student, unit, wide


def hidden_mse(
    teacher: Shaped[Array, "*B D"], student: Shaped[Array, "*B D"]
) -> Float[Array, "*B"]:
    """Mean squared difference of hidden states (FitNets, arXiv:1412.6550)."""
    t, s = teacher_and_student(teacher, student)
    return jnp.mean((t - s) ** 2, -1)


def cosine_distance(
    teacher: Shaped[Array, "*B D"], student: Shaped[Array, "*B D"]
) -> Float[Array, "*B"]:
    """1 - cosine, invariant to positive scale of either side (DistilBERT, arXiv:1910.01108)."""
    t, s = teacher_and_student(teacher, student)
    return 1 - jnp.sum(unit(t) * unit(s), -1)


def attention_transfer(
    teacher: Shaped[Array, "B H W C"], student: Shaped[Array, "B I J D"]
) -> Float[Array, " B"]:
    """Mean squared difference of unit attention maps Q = sum_c |A_c|^2.

    The larger map is average-pooled to the size of the smaller one. The loss is invariant to the
    order of channels and to positive scale. Paper: times beta = 1e3.

    Raises:
      Refused: where the smaller size does not divide the larger one.

    Source: arXiv:1612.03928.
    """
    t, s = teacher_and_student(teacher, student)
    size = tuple(min(a, b) for a, b in zip(t.shape[1:3], s.shape[1:3]))

    def attention(features: Array) -> Array:
        maps = jnp.sum(_pool(features, size) ** 2, -1)
        return unit(maps.reshape(features.shape[0], -1))

    return jnp.mean((attention(t) - attention(s)) ** 2, -1)


def rkd_distance(
    teacher: Shaped[Array, "B D"], student: Shaped[Array, "B E"]
) -> Float[Array, ""]:
    """Huber loss between matrices of pairwise distances, each divided by its mean (RKD).

    It is the mean over all B^2 entries, as in the authors' code, and invariant to rotation,
    translation and scale of either side. Paper: weight 25.

    Source: arXiv:1904.05068.
    """

    def relations(features: Array) -> Array:
        distance = root(jnp.sum((features[:, None] - features[None]) ** 2, -1))
        pairs = distance.shape[0] * (distance.shape[0] - 1)
        mean = jnp.sum(distance) / pairs
        return distance / jnp.where(mean > 0, mean, 1.0)

    t, s = teacher_and_student(teacher, student)
    return jnp.mean(_huber(relations(s) - relations(t)))


def rkd_angle(
    teacher: Shaped[Array, "B D"], student: Shaped[Array, "B E"]
) -> Float[Array, ""]:
    """Huber loss between the cosines of the angles at j of all triples (i, j, k) (RKD).

    Paper: weight 50.
    """

    def relations(features: Array) -> Array:
        edges = unit(features[None] - features[:, None])  # [j i D]
        return jnp.einsum("jid,jkd->jik", edges, edges)

    t, s = teacher_and_student(teacher, student)
    return jnp.mean(_huber(relations(s) - relations(t)))


def similarity_preserving(
    teacher: Shaped[Array, "B ..."], student: Shaped[Array, "B ..."]
) -> Float[Array, ""]:
    """||G_s - G_t||_F^2 / B^2 of Gram matrices F F^T with unit rows (arXiv:1907.09682)."""

    def gram(features: Array) -> Array:
        rows = features.reshape(features.shape[0], -1)
        return unit(rows @ rows.T)

    t, s = teacher_and_student(teacher, student)
    return jnp.mean((gram(t) - gram(s)) ** 2)


def cka(x: Shaped[Array, "B D"], y: Shaped[Array, "B E"]) -> Float[Array, ""]:
    """Linear CKA, ||Yc^T Xc||_F^2 / (||Xc^T Xc||_F ||Yc^T Yc||_F), in [0, 1].

    It is invariant to orthogonal maps, isotropic scale and shifts of either side, but not to
    general linear maps.

    Source: arXiv:1905.00414.
    """
    x = _centred(x)
    y = _centred(y)

    def cross(a: Array, b: Array) -> Array:
        return jnp.sum((a.T @ b) ** 2)

    return cross(x, y) / jnp.sqrt(cross(x, x) * cross(y, y))


def unbiased_hsic(
    x: Shaped[Array, "B D"], y: Shaped[Array, "B E"]
) -> Float[Array, ""]:
    """Unbiased estimate of HSIC with linear kernels from at least 4 samples.

    Its mean is 0 where x and y are independent.

    Source: Song et al., JMLR 2012.
    """
    n = x.shape[0]
    # centring leaves the value as it is, and keeps its rounding small
    k = _without_diagonal(_centred(x))
    m = _without_diagonal(_centred(y))
    trace = jnp.sum(k * m)
    sums = jnp.sum(k) * jnp.sum(m) / ((n - 1) * (n - 2))
    return (trace + sums - 2 / (n - 2) * jnp.sum(k, 0) @ jnp.sum(m, 0)) / (
        n * (n - 3)
    )


def minibatch_cka(
    x: Shaped[Array, "K B D"], y: Shaped[Array, "K B E"]
) -> Float[Array, ""]:
    """CKA from K batches: a quotient of unbiased HSICs, each averaged over batches before.

    Its expectation does not depend on the size of a batch, unlike that of `cka`, which rises to 1
    as the batch becomes smaller than D.

    Source: arXiv:2010.15327.
    """

    def mean(a: Array, b: Array) -> Array:
        return jnp.mean(jax.vmap(unbiased_hsic)(a, b))

    return mean(x, y) / jnp.sqrt(mean(x, x) * mean(y, y))


def _pool(x: Array, size: tuple[int, int]) -> Array:
    b, h, w, c = x.shape
    if h % size[0] or w % size[1]:
        expected = f"a multiple of {size[0]}x{size[1]}, the other network's"
        raise Refused(f"attention map of {h}x{w}: expected {expected}")
    blocks = x.reshape(b, size[0], h // size[0], size[1], w // size[1], c)
    return jnp.mean(blocks, (2, 4))


def _huber(gap: Array) -> Array:
    return jnp.where(jnp.abs(gap) < 1, 0.5 * gap**2, jnp.abs(gap) - 0.5)


def _centred(x: Array) -> Array:
    x = wide(x)
    return x - jnp.mean(x, 0)


def _without_diagonal(x: Array) -> Array:
    """x x^T with a diagonal of zeros."""
    return (x @ x.T) * (1 - jnp.eye(x.shape[0]))
