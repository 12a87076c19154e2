"""Policy gradients on groups of responses: advantages, clipped ratios, estimators of a KL. Per
token or sample, no sum.

q is the policy that learns, `old` the one that wrote the tokens, p a teacher or reference; all as
log-probabilities of the tokens that were written. Nothing here reduces over tokens:
`objectives.divergence.sequence_mean` does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Array


def group_advantages(reward: Array, group: int, *, eps: float = 1e-6, ddof: int = 0) -> Array:
    """(r - mean) / (std + eps) within each `group` successive rewards [B] (GRPO, arXiv:2402.03300).

    std^2 is the sum of squares over group - ddof: 0 the population's, 1 the sample's, which the
    paper leaves open; TRL has ddof 1 and eps 1e-4. Exactly 0 where all rewards of a group are
    equal: they are counted from the group's first, so that nothing is rounded.
    """
    r = reward.reshape(-1, group)
    r = r - r[:, :1]
    r = r - jnp.mean(r, 1, keepdims=True)
    std = jnp.sqrt(
        jnp.mean(r**2, 1, keepdims=True)
        if ddof == 0
        else jnp.sum(r**2, 1, keepdims=True) / (group - ddof)
    )
    return (r / (std + eps)).reshape(reward.shape)


def clipped_surrogate(log_ratio: Array, advantage: Array, low: float, high: float) -> Array:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = exp(log_ratio) (PPO, arXiv:1707.06347); [...]
    each, to be descended.

    No gradient where A > 0 and r > 1 + high, where A < 0 and r < 1 - low, and where A = 0.
    """
    ratio = jnp.exp(log_ratio)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def k1(log_p: Array, log_q: Array) -> Array:
    """log q / p: unbiased for KL(q || p) on tokens of q. Its gradient is not: that is 0 on average."""
    return log_q - log_p


def k2(log_p: Array, log_q: Array) -> Array:
    """(log q / p)^2 / 2: biased, but on tokens of q its gradient is on average that of KL(q || p)."""
    return 0.5 * (log_q - log_p) ** 2


def k3(log_p: Array, log_q: Array) -> Array:
    """p / q - 1 - log p / q >= 0: unbiased for KL(q || p) on tokens of q; its gradient is on
    average that of KL(p || q).
    """
    return jnp.exp(log_p - log_q) - 1 - (log_p - log_q)


KL_ESTIMATORS = {f.__name__: f for f in (k1, k2, k3)}


def clamp(x: Array, limit: float) -> Array:
    """x in [-limit, limit]; no gradient outside."""
    return jnp.clip(x, -limit, limit)


def straight_through_clamp(x: Array, limit: float) -> Array:
    """x in [-limit, limit], with the gradient of x."""
    return x + jax.lax.stop_gradient(jnp.clip(x, -limit, limit) - x)


CLAMPS = {"literal": clamp, "straight_through": straight_through_clamp}
