"""Several distributions made into one, and axioms of such operators (arXiv:2601.13100,
arXiv:2601.09165).

Distributions are log-probabilities; weights lie on the simplex. Linear pooling mixes probabilities,
geometric pooling mixes logits. An operator that keeps a share gamma of a base teacher in the target
of every generation contracts towards that teacher: KL(P* || S_g) <= (1 - gamma)^g KL(P* || S_0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxdistill.core.types import Array, Refused

# (base, students) -> distribution
Operator = Callable[[Array, Sequence[Array]], Array]


Weights = Sequence[float] | Shaped[np.ndarray, " K"]


def linear(
    distributions: Sequence[Shaped[Array, "*B V"]], weights: Weights
) -> Shaped[Array, "*B V"]:
    """log sum_i w_i p_i, over the distributions whose weight is not 0."""
    weighted = [log_p + np.log(w) for log_p, w in _present(distributions, weights)]
    return jax.nn.logsumexp(jnp.stack(weighted), 0)


def geometric(
    distributions: Sequence[Shaped[Array, "*B V"]], weights: Weights
) -> Shaped[Array, "*B V"]:
    """log of prod_i p_i^w_i, normalised, over the distributions whose weight is not 0."""
    return jax.nn.log_softmax(
        sum(log_p * w for log_p, w in _present(distributions, weights))
    )


def _present(
    distributions: Sequence[Array], weights: Weights
) -> list[tuple[Array, float]]:
    weights = [float(w) for w in weights]
    fits = len(distributions) == len(weights) and min(weights) >= 0
    if not fits or abs(sum(weights) - 1) > 1e-6:
        expected = f"{len(distributions)} that are not negative and sum to 1"
        raise Refused(f"weights={tuple(weights)}: expected {expected}")
    return [(log_p, w) for log_p, w in zip(distributions, weights) if w]


POOLS = {"linear": linear, "geometric": geometric}


def anchored(
    pool: Callable, gamma: float, history: Sequence[float] = (1.0,)
) -> Operator:
    """The meta-teacher operator: a share `gamma` of the base, the rest of the students.

    `history` are the relative weights of the students, newest first. While there are fewer students
    than weights, the weights of those that exist are normalised.
    """

    def operator(base: Array, students: Sequence[Array]) -> Array:
        relative = np.array(history[: len(students)], np.float64)
        shares = (1 - gamma) * relative / relative.sum()
        return pool([base, *students[: len(relative)]], [gamma, *shares])

    return operator


def violated(
    operator: Operator,
    *,
    students: int = 2,
    vocab: int = 6,
    tempered: bool = False,
    seed: int = 0,
    atol: float = 1e-5,
) -> list[str]:
    """Names of the axioms that an operator breaks on random distributions.

    - law: the result is a probability vector.
    - positive: of positive distributions the result is positive.
    - between: the probability of every outcome lies between those of the inputs (up to one common
      factor, as geometric pooling has it), and equal inputs are their own result.
    - continuous: a change of the inputs by d changes the result by at most 50 d.
    - anchored: where the base is replaced, the result moves in the same direction.
    - equivariant: a permutation of the outcomes permutes the result.
    - tempered (only where asked for): inputs to the power 1 / T give the result to that power.
    """
    rng = np.random.default_rng(seed)
    broken: set[str] = set()
    for _ in range(20):
        base = _random_distribution(rng, vocab)
        others = [_random_distribution(rng, vocab) for _ in range(students)]
        new = _random_distribution(rng, vocab)
        out = operator(base, others)
        if _differs(jnp.sum(jnp.exp(out)), 1.0, atol):
            broken.add("law")
        if not bool(jnp.all(jnp.isfinite(out))):
            broken.add("positive")
            continue
        stacked = jnp.stack([base, *others])
        above = out - stacked.min(0)
        below = stacked.max(0) - out
        outside = bool(above.min() + below.min() < -atol)
        if outside or _differs(operator(base, [base] * students), base, atol):
            broken.add("between")
        step = 1e-3 * jnp.asarray(rng.standard_normal(vocab))
        near = jax.nn.log_softmax(base + step)
        change = jnp.max(jnp.abs(operator(near, others) - out))
        if not bool(change <= 50 * jnp.max(jnp.abs(near - base)) + atol):
            broken.add("continuous")
        # monotone: what is likelier for the new base is likelier in the result
        moved = jnp.exp(operator(new, others)) - jnp.exp(out)
        if not bool(jnp.sum(moved * (new - base)) > atol):
            broken.add("anchored")
        order = rng.permutation(vocab)
        permuted = operator(base[order], [log_p[order] for log_p in others])
        if _differs(permuted, out[order], atol):
            broken.add("equivariant")
        if tempered:
            cooled = operator(
                _tempered(base), [_tempered(log_p) for log_p in others]
            )
            if _differs(cooled, _tempered(out), atol):
                broken.add("tempered")
    return sorted(broken)


def _random_distribution(rng: np.random.Generator, vocab: int) -> Array:
    p = rng.dirichlet(np.ones(vocab)) * 0.98 + 0.02 / vocab
    return jnp.log(jnp.asarray(p))


def _tempered(log_p: Array) -> Array:
    return jax.nn.log_softmax(log_p / 2.0)


def _differs(a: Array, b: Array | float, atol: float) -> bool:
    return not bool(jnp.max(jnp.abs(a - b)) <= atol)
