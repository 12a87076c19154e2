"""Attention written out in numpy, and what the tests of its paths share."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models.masks import BlockMask

B = 2
H = 4
G = 2
K = 8


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(queries, keys, heads=H, groups=G):
    """q, k, v and the weights of a loss."""
    q = draw(B, queries, heads, K)
    k = draw(B, keys, groups, K, seed=1)
    v = draw(B, keys, groups, K, seed=2)
    return q, k, v, draw(B, queries, heads, K, seed=3)


def of_keys(keys, *counts):
    """A mask with the first so many keys of each sample."""
    return (np.arange(keys) < np.array(counts)[:, None])[:, None, None]


def grid(*shape, seed=4):
    """A mask by blocks of which about half is kept; the last queries see nothing."""
    seen = np.random.default_rng(seed).random(shape) < 0.5
    seen[..., -1, :] = False
    return seen


def dense(q, k, v, w, visible):
    """Value, and gradients of the sum of value times w, written out in float64.

    `visible` is bool [#B #H T S]; a query that sees nothing gives 0.
    """
    q, k, v, w = (x.astype(float) for x in (q, k, v, w))
    groups = k.shape[2]
    k, v = (np.repeat(x, q.shape[2] // groups, 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    weights = np.exp(np.einsum("bthk,bshk->bhts", q, k) * scale) * visible
    norm = weights.sum(-1, keepdims=True)
    weights = weights / np.where(norm == 0, 1, norm)
    value = np.einsum("bhts,bshk->bthk", weights, v)
    d_weights = np.einsum("bthk,bshk->bhts", w, v)
    mean = (d_weights * weights).sum(-1, keepdims=True)
    d_scores = weights * (d_weights - mean) * scale
    d_q = np.einsum("bhts,bshk->bthk", d_scores, k)
    d_k = np.einsum("bhts,bthk->bshk", d_scores, q)
    d_v = np.einsum("bhts,bthk->bshk", weights, w)
    of_groups = lambda x: x.reshape(*x.shape[:2], groups, -1, x.shape[-1]).sum(3)
    return value, d_q, of_groups(d_k), of_groups(d_v)


def results(path, q, k, v, w, **how):
    """Value and gradients; what of `how` is a jax array is data of the program."""

    def loss(q, k, v, how):
        out = path(q, k, v, **how)
        return jnp.sum(out * w), out

    graded = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    known = {name: x for name, x in how.items() if _is_known(x)}
    data = {name: x for name, x in how.items() if not _is_known(x)}
    run = jax.jit(lambda q, k, v, data: graded(q, k, v, data | known))
    (_, out), gradients = run(q, k, v, data)
    return out, *gradients


def _is_known(x):
    if isinstance(x, BlockMask):
        return x.static
    return not isinstance(x, jax.Array)


def close(found, expected):
    # float32 sums of some hundred terms of order 1, in another order
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max())
        )


def causal_mask(queries, keys):
    return np.tri(queries, keys, dtype=bool)
