"""Several laws made into one, and what such an operator must satisfy (arXiv:2601.13100,
arXiv:2601.09165).

Laws are log-probabilities [..., V] in a sequence; weights [n] lie on the simplex. Linear pooling
mixes probabilities, geometric pooling mixes logits. An operator that keeps a share gamma of a base
teacher in every generation's target contracts towards that teacher: KL(P*||S_g) <= (1 - gamma)^g
KL(P*||S_0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.types import Array, Refused


def linear(laws: Sequence[Array], weights: Sequence[float]) -> Array:
    """log sum_i w_i p_i; laws of weight 0 are left out."""
    return jax.nn.logsumexp(jnp.stack([law + np.log(w) for law, w in _present(laws, weights)]), 0)


def geometric(laws: Sequence[Array], weights: Sequence[float]) -> Array:
    """log of prod_i p_i^w_i, normalised; laws of weight 0 are left out."""
    return jax.nn.log_softmax(sum(law * w for law, w in _present(laws, weights)))


def _present(laws, weights):
    weights = [float(w) for w in weights]
    if len(laws) != len(weights) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise Refused(
            f"weights={tuple(weights)}: expected {len(laws)} that are not negative and sum to 1"
        )
    return [(law, w) for law, w in zip(laws, weights) if w]


POOLS = {"linear": linear, "geometric": geometric}


def anchored(
    pool: Callable, gamma: float, history: Sequence[float] = (1.0,)
) -> Callable[[Array, Sequence[Array]], Array]:
    """The meta-teacher operator (base, students, newest first) -> law: share `gamma` for the base,
    the rest by `history`.

    Of a window that is not full yet the weights are normalised anew.
    """

    def operator(base: Array, students: Sequence[Array]) -> Array:
        u = np.array(history[: len(students)], np.float64)
        return pool([base, *students[: len(u)]], [gamma, *((1 - gamma) * u / u.sum())])

    return operator


def violated(
    operator: Callable[[Array, Sequence[Array]], Array],
    *,
    students: int = 2,
    vocab: int = 6,
    tempered: bool = False,
    seed: int = 0,
    atol: float = 1e-5,
) -> list[str]:
    """Names of the axioms that `operator(base, students) -> law` breaks on random laws; an empty
    list where it breaks none.

    law: a probability vector; positive: of positive laws a positive one; between: every outcome's
    probability lies between its inputs' (geometric: up to one common factor), and equal inputs give
    themselves; continuous: a change of the inputs by d changes the result by at most 50 d;
    anchored: swapping the base for another moves the result with it; equivariant: renaming outcomes
    renames the result's; `tempered`: raising the inputs to 1/T raises the result to it.
    """
    rng = np.random.default_rng(seed)
    broken = set()
    draw = lambda: jnp.log(jnp.asarray(rng.dirichlet(np.ones(vocab)) * 0.98 + 0.02 / vocab))
    temper = lambda law: jax.nn.log_softmax(law / 2.0)
    far = lambda a, b: not bool(jnp.max(jnp.abs(a - b)) <= atol)
    for _ in range(20):
        base = draw()
        others = [draw() for _ in range(students)]
        new = draw()
        out = operator(base, others)
        if far(jnp.sum(jnp.exp(out)), 1.0):
            broken.add("law")
        if not bool(jnp.all(jnp.isfinite(out))):
            broken.add("positive")
            continue
        stacked = jnp.stack([base, *others])
        above = out - stacked.min(0)
        below = stacked.max(0) - out
        if bool(above.min() + below.min() < -atol) or far(operator(base, [base] * students), base):
            broken.add("between")
        step = 1e-3
        near = jax.nn.log_softmax(base + step * jnp.asarray(rng.standard_normal(vocab)))
        if not bool(
            jnp.max(jnp.abs(operator(near, others) - out))
            <= 50 * jnp.max(jnp.abs(near - base)) + atol
        ):
            broken.add("continuous")
        moved = jnp.exp(operator(new, others)) - jnp.exp(out)
        if not bool(
            jnp.sum(moved * (new - base)) > atol
        ):  # monotone: more likely for the new base, more likely in the result
            broken.add("anchored")
        order = rng.permutation(vocab)
        if far(operator(base[order], [law[order] for law in others]), out[order]):
            broken.add("equivariant")
        if tempered and far(operator(temper(base), [temper(law) for law in others]), temper(out)):
            broken.add("tempered")
    return sorted(broken)
